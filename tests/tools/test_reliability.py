"""The reliability trials: each must see the fault it is there for."""

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import keeplora
from keeplora.methods import saved as saving
from keeplora.methods import state as states
from keeplora.methods.state import read_state
from tools.reliability import __main__ as command
from tools.reliability import children, disk, hostile, kills, memory, mutations, ranks, writers
from tools.reliability.subjects import fingerprint, learned, pretrained, same, same_values, unsound
from tools.reliability.trials import Trial, run

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")


def losses(tries, most=1000):
    return [loss for loss in itertools.islice(tries, most) if loss is not None]


@pytest.fixture(autouse=True)
def _one_kind(monkeypatch):
    """One kind of save, over another: the others are as long."""
    monkeypatch.setattr(kills, "savings", lambda plain=kills.savings: plain()[:1])
    monkeypatch.setattr(disk, "savings", kills.savings)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody cuts the power here


def write_over(path, state, store=None):
    """As write_state, but in place."""
    os.makedirs(path, exist_ok=True)
    file = Path(path) / "tensors-1.safetensors"
    file.unlink(missing_ok=True)
    digest = states.write_tensors(file, state.tensors)
    header = {
        "format": states.FORMAT, "schema": states.SCHEMA, "meta": state.meta,
        "files": {file.name: {"sha256": digest, "tensors": [*state.tensors]}},
    }  # fmt: skip
    with open(os.path.join(path, "state.json"), "w") as file:
        json.dump(header, file)


@pytest.mark.parametrize("trial", [kills.at_every_write, disk.full_at_every_write, disk.failing_at_every_operation])
def test_a_save_in_place_is_seen(tmp_path, monkeypatch, trial):
    monkeypatch.setattr(saving, "write_state", write_over)
    assert losses(trial(tmp_path, random.Random(0)))


def test_every_file_operation_is_interrupted(tmp_path):
    tries = list(kills.at_every_write(tmp_path, random.Random(0)))
    assert tries == [None] * len(tries)
    assert len(tries) >= 20  # lock, two files written, flushed and renamed, the folder flushed, one deleted


def test_a_full_disk_that_is_a_bare_error_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "write_json", lambda path, value: path.write_text(json.dumps(value)))
    assert any("exit code" in loss for loss in losses(disk.full_at_every_write(tmp_path, random.Random(0))))


class AtOnce(random.Random):
    """Draws that let a killed run go on to its end at once."""

    def random(self):
        return 0.05


def test_killed_runs_that_give_other_figures_are_seen(tmp_path, monkeypatch):
    assert losses(kills.runs(tmp_path / "right", AtOnce(0)), 1) == []
    monkeypatch.setattr(kills, "_figures", lambda record: random.random())
    assert losses(kills.runs(tmp_path / "wrong", AtOnce(0)), 1)


def test_writers_that_delete_each_others_files_are_seen(tmp_path, monkeypatch):
    assert losses(writers.together(tmp_path, random.Random(0)), writers.WRITERS * writers.SAVES) == []
    monkeypatch.setattr(saving, "write_state", write_over)
    assert losses(writers.together(tmp_path, random.Random(0)), 3 * writers.WRITERS * writers.SAVES)


def test_ranks_that_find_something_else_are_seen(tmp_path, monkeypatch):
    assert losses(ranks.against_one(tmp_path / "right", random.Random(0)), 1) == []
    monkeypatch.setattr(keeplora, "load", lambda folder, model: learned(tasks=2))
    assert losses(ranks.against_one(tmp_path / "wrong", random.Random(0)), 1)


def test_a_rank_that_goes_on_is_seen(tmp_path, monkeypatch):
    assert losses(ranks.one_ends(tmp_path / "right", random.Random(0)), 1) == []
    monkeypatch.setattr(ranks, "SOON", 0.05)
    monkeypatch.setattr(ranks, "_train", lambda method, share: time.sleep(0.3))
    assert "went on" in losses(ranks.one_ends(tmp_path / "wrong", random.Random(0)), 1)[0]


