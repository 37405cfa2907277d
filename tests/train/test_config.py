"""Configurations: what is accepted, what is refused and how it is said."""

import copy
import json
from contextlib import suppress
from dataclasses import fields
from datetime import date

import pytest

from keeplora.compare.runs import check_settings
from keeplora.methods import METHODS, configure
from keeplora.methods.settings import ConfigError
from keeplora.tasks.field import BENCHMARKS
from keeplora.tasks.own import DataSettings, ModelSource, TaskSource
from keeplora.train.config import RunConfig, fingerprint, load_config, override, parse_config, shipped_configs

GOOD = {"benchmark": "embedded", "methods": ["lora"], "epochs": 2}


def test_values_from_toml(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'benchmark = "embedded"\nmethods = ["lora", "wide"]\nseeds = [3, 4]\nsteps = 7\n'
        '[method.wide]\nmethod = "lora"\nlearning_rate = 2e-3\nweight_decay = 0\nr = 32\n'
    )
    config = load_config(file)
    assert (config.seeds, config.steps, config.epochs) == ((3, 4), 7, None)
    assert config.of("wide").method == "lora"
    assert config.of("wide").learning_rate == 2e-3
    assert config.of("wide").weight_decay == 0
    assert config.of("wide").settings == {"r": 32}
    assert config.of("lora").method == "lora"
    assert config.labels() == ("zero-shot", "lora", "wide")
    assert config.pairs()[:3] == [("zero-shot", 3), ("lora", 3), ("wide", 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 3}, "got 'batchsize' .* Did you mean 'batch_size'"),
        ({"epochs": None}, "one of epochs and steps .*got None"),
        ({"steps": 5}, "one of epochs and steps .*got epochs and steps"),
        ({"epochs": 0}, "epochs .*got 0"),
        ({"epochs": 1.5}, "epochs .*got 1.5"),
        ({"epochs": True}, "epochs .*got True"),
        ({"epochs": None, "steps": [3, 0]}, "steps .*got 0"),
        ({"epochs": None, "steps": []}, "steps must hold at least one entry"),
        ({"batch_size": -1}, "batch_size .*got -1"),
        ({"seeds": [0, 0]}, r"seeds must have no entry twice, got \[0, 0\]"),
        ({"seeds": []}, r"seeds .*got \(\)"),
        ({"seeds": [-1]}, "seeds .*got -1"),
        ({"seeds": [2**32]}, f"seeds .*got {2**32}"),
        ({"seeds": [[1]]}, r"seeds .*got \[1\]"),
        ({"seeds": 3}, "seeds .*got 3"),
        ({"methods": []}, r"methods .*got \(\)"),
        ({"methods": ["../x"]}, "methods .*got '../x'"),
        ({"methods": [["lora"]]}, r"methods .*got \['lora'\]"),
        ({"precision": "fp16"}, "precision .*auto, bf16, fp32, got 'fp16'"),
        ({"evaluate_on": "train"}, "evaluate_on .*test, validation, both, got 'train'"),
        ({"switch_fraction": 0.0}, "switch_fraction .*got 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay .*got nan"),
        ({"workers": -1}, "workers .*got -1"),
        ({"tensorboard": "no"}, "tensorboard .*got 'no'"),
        ({"out": 3}, "out .*got 3"),
        ({"method": {"lora": {"learning_rate": 0}}}, "method.lora.learning_rate .*got 0"),
        ({"method": {"lora": {"learning_rate": "1e-3"}}}, "method.lora.learning_rate .*got '1e-3'"),
        ({"method": {"lora": {"weight_decay": float("inf")}}}, "method.lora.weight_decay .*got inf"),
        ({"method": {"lora": 3}}, r"tables such as \[method.lora\]"),
    ],
)
def test_wrong_values_are_refused_by_name(change, message):
    values = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


ANYTHING = (
    None, True, 0, -1, 1.5, float("nan"), 10**400, "", "x", "a\0b", "\ud800", [], [None], [[]], [{}], ["x", "x"], {},
    {"a": 1}, {"a": {}}, {"": ""}, {1: 2}, b"x", {"x"}, date(2026, 1, 1),
)  # fmt: skip
TASKS = {
    "methods": ["lora"], "epochs": 1, "model": {"transformers": "m"}, "data": {"faults": {"grey": "skip"}},
    "task": [{"name": "a", "folder": "a"}], "witness": {"name": "w", "folder": "w"},
}  # fmt: skip
PLACES = [
    *((GOOD, (entry.name,)) for entry in fields(RunConfig)), (GOOD, ("unknown",)), (GOOD, ("method", "lora")),
    *((GOOD, ("method", "lora", name)) for name in ("method", "learning_rate", "weight_decay")),
    *((TASKS, (name,)) for name in TASKS), (TASKS, ("task", 0)), (TASKS, ("data", "faults", "grey")),
    *((TASKS, ("model", entry.name)) for entry in fields(ModelSource)),
    *((TASKS, ("data", entry.name)) for entry in fields(DataSettings)),
    *((TASKS, (*place, entry.name)) for entry in fields(TaskSource) for place in (("task", 0), ("witness",))),
]  # fmt: skip


