"""`keeplora compare`: names, groups, variants, shipped settings, estimates, interruption, one sentence for mistakes."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import tiny_workload
import torch
from made_folders import config_of, keep, record_of

from keeplora import cli
from keeplora.compare.comparison import BUDGETS, comparison, shipped_comparisons
from keeplora.compare.estimate import announcement, estimate
from keeplora.compare.runs import check_methods, read_records, run_benchmark, unfinished
from keeplora.methods import METHODS, create
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import StateError
from keeplora.train import loop
from keeplora.train.record import run_folder

TINY = """
benchmark = "tiny_workload:workload"
batch_size = 16
precision = "fp32"
workers = 0
tensorboard = false
[budget.small]
epochs = 1
[budget.full]
epochs = 2
seeds = [0, 1]
[groups]
ablations = ["keeplora", "random-a", "too-wide"]
[method.lora]
r = 4
learning_rate = 1e-2
[method.keeplora]
r = 4
feature_energy = 0.5
learning_rate = 1e-2
[method.random-a]
like = "keeplora"
directions = "random"
[method.too-wide]
like = "keeplora"
r = 4000
"""


def test_all_means_every_registered_method(tiny):
    chosen = comparison(tiny, methods=["all"])
    assert set(chosen.config.labels()) | set(chosen.left_out) == set(METHODS)
    assert chosen.config.seeds == (0, 1)
    assert chosen.config.epochs == 2
    assert "zero-shot" not in chosen.untuned
    assert not {"lora", "keeplora"} & set(chosen.untuned)
    assert "keeplora++" in chosen.untuned
    assert any("keeplora++" in note and "default settings" in note for note in chosen.notes())


def test_a_method_whose_package_is_missing_is_left_out_of_all_and_refused_by_name(tiny, monkeypatch):
    version = metadata.version

    def without_peft(package):
        if package == "peft":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_peft)
    chosen = comparison(tiny, methods=["all"])
    peers = {"mica", "osf", "corda", "lora-ga", "eva"}
    assert peers <= set(chosen.left_out)
    assert all("peft must be installed" in chosen.left_out[name] for name in peers)
    named = comparison(tiny, methods=["osf"])
    with pytest.raises(ConfigError, match=r"osf must suit .*peft must be installed.*got none"):
        check_methods(named.config, named.workload)


def test_a_variant_is_its_model_with_a_change(tiny):
    chosen = comparison(tiny, methods=["random-a"], budget="small", seeds=3, out="x", workers=2).config
    assert chosen.labels() == ("zero-shot", "random-a")
    entry = chosen.of("random-a")
    assert (entry.method, entry.learning_rate) == ("keeplora", 1e-2)
    assert entry.settings == {"r": 4, "feature_energy": 0.5, "directions": "random"}
    assert (chosen.epochs, chosen.seeds, chosen.out, chosen.workers) == (1, (0, 1, 2), "x", 2)
    assert comparison(tiny, budget="small", methods=["lora"]).config.out == "runs/compare-tiny-small"


def test_a_method_that_cannot_handle_the_model_is_left_out_of_a_group_and_refused_by_name(tiny, tmp_path, capsys):
    chosen = comparison(tiny, methods=["ablations"])
    assert chosen.config.labels() == ("zero-shot", "keeplora", "random-a")
    assert "r must be at most the layer's width" in chosen.left_out["too-wide"]
    assert any(note.startswith("left out: too-wide (") for note in chosen.notes())
    out = tmp_path / "out"
    assert cli.main(["compare", "--benchmark", tiny, "--methods", "too-wide", "--out", str(out)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "too-wide must suit the benchmark's model and settings: " in errors[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (("", ""), ["--methods", "kepplora"], "methods must be known, got 'kepplora'. Did you mean 'keeplora'"),
        (("", ""), ["--methods", "ablation"], "got 'ablation'. Did you mean 'ablations'"),
        (("", ""), ["--methods", "lora", "--budget", "tiny"], "budget must be one of small, full, got 'tiny'"),
        (
            ("r = 4\nlearning", "rank = 4\nlearning"),
            ["--methods", "lora"],
            "settings of lora must suit lora: .* 'rank'",
        ),
        (
            ("r = 4\nlearning", "rank = 4\nlearning"),
            ["--methods", "all"],
            "settings of lora must suit lora: .* 'rank'",
        ),
        (('"too-wide"]', '"to-wide"]'), ["--methods", "ablations"], "got 'to-wide'. Did you mean 'too-wide'"),
        (
            ('like = "keeplora"', 'like = "keplora"'),
            ["--methods", "lora"],
            r"like must name .* Did you mean 'keeplora'",
        ),
        (('"tiny_workload:workload"', '"embeded"'), ["--methods", "lora"], "Did you mean 'embedded'"),
        (("[method.lora]", "[method.lora"), ["--methods", "lora"], "must be TOML"),
    ],
)
def test_mistakes_are_one_sentence_before_any_training(tiny, tmp_path, capsys, change, arguments, message):
    Path(tiny).write_text(TINY.replace(*change) if change[0] else TINY)
    out = tmp_path / "out"
    assert cli.main(["compare", "--benchmark", tiny, "--out", str(out), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("keeplora: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not out.exists()


def test_an_unknown_benchmark_offers_the_nearest():
    with pytest.raises(
        ConfigError, match=r"one of clip-b16, embedded, minilm or a TOML file, got 'minlm'. Did you mean 'minilm'"
    ):
        comparison("minlm")


def test_interrupted_and_started_again_it_gives_the_numbers_of_an_uninterrupted_one(
    tiny, tmp_path, monkeypatch, capsys
):
    arguments = ["compare", "--benchmark", tiny, "--methods", "lora", "random-a", "--budget", "small", "--out"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert cli.main([*arguments, str(whole)]) == 0
    first = capsys.readouterr()
    assert "3 methods x 1 seeds on tiny_workload:workload: 3 runs, 1 at a time, about " in first.err

    plain = loop.save_progress

    def interrupted(folder, record, *rest):
        plain(folder, record, *rest)
        if record.label == "random-a" and record.finished_tasks == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_progress", interrupted)
    assert cli.main([*arguments, str(resumed)]) == 130
    assert not (resumed / "table.md").exists()
    monkeypatch.setattr(loop, "save_progress", plain)
    capsys.readouterr()
    assert cli.main([*arguments, str(resumed)]) == 0
    again = capsys.readouterr()
    assert "1 of 3 runs are left" in again.err
    assert "continues after task 2" in again.err
    assert again.err.count("already finished") == 2

    def numbers(folder):
        summary = json.loads((folder / "summary.json").read_text())
        names = ("transfer", "avg", "last", "forgetting", "trainable_parameters")
        return {label: [values[name] for name in names] for label, values in summary["methods"].items()}

    assert numbers(resumed) == numbers(whole)
    table = again.out.splitlines()
    assert [line.split()[0] for line in table[3:6]] == ["zero-shot", "lora", "random-a"]
    for name in ("table.md", "comparison.csv", "metrics.csv", "summary.json", "matrices.png", "last-transfer.png",
                 "forgetting.png", "capacity.png", "accuracy-lora.png"):  # fmt: skip
        assert (resumed / name).stat().st_size > 100, name


def test_estimates_count_what_is_left(tiny, tmp_path):
    chosen = comparison(tiny, methods=["lora", "joint"], budget="small", out=str(tmp_path))
    pairs = chosen.config.pairs()
    cheap = estimate(chosen.config, chosen.workload, [pair for pair in pairs if pair[0] == "zero-shot"])
    everything = estimate(chosen.config, chosen.workload, pairs)
    assert 0 < cheap.total < everything.total
    assert cheap.total == pytest.approx(cheap.evaluation * (1 + 2 * 9 / 4))  # one of all tasks, 18 of one of four
    assert everything.step > 0
    assert str(everything).startswith("about ")
    run_benchmark(chosen.config, console=lambda event: None, workload=chosen.workload)
    assert unfinished(chosen.config) == []
    assert "all 3 runs are finished" in announcement(chosen.config, chosen.workload)


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return BertModel(config, add_pooling_layer=False)


def pair():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from keeplora.tasks.clip_b16 import ImageTextEncoder

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return ImageTextEncoder(CLIPVisionModelWithProjection(config), bert(), torch.zeros(32, 512), torch.zeros(512), 0.0)


@pytest.mark.parametrize(("name", "model"), [("embedded", tiny_workload.model), ("minilm", bert), ("clip-b16", pair)])
def test_every_shipped_setting_is_accepted_by_its_method(name, model):
    assert name in shipped_comparisons()
    file = Path(cli.__file__).parent / "compare" / "settings" / f"{name}.toml"
    values = tomllib.loads(file.read_text())
    assert set(values["budget"]) == set(BUDGETS)
    sections = values["method"]
    assert set(values["groups"]["ablations"]) <= set(sections)
    for label, section in sections.items():
        own = {k: v for k, v in section.items() if k != "like"}
        settings = {**sections.get(section.get("like"), {}), **own}
        method = settings.pop("method", section.get("like", label))
        assert settings.pop("learning_rate") > 0
        settings.pop("weight_decay", None)
        create(method, model(), settings)


def test_the_ablations_are_those_that_were_promised():
    file = Path(cli.__file__).parent / "compare" / "settings" / "embedded.toml"
    values = tomllib.loads(file.read_text())
    changes = {label: {k: v for k, v in values["method"][label].items() if k != "like"}
               for label in values["groups"]["ablations"] if label != "keeplora"}  # fmt: skip
    assert changes["no-weight-basis"] == {"weight_energy": 0.0}
    assert changes["no-feature-basis"] == {"feature_energy": 0.0}
    assert changes["random-a"] == {"directions": "random"}
    assert changes["output-side"] == {"weight_side": "output"}
    assert changes["slot-mean"]["feature_statistic"] == "slot_mean"
    assert changes["trained-a"] == {"train_a": True}
    assert changes["unbalanced"] == {"balance": False}
    assert changes["feature-0.95"] == {"feature_energy": 0.95}
    assert [changes[f"weight-{e}"] for e in ("0.2", "0.5", "0.85")] == [{"weight_energy": e} for e in (0.2, 0.5, 0.85)]
    assert changes["gradient-features"]["feature_source"] == "gradients"
    assert [changes[f"gamma-{g}"]["depth_scale"]["vision"] for g in ("0", "0.2", "0.5")] == [0.0, 0.2, 0.5]
    assert METHODS["keeplora"].defaults["depth_scale"] == 1.0  # γ = 1


def test_damaged_results_are_told_all_at_once_and_nobody_is_told_to_delete_them(tmp_path):
    config = config_of(tmp_path)
    keep(config, [record_of(label, seed) for label, seed in config.pairs()])
    assert unfinished(config) == []
    for label, seed, text in (("lora", 1, "{"), ("keeplora", 0, "[]")):
        (run_folder(tmp_path, label, seed) / "result.json").write_text(text)
    for ask in (unfinished, read_records):
        with pytest.raises(StateError, match=r"2 results of .*\n.*keeplora/seed-0.*\n.*lora/seed-1") as refused:
            ask(config)
        assert "Move it elsewhere" in str(refused.value)
        assert not re.search(r"\b[Dd]elete", str(refused.value))
    for label, seed in (("lora", 1), ("keeplora", 0)):
        (run_folder(tmp_path, label, seed) / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"got none of keeplora, seed 0, lora, seed 1"):
        read_records(config)
