"""FSDP2 on a vision-language model: four processes with some rows each learn three tasks as one process does."""

import json

import pytest
from safetensors.torch import load_file

import keeplora
from tests.processes import found_by
from tests.shared_out_vlm import COUNT, LIVES, TWO, WHOLE, held, life, llava, work
from tests.test_distributed import close, same_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vlm")


@pytest.fixture(scope="module")
def four(folder):
    """What each of four processes found."""
    return found_by(folder, work, COUNT)


@pytest.mark.parametrize("name", LIVES)
def test_three_tasks_are_those_of_one_process(four, name):
    wide = LIVES[name][1] == "float32"
    mine, *others = (found[name] for found in four)
    for other in others:
        assert same_bits(other, mine)
    alone = life(name, llava(LIVES[name][1]), range(COUNT))
    if name in TWO:
        (two, other), wide_ones = (found["two lives"][name] for found in four[:2]), (2e-5, 2e-4, 2e-4)
        assert same_bits(two, other)
        for task, most in enumerate(wide_ones):
            close(two[f"B A, {task}"], alone[f"B A, {task}"], most)
            close(two[f"W, {task}"], alone[f"W, {task}"], 5e-6)
    assert mine["capacity"] == alone["capacity"]
    # After a merge a weight may round to another number of its dtype; what follows then differs by as much
    for task, most in enumerate((2e-5, 2e-4, 2e-4) if wide else (1e-2, 3e-2, 3e-2)):
        close(mine[f"B A, {task}"], alone[f"B A, {task}"], most)
        close(mine[f"W, {task}"], alone[f"W, {task}"], 5e-6 if wide else 5e-3)
    if name in WHOLE:
        assert mine["shares"] == pytest.approx(alone["shares"], rel=1e-4 if wide else 3e-2)
        assert 0 < min(mine["shares"]) < max(mine["shares"]) < 0.99
        assert mine["moved"] == mine["back"] == alone["back"] is True
    learned = [(w - v).norm() / v.norm() for w, v in zip(alone["W, 2"], untouched(LIVES[name][1]), strict=True)]
    assert max(learned) > 1e-3


def untouched(dtype):
    model = llava(dtype)
    return [
        slot.weight.detach() for slot in keeplora.create("lora", model, {"r": 2, "target_modules": "all-linear"}).slots
    ]


@pytest.mark.parametrize("name", LIVES)
def test_what_four_processes_saved_one_or_two_load(four, folder, name):
    alone = keeplora.load(folder / name, llava(LIVES[name][1]))
    mine = held(alone)
    assert len(mine[1]) == (0 if name in WHOLE else 14)
    for found in four:
        assert same_bits(found[name]["held"], mine)
    for found in four[:2]:
        assert same_bits(found["two"][name], mine)


@pytest.mark.parametrize("name", [name for name in LIVES if name not in WHOLE])
def test_an_adapter_that_four_processes_exported_is_that_of_one(four, folder, tmp_path, name):
    """Of an open task after two that are merged; what was merged is told by the inner product with the weights."""
    alone = keeplora.load(folder / name, llava(LIVES[name][1]))
    alone.export_peft(tmp_path, base_model="llava")
    for file in ("adapter_config.json", "README.md"):
        assert (folder / f"{name}-peft" / file).read_text() == (tmp_path / file).read_text()
    mine, theirs = (load_file(at / "adapter_model.safetensors") for at in (tmp_path, folder / f"{name}-peft"))
    assert len(mine) == 2 * 14
    assert same_bits(mine, theirs)
    note, other = (json.loads((at / "keeplora.json").read_text()) for at in (tmp_path, folder / f"{name}-peft"))
    assert other.pop("inner_product") == pytest.approx(note.pop("inner_product"), rel=1e-12)
    assert note == other
