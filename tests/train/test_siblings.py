"""Shipped configurations of the field: every method has settings there that it takes, and suits the model."""

import tomllib
import warnings
from functools import cache
from importlib import resources

import pytest
import tiny_workload
import torch

from keeplora import cli
from keeplora.compare.runs import check_settings, with_all_methods
from keeplora.methods import METHODS, configure, create
from keeplora.methods.settings import ConfigError
from keeplora.train.config import load_config, parse_config, restored, shipped_configs
from keeplora.train.siblings import RATES

FIELD = [name for name in shipped_configs() if load_config(name).own is not None]
NOT_WITH_ANSWERS = {"keeplora++cls", "dac", "duallora"}
"""They need image features or a class token."""


def clip():
    import open_clip

    config = open_clip.get_model_config("ViT-B-16")
    return open_clip.CLIP(
        config["embed_dim"], {**config["vision_cfg"], "layers": 2}, {**config["text_cfg"], "layers": 2}, quick_gelu=True
    )


def llava(kind="Llava"):
    import transformers as tf

    small = {"num_hidden_layers": 2}
    vision = tf.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, **small)
    config = getattr(tf, f"{kind}Config")(vision_config=vision, text_config=tf.LlamaConfig(**small))
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


MODELS = {
    "ViT-B-16": clip,
    "llava-hf/llava-1.5-7b-hf": llava,
    "LanguageBind/Video-LLaVA-7B-hf": lambda: llava("VideoLlava"),
}


@cache
def refused(model, name, settings):
    """Whether a method cannot be made around a model of full width, two blocks deep, without values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = MODELS[model]()
    try:
        create(name, made, dict(settings))
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def hashable(value):
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", FIELD)
def test_every_method_has_settings_that_it_and_the_model_take(name):
    config = load_config(name)
    check_settings(config)
    source = config.own.model
    labels = dict.fromkeys((*config.methods, *config.method, *(METHODS if config.every_method else ())))
    found = set()
    for label in labels:
        entry = config.of(label)
        configure(entry.method, entry.settings)
        settings = tuple((key, hashable(value)) for key, value in entry.settings.items())
        if refused(source.open_clip or source.transformers, entry.method, settings):
            found.add(label)
    assert found == (NOT_WITH_ANSWERS if config.own.answers else set())
    assert bool(config.every_method) != name.endswith("-cls")


def test_rates_are_multiples_of_loras_as_the_search_chose_them():
    file = resources.files("keeplora.compare") / "settings" / "embedded.toml"
    searched = {name: entry.get("learning_rate") for name, entry in tomllib.loads(file.read_text())["method"].items()}
    for name, factor in RATES.items():
        if name != "osf":
            assert factor == pytest.approx(searched[name] / searched["lora"], rel=0.02), name
    config = load_config("ucit")
    assert config.of("full").learning_rate == pytest.approx(3.4e-5)
    assert config.of("full").settings == {}
    assert config.of("gpm").learning_rate == 0.01
    assert config.of("inflora").settings["target_modules"][-1] == "down_proj"
    assert (config.of("o-lora").settings["r"], config.of("o-lora").settings["orthogonality"]) == (16, 0.05)


TINY = {"benchmark": "tiny_workload:workload", "methods": ["lora"], "epochs": 1,
        "method": {"twice": {"method": "lora", "r": 2, "learning_rate": 0.5}},
        "every_method": {"learning_rate": 2e-3, "r": 4}}  # fmt: skip


def test_settings_of_every_method_are_those_of_a_run_and_written_out():
    config = parse_config(TINY)
    assert config.of("twice").learning_rate == 0.5
    assert config.identity("lora", 0)["method"]["settings"] == {"r": 4}
    assert config.as_dict()["method"]["lora"]["learning_rate"] == 2e-3
    again = restored(config.as_dict())
    assert again.of("lora") == config.of("lora")
    assert again.changed(config.as_dict()) == config.changed(again.as_dict()) == []
    other = parse_config({**TINY, "every_method": {"learning_rate": 1e-3, "r": 4}})
    assert other.changed(config.as_dict()) == ["method.lora"]
    for wrong, told in (({"r": 4}, "learning_rate must be a number, got None"), ([1], "must be a table")):
        with pytest.raises(ConfigError, match=told):
            parse_config({**TINY, "every_method": wrong})
    with pytest.raises(ConfigError, match="got 'rank_'"):
        check_settings(parse_config({**TINY, "every_method": {"learning_rate": 1e-3, "rank_": 4}}))


def test_all_methods_are_those_of_the_file_and_all_that_suit_the_model(monkeypatch, tmp_path, capsys):
    config, left_out = with_all_methods(parse_config({**TINY, "every_method": {"learning_rate": 1e-3, "r": 40}}),
                                        tiny_workload.workload("cpu"))  # fmt: skip
    assert {"lora", "twice", "full", "gpm"} <= set(config.methods)
    assert "inflora" in left_out
    assert "r must be at most" in left_out["keeplora"]
    assert set(config.methods) | set(left_out) == {*METHODS, "twice"}
    monkeypatch.setattr("keeplora.compare.runs.run_benchmark", lambda config, **_: print(*config.methods) or [])
    monkeypatch.setattr("keeplora.report.report_run", lambda *_: "")
    file = tmp_path / "tiny.toml"
    file.write_text('benchmark = "tiny_workload:workload"\nmethods = ["lora"]\nepochs = 1\n'
                    "every_method = {learning_rate = 1e-3, r = 40}\n")  # fmt: skip
    assert cli.main(["run", str(file), "--methods", "all", "--workers", "0"]) == 0
    said = capsys.readouterr()
    assert "left out: inflora (" in said.err
    assert "gpm" in said.out


def test_methods_that_cannot_run_are_told_all_at_once():
    from keeplora.compare.runs import check_methods

    wide = {"method": {name: {"r": 4000} for name in ("keeplora", "inflora")}, "methods": ["keeplora", "inflora"]}
    with pytest.raises(ConfigError, match=r"2 methods cannot run:\n  keeplora must suit .*\n  inflora must suit "):
        check_methods(parse_config({**TINY, **wide}), tiny_workload.workload("cpu"))
    misspelt = {"method": {name: {"rnak": 4} for name in ("keeplora", "lora")}, "methods": ["keeplora", "lora"]}
    with pytest.raises(ConfigError, match=r"settings of keeplora must suit.*\n.*settings of lora must suit"):
        check_settings(parse_config({**TINY, **misspelt}))
