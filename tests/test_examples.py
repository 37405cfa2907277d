"""The four training loops of examples/ run, learn something, and learn the same."""

import importlib

import pytest

LOOPS = ["plain_pytorch", "with_accelerate", "with_trainer", "with_lightning"]


@pytest.fixture(scope="module")
def rows():
    return {name: importlib.import_module(f"examples.{name}").learn() for name in LOOPS}


def test_the_plain_loop_learns_both_tasks(rows):
    zero_shot, first, last = rows["plain_pytorch"]
    assert first[0] > zero_shot[0] + 10
    assert last[1] > zero_shot[1] + 5
    assert last[0] > zero_shot[0] + 10  # and keeps the first


@pytest.mark.parametrize("name", LOOPS[1:])
def test_the_other_loops_give_the_same_numbers(rows, name):
    """Same batches, same optimizer, same start: what is left is nothing, so no tolerance."""
    assert rows[name] == rows["plain_pytorch"]


def test_the_table_names_every_row(rows):
    from examples.small_tasks import table

    assert [line.split()[0] for line in table(rows["plain_pytorch"]).splitlines()] == [
        "accuracy,", "zero-shot", "after", "after",
    ]  # fmt: skip
