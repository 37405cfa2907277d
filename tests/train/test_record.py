"""What counts as a finished run, and whose runs may stand in one folder."""

import json
import math

import pytest

from keeplora._files import BusyError, one_writer
from keeplora.compare.runs import run_benchmark
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import State, StateError
from keeplora.train import record as records
from keeplora.train.config import parse_config
from keeplora.train.items import packed
from keeplora.train.record import RunRecord, claim_folder, load_progress, load_result, save_progress, save_result

CONFIG = {"benchmark": "tiny_workload:workload", "methods": ["lora"], "epochs": 1, "workers": 0, "tensorboard": False}
IDENTITY = {"seed": 0}


def run(tasks=2, finished=2, **changes):
    figures = {
        "accuracy": [[0.5] * tasks for _ in range(finished)],
        "witness": [0.25] * finished,
        "loss": [1.0] * finished,
        "train_seconds": [1.0] * finished,
        "switch_seconds": [0.5] * finished,
        "evaluate_seconds": [0.5] * finished,
        "certificates": [None] * finished,
    }
    return RunRecord("lora", 0, [f"t{i}" for i in range(tasks)], **figures | changes)


DAMAGED = {
    "accuracy": [[0.5, 0.5], [0.5, math.nan]],
    "witness": [0.25, math.inf],
    "loss": [1.0, math.nan],
    "train_seconds": [1.0, None],
    "inference_seconds": ["1", "2"],
    "evaluate_seconds": [0.5],
    "certificates": [],
}


@pytest.mark.parametrize("name", [*DAMAGED, "a percentage", "a short row", "a number"])
def test_figures_that_are_missing_or_no_numbers_are_no_result(tmp_path, name):
    changes = {
        "a percentage": {"accuracy": [[0.5, 50.0]] * 2}, "a short row": {"accuracy": [[0.5]] * 2},
        "a number": {"loss": 1.0},
    }.get(name) or {name: DAMAGED[name]}  # fmt: skip
    save_result(tmp_path, run(), IDENTITY, keep_state=True)
    save_progress(tmp_path, run(finished=1), State(), IDENTITY)
    assert load_result(tmp_path, IDENTITY) == run()
    assert load_progress(tmp_path, IDENTITY)[0] == run(finished=1)

    file = tmp_path / "result.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "record": saved["record"] | changes}))
    with pytest.raises(StateError, match=f"load_result.*({next(iter(changes))}|record|NaN|Infinity)"):
        load_result(tmp_path, IDENTITY)


ITEMS = {"accuracy": [[0.5, 0.75]] * 2, "items": [4, 8], "validation": [[None, 0.5], [0.5, 0.5]],
         "correct": [[packed([1, 0, 1, 0]), packed([1, 1, 0] * 2 + [1, 1])]] * 2}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("items", []), ("items", [4, 9]), ("items", [4, 16]), ("items", [4, 1]), ("items", [4, "8"]),
        ("validation", [[None, 0.5]]), ("validation", [[0.5]] * 2), ("validation", [[None, 50.0]] * 2),
        ("correct", []), ("correct", [["oA==", "oA=="]] * 2), ("correct", [["oA==", "?"]] * 2),
        ("correct", [["oA==", None]] * 2), ("accuracy", [[0.5, 0.5]] * 2),
    ],
)  # fmt: skip
def test_items_that_do_not_fit_the_accuracies_are_no_result(tmp_path, name, value):
    save_result(tmp_path, run(**ITEMS), IDENTITY, keep_state=True)
    assert load_result(tmp_path, IDENTITY) == run(**ITEMS)
    assert load_result(tmp_path, IDENTITY).right(1, 1).tolist() == [True, True, False, True, True, False, True, True]
    save_result(tmp_path, run(**ITEMS | {name: value}), IDENTITY, keep_state=True)
    with pytest.raises(StateError, match=f"load_result.*({name}|correct)"):
        load_result(tmp_path, IDENTITY)


def test_a_run_that_diverged_is_a_result(tmp_path):
    save_result(tmp_path, run(finished=1, failed="the loss was nan"), IDENTITY, keep_state=False)
    assert load_result(tmp_path, IDENTITY).failed == "the loss was nan"


def test_a_run_that_is_not_through_all_tasks_is_no_result(tmp_path):
    save_result(tmp_path, run(finished=1), IDENTITY, keep_state=True)
    with pytest.raises(StateError, match="all 2 tasks, got 1"):
        load_result(tmp_path, IDENTITY)


@pytest.mark.parametrize("value", [math.nan, 1.5])
def test_a_run_whose_accuracy_is_none_stops(tmp_path, value, monkeypatch):
    import tiny_workload

    from keeplora.train.loop import run_one

    workload = tiny_workload.workload("cpu")
    monkeypatch.setattr(workload, "accuracy", lambda *_: value)
    with pytest.raises(ValueError, match=f"accuracy must be from 0 to 1, got {value}"):
        run_one(parse_config(CONFIG), workload, "lora", 0, folder=tmp_path)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("part", ["torch", "keeplora"])
def test_a_folder_of_another_version_is_refused_or_accepted_by_name(tmp_path, monkeypatch, part):
    config = parse_config({**CONFIG, "out": str(tmp_path)})
    file = tmp_path / "config.json"
    claim_folder(config, "data")
    begun = file.read_text()
    assert json.loads(begun)["versions"] == [records.versions()]
    claim_folder(config, "data")
    monkeypatch.setattr(records, "versions", lambda plain=records.versions: plain() | {part: "0.0.9"})
    with pytest.raises(ConfigError, match=rf"{part} 0\.0\.9.*--accept-versions"):
        claim_folder(config, "data")
    assert file.read_text() == begun
    claim_folder(config, "data", accept_versions=True)
    assert [entry[part] == "0.0.9" for entry in json.loads(file.read_text())["versions"]] == [False, True]
    claim_folder(config, "data")  # accepted once is accepted


@pytest.mark.parametrize("versions", ["none", [], [3], {"torch": "1"}])
def test_versions_that_are_none_are_unknown_ones(tmp_path, versions):
    config = parse_config({**CONFIG, "out": str(tmp_path)})
    claim_folder(config, "data")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "versions": versions}))
    with pytest.raises(ConfigError, match="accept-versions"):
        claim_folder(config, "data")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    config = parse_config({**CONFIG, "out": str(tmp_path), "methods": ["zero-shot"]})
    with one_writer(tmp_path), pytest.raises(BusyError, match=str(tmp_path)):
        run_benchmark(config, console=lambda event: None)
    assert not (tmp_path / "config.json").exists()
    [record] = run_benchmark(config, console=lambda event: None)
    assert record.done
    assert json.loads((tmp_path / "runs/zero-shot/seed-0/result.json").read_text())["versions"] == records.versions()