def test_a_leak_is_seen(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(memory, "TASKS", 21)
    monkeypatch.setattr(memory, "learn", lambda method, number: kept.append(torch.zeros(1)))
    assert losses(memory.fifty_tasks(tmp_path, random.Random(0))) == []  # less than what a task may keep
    monkeypatch.setattr(memory, "KEPT", 0)
    assert any("more tensors" in loss for loss in losses(memory.fifty_tasks(tmp_path, random.Random(0))))


# Hostile files


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    method = learned()
    folder = tmp_path_factory.mktemp("saved")
    method.save(folder)
    return folder, method.live_state()


def test_what_was_saved_is_accepted(original):
    folder, saved = original
    assert hostile.judged(folder, saved, signed=False) is None
    assert hostile.judged(folder, saved, signed=True) is None


def accept(change):
    """A package that takes whatever it is given."""

    def load(path, model):
        method = learned()
        change(method)
        return method

    return load


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda method: setattr(method, "tasks_learned", 7), "not what was saved"),
        (lambda method: method.slots[0].weight.data.fill_(float("nan")), "not finite"),
    ],
)
def test_a_wrong_accept_is_seen(original, monkeypatch, change, wrong):
    monkeypatch.setattr(keeplora, "load", accept(change))
    assert wrong in hostile.judged(*original, signed=False)


def refuse(error, touch=lambda model: None):
    def load(path, model):
        touch(model)
        raise error

    return load


@pytest.mark.parametrize(
    ("load", "wrong"),
    [
        (refuse(KeyError("x")), "KeyError"),
        (refuse(MemoryError()), "MemoryError"),
        (refuse(states.StateError("one\ntwo")), "not a sentence"),
        (refuse(states.StateError("no"), lambda model: model.append(torch.nn.ReLU())), "changed the model"),
        (refuse(states.StateError("no"), lambda model: model.requires_grad_(False)), "changed the model"),
    ],
)
def test_a_wrong_refusal_is_seen(original, monkeypatch, load, wrong):
    monkeypatch.setattr(keeplora, "load", load)
    assert wrong in hostile.judged(*original, signed=False)


def test_a_hang_and_a_crash_are_seen(original, monkeypatch, tmp_path):
    monkeypatch.setattr(hostile, "SECONDS", 1)
    monkeypatch.setattr(hostile, "BATCH", 1)
    monkeypatch.setattr(keeplora, "load", lambda path, model: signal.pause())
    tries = hostile._batches(tmp_path, random.Random(0), lambda folder: ("it", hostile.judged(*original, signed=False)))
    assert next(tries) == "it: hangs"
    crashing = hostile._batches(tmp_path, random.Random(0), lambda folder: children.die())
    assert "crash (exit code -9)" in next(crashing)


def test_no_two_batches_try_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(hostile, "BATCH", 2)
    numbers = random.Random(0)
    tries = hostile._batches(tmp_path, numbers, lambda folder: ("it", f"{numbers.getrandbits(64):x}"))
    assert len(set(itertools.islice(tries, 8))) == 8


def test_mutations_change_something(original):
    folder, saved = original
    numbers = random.Random(0)
    text = (folder / "state.json").read_bytes()
    for mutate in (mutations.mutated_bytes, mutations.mutated_json):
        changed = [mutate(text, numbers) for _ in range(200)]
        assert sum(data == text for _, data in changed) < 20
        assert len({name.split()[0] for name, _ in changed}) >= 5
    assert [same(read_state(folder), saved), same_values({"a": 1}, {"a": 2}), unsound(learned())] == [True, False, ""]
    assert fingerprint(pretrained()) == fingerprint(pretrained())


# Time and table


def test_the_command_counts_and_fails_where_something_is_lost(tmp_path, monkeypatch, capsys):
    def tries(folder, numbers):
        yield None
        yield "gone"

    right = Trial("right", lambda folder, numbers: iter([None] * 3), whole=True)
    monkeypatch.setattr(command, "TRIALS", [right, Trial("wrong", tries, whole=True)])
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    assert command.END in PAGE.partition(command.BEGIN)[2]
    options = ["--minutes", "0", "--place", str(tmp_path), "--json", str(out), "--page", str(page), "--seed", "3"]
    assert command.main(options) == 1
    shown = capsys.readouterr()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{command.END}\nafter\n")
    assert "old" not in text
    assert "| wrong | 2 | 1 | 0 |" in text
    assert "--minutes 0 --seed 3" in text
    assert "| wrong | 2 | 1 | 0 |" in shown.out
    assert "1 x wrong: gone" in shown.err
    assert [outcome["tries"] for outcome in json.loads(out.read_text())["outcomes"]] == [3, 2]
    assert command.main(["--minutes", "0", "--place", str(tmp_path), "--only", "right"]) == 0


def test_draws_follow_from_the_seed(tmp_path):
    drawn = []
    trial = Trial("draws", lambda folder, numbers: iter([drawn.append(numbers.random())]))
    for seed in (1, 1, 2):
        run([trial], 0, seed, place=tmp_path, tell=lambda text: None)
    assert drawn[0] == drawn[1] != drawn[2]
