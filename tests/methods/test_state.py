"""Saved states: whole or not at all, checked when read."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from keeplora._files import LOCK, write_json
from keeplora.methods import state as states
from keeplora.methods.state import SCHEMA, State, StateError, has_state, read_state, write_state


def example(value=0.0):
    wide = torch.arange(12.0).view(3, 4)
    return State(
        tensors={
            "float": torch.full((2, 3), value), "half": torch.randn(4).bfloat16(), "count": torch.arange(5),
            "empty": torch.zeros(0, 4), "turned": wide.T, "part": wide[1:, :2], "twice": wide, "again": wide,
        },
        meta={"task": 3, "names": ["ε", "b"], "nested": {"x": None}},
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    state = example(0.1)
    assert not has_state(tmp_path)
    write_state(tmp_path, state)
    assert has_state(tmp_path)
    again = read_state(tmp_path)
    assert again.meta == state.meta
    assert list(again.tensors) == list(state.tensors) or set(again.tensors) == set(state.tensors)
    for name, tensor in state.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor), name


def test_a_new_state_replaces_the_old_one_and_its_file(tmp_path):
    write_state(tmp_path, example(1.0))
    write_state(tmp_path, example(2.0))
    assert read_state(tmp_path).tensors["float"][0, 0] == 2.0
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.name != LOCK) == [".json", ".safetensors"]


@pytest.mark.parametrize("failing", ["write_tensors", "write_json"])
def test_a_crash_while_writing_leaves_the_old_state(tmp_path, monkeypatch, failing):
    write_state(tmp_path, example(1.0))

    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(f"keeplora.methods.state.{failing}", crash)
    with pytest.raises(OSError, match="disk full"):
        write_state(tmp_path, example(2.0))
    assert read_state(tmp_path).tensors["float"][0, 0] == 1.0
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_a_reader_never_meets_a_mix(tmp_path):
    write_state(tmp_path, State({"x": torch.full((1000,), 0.0)}, {"value": 0.0}))
    done = threading.Event()

    def write():
        for value in range(1, 60):
            write_state(tmp_path, State({"x": torch.full((1000,), float(value))}, {"value": float(value)}))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or reads < 5:
        state = read_state(tmp_path)
        assert (state.tensors["x"] == state.meta["value"]).all()
        reads += 1
    writer.join()


def test_meta_that_is_not_json_is_refused_and_nothing_changes(tmp_path):
    write_state(tmp_path, example(1.0))
    with pytest.raises(ValueError, match="strict JSON"):
        write_state(tmp_path, State({}, {"x": float("nan")}))
    with pytest.raises(TypeError, match="strict JSON"):
        write_state(tmp_path, State({}, {"x": torch.zeros(1)}))
    assert read_state(tmp_path).tensors["float"][0, 0] == 1.0


def test_a_damaged_tensor_file_is_named(tmp_path):
    write_state(tmp_path, example())
    [file] = tmp_path.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(StateError, match=rf"{file.name} must have sha256"):
        read_state(tmp_path)
    file.unlink()
    with pytest.raises(StateError, match=rf"{file.name} must exist"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": SCHEMA + 1}, "newer keeplora: upgrade"),
        ({"schema": SCHEMA - 1}, f"must have schema {SCHEMA}, got {SCHEMA - 1}"),
        ({"schema": "old"}, f"must have schema {SCHEMA}, got 'old'"),
        ({"format": "pickle"}, "not a keeplora state"),
        ({"files": {"../elsewhere.safetensors": {"sha256": "0", "tensors": []}}}, "must name its tensor files"),
        ({"files": {n: {"sha256": "0", "tensors": ["x"]} for n in "ab"}}, "must name its tensor files"),
        ({"files": {"a": {"sha256": "0", "tensors": 3}}}, "must name its tensor files"),
        ({"files": None}, "must name its tensor files"),
    ],
)
def test_other_schemas_are_refused(tmp_path, change, message):
    write_state(tmp_path, example())
    file = tmp_path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StateError, match=message):
        read_state(tmp_path)


def test_missing_and_broken_headers(tmp_path):
    with pytest.raises(StateError, match=r"state.json must exist"):
        read_state(tmp_path / "nothing")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(StateError, match="must be JSON"):
        read_state(tmp_path)


def test_json_without_nan(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a" / "b.json", {"x": float("inf")})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}


# Lasting tensors


def lasting(count, value=0.0):
    """A state of ``count`` lasting tensors and one that is not; their files are told apart by their sizes."""
    tensors = {f"q{i}": torch.full((2000,), float(i)) for i in range(count)}
    return State({**tensors, "adapter": torch.full((10,), value)}, {"value": value}, frozenset(tensors))


def grown(state, value):
    """The next state: one more lasting tensor, and the other one is new."""
    name = f"q{len(state.tensors) - 1}"
    tensors = {**state.tensors, name: torch.randn(2000), "adapter": torch.full((10,), value)}
    return State(tensors, {"value": value}, state.lasting | {name})


def files(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("tensors-*")}


def same(one, other):
    return one.meta == other.meta and all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


def test_what_lasts_is_written_once(tmp_path, monkeypatch):
    first = lasting(3)
    write_state(tmp_path, first)
    [old] = [file for file in files(tmp_path) if (tmp_path / file).stat().st_size > 2000]
    written = []
    plain = states.write_tensors
    monkeypatch.setattr(states, "write_tensors", lambda path, t: (written.extend(t), plain(path, t))[1])
    second = grown(first, 1.0)
    write_state(tmp_path, second)
    assert sorted(written) == ["adapter", "q3"]
    assert old in files(tmp_path)
    assert len(files(tmp_path)) == 3
    again = read_state(tmp_path)
    assert same(again, second)
    written.clear()  # in a new process it is known where they came from
    third = grown(State(again.tensors, again.meta, second.lasting), 2.0)
    write_state(tmp_path, third)
    assert sorted(written) == ["adapter", "q4"]
    assert same(read_state(tmp_path), third)


def test_what_was_written_to_or_damaged_since_is_written_again(tmp_path):
    state = lasting(2)
    write_state(tmp_path, state)
    state.tensors["q1"].add_(1)
    write_state(tmp_path, state)
    assert same(read_state(tmp_path), state)
    for name in files(tmp_path):
        (tmp_path / name).write_bytes(b"damaged")
    write_state(tmp_path, state)
    assert same(read_state(tmp_path), state)


def test_a_file_that_is_mostly_nobodys_goes(tmp_path):
    state = lasting(4)
    write_state(tmp_path / "a", State({**state.tensors, "large": torch.zeros(2**17)}, {}, state.lasting | {"large"}))
    write_state(tmp_path / "a", state)
    assert sum(file.stat().st_size for file in (tmp_path / "a").glob("tensors-*")) < 2**16
    assert same(read_state(tmp_path / "a"), state)


@pytest.mark.parametrize("links", [True, False])
def test_folders_share_a_store_whichever_is_deleted(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    store, state = tmp_path / "store", lasting(3)
    for step in range(4):
        write_state(tmp_path / f"{step}", state, store=store)
        assert same(read_state(tmp_path / f"{step}"), state)
        if step:
            shutil.rmtree(tmp_path / f"{step - 1}")
        if links:
            inodes = {file.stat().st_ino: file.stat().st_size for file in tmp_path.rglob("tensors-*")}
            assert sum(inodes.values()) < 8000 * (3 + step) + 1000 * (2 + step)
        state = grown(state, float(step))
    write_state(tmp_path / "last", lasting(1), store=store)
    assert len(files(store)) == (1 + len(files(tmp_path / "3")) - 1 if links else 1)  # those of "3" stay while it does
    shutil.rmtree(tmp_path / "3")
    write_state(tmp_path / "last", lasting(1), store=store)
    assert len(files(store)) == 1  # nobody needs the others


def test_saving_and_loading_take_no_second_copy(tmp_path):
    """Peak of a process of its own, beside a state of 192 MiB on the disk and in memory."""
    for what, most in (("save", 64), ("load", 192 + 64)):
        done = subprocess.run([sys.executable, "-c", PEAK, what, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < most, what


PEAK = """
import sys, threading, time
import torch
from keeplora.methods.state import State, read_state, write_state

def resident():
    return int(open("/proc/self/statm").read().split()[1]) / 256

def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

what, folder = sys.argv[1:]
state = State({str(i): torch.rand(2**22) for i in range(12)}, {}) if what == "save" else None
write_state(folder + "/small", State({"x": torch.rand(8)}))
read_state(folder + "/small")
before = max(resident(), peak())
write_state(folder, state) if what == "save" else read_state(folder)
print(peak() - before)
"""
