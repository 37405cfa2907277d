"""The search for settings: what a stage tries, and the rule that chooses."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from keeplora.methods import METHODS, create
from keeplora.train.config import load_config, parse_config
from keeplora.train.loop import NonFiniteLossError
from tools.sweep import demo
from tools.sweep.__main__ import REFERENCES, Sweep, grid_of_rates, small_benchmark
from tools.sweep.search import as_method, candidates, label_of, ranked, score
from tools.sweep.settings import BASE, CHANGES, costs
from tools.sweep.variants import VARIANTS

GRID = Path(__file__).parents[2] / "tools" / "sweep" / "grid.toml"


def row(settings, seed, last, avg=50.0, transfer=40.0):
    values = {"last": last, "avg": avg, "transfer": transfer, "learn": 80.0, "forgetting": 5.0}
    return {"label": label_of("lora", settings), "settings": settings, "seed": seed, **values}


def test_a_stage_varies_around_the_best():
    best = {"learning_rate": 1e-3, "r": 8}
    assert candidates(best, {"try": [{"r": 8}, {"r": 16}, {"r": 16}]}) == [{"learning_rate": 1e-3, "r": 16}]
    scaled = candidates(best, {"scale": {"learning_rate": [0.6, 1.7]}})
    assert scaled == [{"learning_rate": 6e-4, "r": 8}, {"learning_rate": 1.7e-3, "r": 8}]


def test_the_rule_is_last_with_an_allowance_on_transfer_over_complete_settings():
    a, b, c, d = ({"learning_rate": rate} for rate in (1e-4, 2e-4, 3e-4, 4e-4))
    rows = [
        row(a, 100, 70.0, transfer=45.0), row(a, 101, 68.0, transfer=45.0),
        row(b, 100, 65.0, transfer=47.0), row(b, 101, 66.0, transfer=47.0),
        row(c, 100, 64.0, transfer=60.0), row(c, 101, 64.0, transfer=60.0),
        row(d, 100, 99.0, transfer=47.0),
    ]  # fmt: skip
    order = ranked(rows, [100, 101], zero_shot=50.0)
    assert [settings for settings, _ in order] == [b, c, a]  # 65.5, 64, 69 - 5 * 2
    assert score(order[2][1], 50.0) == pytest.approx(59.0)
    assert ranked(rows, [100], zero_shot=50.0)[0][0] == d
    assert ranked(rows, [100, 101], zero_shot=48.0)[0][0] == a


def test_labels_follow_settings():
    assert label_of("lora", {"r": 8, "learning_rate": 1e-3}) == label_of("lora", {"learning_rate": 1e-3, "r": 8})
    assert label_of("lora", {"r": 8}) != label_of("lora", {"r": 16})


def test_every_setting_of_the_grid_is_accepted_by_its_method():
    import tiny_workload

    grid = tomllib.loads(GRID.read_text(encoding="utf-8"))
    methods = [name for name, entry in grid.items() if isinstance(entry, dict)]
    assert set(methods) <= set(METHODS)
    for method in methods:
        best = {**grid[method].get("start", {}), "learning_rate": 1e-3}
        for stage in grid[method]["stages"]:
            for settings in candidates(best, stage):
                entry = as_method(method, settings)
                create(method, tiny_workload.model(), entry.settings)


@pytest.mark.parametrize("name", ["embedded", "minilm"])
def test_every_rate_is_for_a_method_with_settings(name):
    rates = tomllib.loads(GRID.with_name("rates.toml").read_text(encoding="utf-8"))[name]
    shipped = GRID.parents[2] / "keeplora" / "compare" / "settings" / f"{name}.toml"
    sections = tomllib.loads(shipped.read_text(encoding="utf-8"))["method"]
    assert set(rates) <= set(METHODS)
    for method, tried in rates.items():
        assert len(set(tried)) == len(tried) == 2
        assert sections[method]["learning_rate"] > 0


NOT_SEARCHED = {"mica", "osf", "corda", "lora-ga", "eva", "lines-keeplora"}
"""Their sections say so."""
OTHER_TARGETS = {"embedded": {"keeplora", "keeplora++", "keeplora++cls"}, "minilm": set()}
"""Whose rates are lower than found: the search adapted v_proj and out_proj alone, the comparison all of attention."""


@pytest.mark.parametrize("name", ["embedded", "minilm"])
def test_the_shipped_rates_are_the_choice_of_the_rule(name):
    """Every run of the search is in the repository: whoever changes a rate without one fails here."""
    lines = GRID.with_name(f"compare_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    shipped = GRID.parents[2] / "keeplora" / "compare" / "settings" / f"{name}.toml"
    sections = tomllib.loads(shipped.read_text(encoding="utf-8"))["method"]
    [zero_shot] = {row["transfer"] for row in rows if row["method"] == "zero-shot"}
    assert len({row["shared"] for row in rows}) == 1
    searched = {row["method"] for row in rows} - {"zero-shot"}
    own = {label for label, section in sections.items() if "like" not in section}
    assert searched == own - {"zero-shot"} - NOT_SEARCHED
    for method in searched:
        floor = 0.0 if method in REFERENCES else zero_shot
        chosen = ranked([row for row in rows if row["method"] == method], [100], floor)[0][0]
        found, now = chosen["learning_rate"], sections[method]["learning_rate"]
        assert now < found if method in OTHER_TARGETS[name] else now == found, method


def test_variants_and_single_changes_are_settings_of_their_methods():
    base = small_benchmark("embedded")
    for method, changes in VARIANTS.items():
        for change in changes:
            METHODS[method].config(**{**base.of(method).settings, **change})
    for change in CHANGES:
        METHODS["keeplora"].config(**as_method("keeplora", BASE | change).settings)


def test_costs_are_of_every_part_of_a_task():
    import tiny_workload

    base = replace(load_config("demo"), benchmark="tiny_workload:workload", batch_size=16)
    settings = {"learning_rate": 1e-2, "r": 2, "target_modules": ["v_proj"]}
    found = costs(base, tiny_workload.workload("cpu"), settings, steps=2)
    assert set(found) == {"step_s", "before_s", "after_s"}
    assert min(found.values()) > 0


def test_rates_become_stages_of_one_rate_for_every_method():
    base = load_config("demo")
    grid = grid_of_rates(base, {"lora": [1e-3, 3e-3], "full": [1e-4, 3e-4]})
    assert grid["lora"]["stages"][1] == {"try": [{"learning_rate": 3e-3}]}
    assert [set(stage) for stage in grid["lora"]["stages"]] == [{"try"}, {"try"}, {"scale"}, {"scale"}]
    assert grid["lora"]["start"] == dict(base.of("lora").settings)
    assert grid["full"]["reference"]
    assert not grid["lora"]["reference"]
    assert grid["finalists"] == 1


def test_rows_are_written_as_runs_finish_and_not_repeated(tmp_path):
    """The second method of a stage is stopped: the first one's row is there, and only the second runs again."""
    settings = {"learning_rate": 1e-2, "r": 4}
    base = parse_config({"benchmark": "tiny_workload:workload", "methods": ["lora"], "steps": 2, "batch_size": 16,
                         "workers": 0, "tensorboard": False, "out": str(tmp_path / "out")})  # fmt: skip
    file = tmp_path / "rows.jsonl"
    sweep = Sweep(base, file)
    wanted = [("lora", settings, 100), ("lora", {**settings, "learning_rate": 1e30}, 100)]
    with pytest.raises(NonFiniteLossError):
        sweep.run(wanted)
    assert [json.loads(line)["settings"] for line in file.read_text().splitlines()] == [settings]
    again = Sweep(base, file)
    again.run([wanted[0]])
    assert len(file.read_text().splitlines()) == 1
    assert Sweep(replace(base, steps=3), file).rows == []


def test_the_sweep_and_the_demo_share_no_seed():
    assert not {100, 101} & set(load_config("demo").seeds)


@pytest.mark.parametrize("method", demo.TRIED)
def test_the_demo_runs_what_the_rule_chose(method):
    """Best Last of all that were tried whose Transfer is no lower than full fine-tuning's."""
    rows = [json.loads(line) for line in GRID.with_name("demo.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {label_of(row["method"], row["settings"]) for row in rows} == {
        label_of(name, settings) for name, many in demo.TRIED.items() for settings in many
    }
    entry = load_config("demo").of(method)
    assert demo.choice(rows, method)["settings"] == {**entry.settings, "learning_rate": entry.learning_rate}
