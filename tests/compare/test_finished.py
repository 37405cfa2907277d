"""A finished folder is printed again without its data and model, as long as what they are made of is as it was."""

import json
from importlib import metadata

import pytest
from made_folders import LABELS, config_of, keep, record_of

from keeplora import _made_of
from keeplora.compare import runs
from keeplora.compare.runs import is_finished, run_benchmark
from keeplora.methods.settings import ConfigError
from keeplora.tasks.catalog import source
from keeplora.tasks.minilm import workload as minilm
from keeplora.train.events import silent
from keeplora.train.record import RESULT_FILE, run_folder


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A folder with every result, whose benchmark is made of "these files"."""
    config = config_of(tmp_path, benchmark="tiny_workload:workload", workers=0)
    keep(config, [record_of(label, seed) for seed in config.seeds for label in LABELS])
    monkeypatch.setattr(runs, "source_of", lambda config: "these files")
    record(config, source="these files")
    return config


def record(config, **values):
    file = f"{config.out}/config.json"
    with open(file) as opened:
        saved = json.load(opened)
    with open(file, "w") as opened:
        json.dump({**saved, **values}, opened)


def not_loaded(*_):
    raise AssertionError("nothing is to be loaded")


def test_nothing_is_loaded_where_nothing_has_changed(finished, monkeypatch):
    monkeypatch.setattr(runs, "configured_workload", not_loaded)
    events = []
    assert is_finished(finished)
    assert [record.label for record in run_benchmark(finished, console=events.append)] == LABELS * 2
    assert [event.text for event in events] == ["already finished"] * 6
    assert is_finished(finished), "the folder says so still"


@pytest.mark.parametrize("recorded", [{"source": "other files"}, {"source": None}, {"data": 7}])
def test_data_are_read_where_they_may_have_changed(finished, recorded):
    record(finished, **recorded)
    assert not is_finished(finished)
    with pytest.raises(ConfigError, match="the data changed"):
        run_benchmark(finished, console=silent)  # those of the tiny workload are not the recorded ones


def test_where_only_loading_tells_data_are_read(finished, monkeypatch):
    monkeypatch.undo()
    record(finished, source=None)
    assert not is_finished(finished)


def test_a_run_that_is_left_needs_the_workload(finished, monkeypatch):
    (run_folder(finished.out, "lora", 1) / RESULT_FILE).unlink()
    assert not is_finished(finished)
    monkeypatch.setattr(runs, "configured_workload", not_loaded)
    with pytest.raises(AssertionError, match="nothing is to be loaded"):
        run_benchmark(finished, console=silent)


def test_other_settings_are_refused_without_loading(finished, monkeypatch):
    monkeypatch.setattr(runs, "configured_workload", not_loaded)
    with pytest.raises(ConfigError, match="batch_size changed"):
        run_benchmark(config_of(finished.out, benchmark="tiny_workload:workload", workers=0, batch_size=3))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Three files that stand for the package's, and the encoder's folder of another."""
    for name in ("tasks/embedded/data/model.safetensors", "tasks/embedded/data/digits.npz", "_version.py"):
        (tmp_path / "keeplora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "keeplora" / name).write_text(name)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "model.safetensors").write_text("weights")
    monkeypatch.setattr(_made_of, "_PACKAGE", tmp_path / "keeplora")
    monkeypatch.setattr(minilm, "encoder_folder", lambda: tmp_path / "encoder")
    monkeypatch.setattr(minilm, "NEEDS", {"torch": "there"})
    return tmp_path


@pytest.mark.parametrize("name", ["tasks/embedded/data/model.safetensors", "tasks/embedded/data/digits.npz",
                                  "_version.py", "tasks/embedded/data/new.npz"])  # fmt: skip
def test_a_changed_file_of_the_package_is_noticed(package, name):
    before = source("embedded")
    assert before == source("embedded") == source("embedded-small")
    (package / "keeplora" / name).write_text("other")
    assert source("embedded") != before


def test_compiled_files_decide_no_data(package):
    before = source("embedded")
    (package / "keeplora" / "__pycache__").mkdir()
    (package / "keeplora" / "__pycache__" / "a.pyc").write_text("")
    (package / "keeplora" / "_cpu.so").write_text("")
    assert source("embedded") == before


@pytest.mark.parametrize("distribution", ["torch", "open_clip_torch", "numpy", "transformers"])
def test_another_version_is_noticed(package, monkeypatch, distribution):
    before, installed = source("embedded"), metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0" if name == distribution else installed(name))
    assert source("embedded") != before


def test_weights_outside_of_the_package_are_noticed(package):
    embedded, text = source("embedded"), source("minilm")
    (package / "encoder" / "model.safetensors").write_text("others")
    assert source("embedded") == embedded
    assert source("minilm") != text


def test_where_a_package_is_missing_only_loading_tells(package, monkeypatch):
    monkeypatch.setattr(minilm, "NEEDS", {"no_such_package": "pip install it"})
    assert source("minilm") is None
    assert source("embedded") is not None


def test_of_a_function_of_ones_own_nothing_is_known():
    assert source("tiny_workload:workload") is None
