"""Evaluations that are looked up: where all is the same and nowhere else, with the numbers of computed ones."""

import json
from dataclasses import replace

import pytest
import tiny_workload
import torch
from train.test_loop import config_of, interrupt_at, numbers

from keeplora.methods import create
from keeplora.train.evaluated import Evaluations, evaluations_folder
from keeplora.train.loop import run_one


def counted(workload):
    """The workload, and a list that grows with each evaluation it computes."""
    calls, plain = [], workload.correct

    def correct(model, task, split, size):
        calls.append((task, split))
        return plain(model, task, split, size)

    workload.correct = correct
    workload.accuracy = lambda *asked: correct(*asked).float().mean().item()
    return workload, calls


def plain(record):
    return {name: value for name, value in numbers(record).items() if name not in ("reused", "label", "seed")}


@pytest.mark.parametrize("split", ["test", "both"])
def test_the_untouched_model_is_evaluated_once_whatever_the_seeds(tmp_path, split):
    workload, calls = counted(tiny_workload.workload("cpu"))
    config = config_of(evaluate_on=split)
    alone = run_one(config, workload, "zero-shot", 0)
    calls.clear()
    first, second = (run_one(config, workload, "zero-shot", seed, evaluations=tmp_path) for seed in (0, 1))
    once = 4 if split == "test" else 7  # three tasks and the witness; three validation splits besides
    assert len([call for call in calls if call != (None, "test")]) == once - 1  # by the witness inference is timed, too
    assert (first.reused, second.reused) == ([0, 0, 0], [once, 0, 0])
    assert plain(first) == plain(second) == plain(alone)
    assert len(list(tmp_path.rglob("*.json"))) == once


def test_a_run_that_is_repeated_or_goes_on_finds_what_it_found(tmp_path):
    config = config_of()
    workload, calls = counted(tiny_workload.workload("cpu"))
    straight = run_one(config, workload, "keeplora", 3)
    with pytest.raises(KeyboardInterrupt):
        run_one(config, workload, "keeplora", 3, folder=tmp_path / "a", evaluations=tmp_path / "known",
                listener=interrupt_at(1, 2))  # fmt: skip
    again = run_one(config, workload, "keeplora", 3, folder=tmp_path / "b", evaluations=tmp_path / "known")
    assert again.reused == [4, 0, 0]
    calls.clear()
    third = run_one(config, workload, "keeplora", 3, folder=tmp_path / "c", evaluations=tmp_path / "known")
    assert third.reused == [4, 4, 4]
    assert set(calls) == {(None, "test")}  # inference is timed
    assert plain(straight) == plain(again) == plain(third)
    other = run_one(config, workload, "keeplora", 4, evaluations=tmp_path / "known")
    assert other.reused == [0, 0, 0]


def with_first_task(workload, **changes):
    workload._tasks[0] = replace(workload._tasks[0], **changes)
    return workload


def other_label(workload):
    test = workload.task(0).test
    return with_first_task(workload, test=replace(test, labels=(test.labels + 1) % 3))


def other_texts(workload):
    return with_first_task(workload, tokens=workload.task(0).tokens.flip(0))


def other_pixel(workload):
    images = workload.task(0).test.images.clone()
    images[-1, 0, 0, 0] ^= 1
    return with_first_task(workload, test=replace(workload.task(0).test, images=images))


CHANGES = {
    "a weight": lambda method, work, config: (changed(method, 1e-6), work, config),
    "a buffer": lambda method, work, config: (buffered(method), work, config),
    "a state of the method": lambda method, work, config: (learned(method), work, config),
    "dtype": lambda method, work, config: (halved(method), work, config),
    "a label": lambda method, work, config: (method, other_label(work), config),
    "a pixel": lambda method, work, config: (method, other_pixel(work), config),
    "fewer items": lambda method, work, config: (method, with_first_task(work, **thinned(work)), config),
    "a template": lambda method, work, config: (method, other_texts(work), config),
    "precision": lambda method, work, config: (method, work, replace(config, precision="bf16")),
    "batch size": lambda method, work, config: (method, work, replace(config, evaluation_batch_size=7)),
    "threads": lambda method, work, config: (method, work, replace(config, threads=2)),
}  # fmt: skip


def changed(method, by):
    with torch.no_grad():
        next(method.model.parameters()).view(-1)[-1] += by
    return method


def buffered(method):
    method.model.register_buffer("late", torch.zeros(1), persistent=False)
    return method


def learned(method):
    method.tasks_learned += 1
    return method


def halved(method):
    method.model.to(torch.float64)
    return method


def thinned(work):
    return {"test": work.task(0).thinned(8).test}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_an_evaluation_is_in_its_key(tmp_path, change):
    def evaluations(method, work, config):
        made = Evaluations(config, work, tmp_path)
        made.begin(method)
        return made

    def fresh():
        return create("zero-shot", tiny_workload.model()), tiny_workload.workload("cpu"), config_of(precision="fp32")

    with torch.no_grad():
        evaluations(*fresh()).accuracy(0, "test")
        same = evaluations(*fresh())
        same.accuracy(0, "test")
        same.accuracy(0, "validation")
        same.accuracy(1, "test")
        assert same.reused == 1
        other = evaluations(*CHANGES[change](*fresh()))
        other.workload.accuracy = lambda *asked: 0.125  # the images of this workload are float32, whatever the weights
        assert other.accuracy(0, "test") == 0.125
        assert other.reused == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"value": 2}', "other key", "not a share"])
def test_a_file_that_cannot_be_used_is_told_and_written_anew(tmp_path, damage):
    told = []

    def evaluations():
        made = Evaluations(config_of(), tiny_workload.workload("cpu"), tmp_path, told.append)
        made.begin(create("zero-shot", tiny_workload.model()))
        return made

    share = evaluations().accuracy(1, "test")
    [file] = tmp_path.rglob("*.json")
    whole = json.loads(file.read_text())
    other = {"other key": {**whole, "key": {}}, "not a share": {**whole, "value": 1.5}}
    file.write_text(json.dumps(other[damage]) if damage in other else damage)
    again = evaluations()
    assert (again.accuracy(1, "test"), again.reused) == (share, 0)
    assert str(file) in told[0]
    assert evaluations().accuracy(1, "test") == share
    assert len(told) == 1


def test_the_setting_turns_it_off(tmp_path):
    assert evaluations_folder(config_of(out=str(tmp_path))) == tmp_path / "evaluations"
    assert evaluations_folder(config_of(reuse_evaluations=False)) is None
    assert config_of(reuse_evaluations=False).identity("lora", 0) == config_of().identity("lora", 0)
