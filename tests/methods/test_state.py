"""Saved states: whole or not at all, checked when read."""

import json
import threading

import pytest
import torch

from keeplora._files import LOCK, write_json
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


@pytest.mark.parametrize("failing", ["save_file", "write_json"])
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
        ({"tensors": {"file": "../elsewhere.safetensors", "sha256": "0"}}, "must name its tensor file"),
        ({"tensors": None}, "must name its tensor file"),
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