def put(values, place, value):
    made = copy.deepcopy(values)
    inner = made
    for key in place[:-1]:
        inner = inner[key] if isinstance(key, int) else inner.setdefault(key, {})
    inner[place[-1]] = value
    return made


def taken_or_refused(values):
    try:
        json.dumps(parse_config(values).as_dict())
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(("values", "place"), PLACES, ids=[".".join(map(str, place)) for _, place in PLACES])
def test_any_value_of_any_setting_is_taken_or_refused_with_a_sentence(values, place):
    assert taken_or_refused(values)
    taken = [taken_or_refused(put(values, place, value)) for value in ANYTHING]
    assert not all(taken)
    assert not any(taken[-4:])  # what JSON does not have


@pytest.mark.parametrize("method", METHODS)
def test_any_value_of_any_setting_of_a_method_is_taken_or_refused(method):
    for name in (*(entry.name for entry in fields(METHODS[method].config)), "unknown"):
        for value in ANYTHING:
            values = {**GOOD, "methods": [method], "method": {method: {name: value}}}
            with suppress(ConfigError):
                check_settings(parse_config(values))


def test_missing_settings_and_files(tmp_path):
    with pytest.raises(ConfigError, match="must set 'benchmark'"):
        parse_config({"methods": ["lora"], "epochs": 1})
    with pytest.raises(ConfigError, match="Did you mean 'demo'"):
        load_config("demmo")
    file = tmp_path / "broken.toml"
    file.write_text("benchmark = \n")
    with pytest.raises(ConfigError, match="must be TOML"):
        load_config(file)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_are_complete(name):
    config = load_config(name)
    assert config.benchmark in BENCHMARKS if config.own is not None else config.benchmark == "embedded"
    assert config.evaluate_on == "test"
    for label in config.labels():
        assert config.of(label).method in METHODS
        configure(config.of(label).method, config.of(label).settings)  # refuses settings that it does not have


def test_the_demo_shows_every_method_on_three_seeds():
    config = load_config("demo")
    assert set(config.methods) == {"zero-shot", "full", "lora", "keeplora", "keeplora++"}
    assert config.seeds == (0, 1, 2)


def test_a_config_survives_json():
    config = parse_config({**GOOD, "method": {"lora": {"r": 8, "weight_energy": {"vision": 0.5}}}})
    again = json.loads(json.dumps(config.as_dict()))
    assert config.changed(again) == []


def test_what_counts_as_another_run():
    config = parse_config({**GOOD, "method": {"lora": {"r": 8}}})
    before = config.as_dict()
    assert override(config, seeds=(0, 1, 2), out="elsewhere", workers=7, methods=("lora", "full")).changed(before) == []
    assert override(config, batch_size=32).changed(before) == ["batch_size"]
    assert parse_config({**GOOD, "method": {"lora": {"r": 9}}}).changed(before) == ["method.lora"]
    assert parse_config(GOOD).changed(before) == ["method.lora"]
    same = parse_config({**GOOD, "methods": ["lora", "full"], "method": {"lora": {"r": 8}, "full": {}}})
    assert same.changed(before) == []


def test_identity_follows_what_decides_numbers():
    config = parse_config(GOOD)
    first = fingerprint(config.identity("lora", 0))
    assert first == fingerprint(override(config, workers=0, out="other").identity("lora", 0))
    assert first != fingerprint(config.identity("lora", 1))
    other = "fp32" if config.computes_in == "bf16" else "bf16"
    assert first != fingerprint(override(config, precision=other).identity("lora", 0))
    assert first == fingerprint(override(config, precision=config.computes_in).identity("lora", 0))


@pytest.mark.parametrize(("native", "computes_in"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_decided_by_the_device_and_recorded(monkeypatch, native, computes_in):
    monkeypatch.setattr("keeplora.train.config._multiplies_bf16", lambda: native)
    config = parse_config(GOOD)
    assert (config.precision, config.computes_in) == ("auto", computes_in)
    assert config.as_dict()["precision"] == config.identity("lora", 0)["precision"] == computes_in
    assert override(config, device="cuda").computes_in == "bf16"
    assert override(config, precision="fp32", device="cuda").computes_in == "fp32"


def test_override_leaves_what_is_none():
    config = parse_config(GOOD)
    assert override(config, out=None, seeds=None) == config
    assert isinstance(override(config, seeds=(5,)), RunConfig)
