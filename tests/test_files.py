"""What writes files: one writer at a time, names of its own, nothing of others deleted, one sentence where it fails."""

import errno
import json
import multiprocessing
import os
import secrets
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from keeplora import KeepLora, KeepLoraConfig, StateError
from keeplora import _files as files
from keeplora._files import LOCK, BusyError, WriteError, one_writer, staged, write_atomic, write_json
from keeplora.lora import peft_checkpoint
from keeplora.methods import state as states
from keeplora.methods.state import State, read_state, write_state

FORK = multiprocessing.get_context("fork")


def names(folder):
    return sorted(file.name for file in Path(folder).iterdir() if file.name != LOCK)


def value_state(value, size=64):
    return State({"x": torch.full((size,), float(value))}, {"value": value})


def killed(function, *arguments):
    """Run in a process that is killed by the function itself."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dead_process():
    process = FORK.Process(target=int)
    process.start()
    process.join()
    return process.pid


def left_over(path, owner, age=0.0, host=files._HOST):
    """What another process would have left of writing a file."""
    folder = path.with_name(f".{path.name}~{host}~{owner}~{secrets.token_hex(4)}.tmp")
    folder.mkdir()
    (folder / path.name).write_text("half")
    then = time.time() - age
    for place in (folder / path.name, folder):
        os.utime(place, (then, then))
    return folder


# Names


def test_a_temporary_name_is_nobody_elses(tmp_path):
    with staged(tmp_path / "a.json") as first, staged(tmp_path / "a.json") as second:
        assert first.parent != second.parent
        for name in (first.parent.name, second.parent.name):
            assert files._HOST in name
            assert str(os.getpid()) in name
            assert name.startswith(".")


def test_what_killed_processes_left_goes_when_a_file_is_written_there(tmp_path):
    target = tmp_path / "a.json"
    gone = [
        left_over(target, dead_process()),
        left_over(target, os.getpid(), age=4000),
        left_over(target, 1, age=4000, host="another-host"),
        left_over(tmp_path / "b.json", dead_process()),  # another file's
    ]
    kept = [
        left_over(target, os.getpid()),  # of another thread
        left_over(target, dead_process(), host="another-host"),  # who knows what runs there
    ]
    growing = left_over(target, 1, age=4000, host="another-host")
    os.utime(growing / target.name)  # a large file: its folder is old, it is not
    kept.append(growing)
    write_json(target, {})
    assert not any(file.exists() for file in gone)
    assert all(file.exists() for file in kept)


@pytest.mark.parametrize("moment", ["write_tensors", "flush", "write_json"])
def test_a_killed_save_leaves_nothing_behind_the_next(tmp_path, monkeypatch, moment):
    write_state(tmp_path, value_state(1))
    with monkeypatch.context() as patched:
        patched.setattr(states, moment, die)
        killed(write_state, tmp_path, value_state(2))
    assert read_state(tmp_path).meta == {"value": 1}
    for file in tmp_path.glob("tensors-*"):  # one that was named, and whose state never came to be
        os.utime(file, (0, 0))
    write_state(tmp_path, value_state(3))
    assert read_state(tmp_path).meta == {"value": 3}
    assert len(names(tmp_path)) == 2


def test_what_a_killed_save_left_goes_with_a_next_one_that_writes_no_tensors(tmp_path):
    """All that the next save needs may be there already: it writes state.json alone."""
    state = value_state(1)
    state.lasting = frozenset(state.tensors)
    write_state(tmp_path / "a", state, store=tmp_path / "store")
    for folder in ("a", "store"):
        left_over(tmp_path / folder / "tensors.safetensors", dead_process())
    write_state(tmp_path / "a", state, store=tmp_path / "store")
    assert not [*tmp_path.rglob(".*.tmp")]


# Only what is ours


def test_only_the_tensors_of_the_state_before_are_deleted(tmp_path):
    write_state(tmp_path, value_state(1))
    [before] = tmp_path.glob("tensors-*")
    others = [tmp_path / "tensors-of-mine.safetensors", tmp_path / "weights.safetensors", tmp_path / "notes.json"]
    for file in others:
        file.write_text("mine")
    write_state(tmp_path, value_state(2))
    assert not before.exists()
    assert all(file.exists() for file in others)


@pytest.mark.parametrize("named", ["notes.txt", "../outside.txt", "/etc/hostname", 7, None])
def test_a_state_that_names_other_files_makes_no_save_delete_them(tmp_path, named):
    folder, outside = tmp_path / "state", tmp_path / "outside.txt"
    write_state(folder, value_state(1))
    for file in (folder / "notes.txt", outside):
        file.write_text("mine")
    header = json.loads((folder / "state.json").read_text())
    header["files"] = {str(named): next(iter(header["files"].values()))}
    (folder / "state.json").write_text(json.dumps(header))
    write_state(folder, value_state(2))
    assert (folder / "notes.txt").exists()
    assert outside.exists()
    assert read_state(folder).meta == {"value": 2}


@pytest.mark.parametrize("text", ["", "[1]", '{"tensors": 3}', "[" * 100_000, "a pipe"])
def test_a_damaged_state_is_written_over(tmp_path, text):
    if text == "a pipe":
        os.mkfifo(tmp_path / "state.json")
    else:
        tmp_path.joinpath("state.json").write_text(text)
    write_state(tmp_path, value_state(2))
    assert read_state(tmp_path).meta == {"value": 2}


# One writer, many readers


def save_often(folder, seed, ready, times):
    ready.wait()
    for i in range(times):
        write_state(folder, value_state(2 * i + seed))


def test_writers_take_turns_and_readers_meet_whole_states(tmp_path):
    """Values alternate, so that states come back: a tensor file may be deleted and written again while one reads."""
    write_state(tmp_path, value_state(0))
    ready = FORK.Barrier(4)
    writers = [FORK.Process(target=save_often, args=(tmp_path, seed % 2, ready, 8)) for seed in range(3)]
    for writer in writers:
        writer.start()
    ready.wait()
    while any(writer.is_alive() for writer in writers):
        state = read_state(tmp_path)
        assert (state.tensors["x"] == state.meta["value"]).all()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(names(tmp_path)) == 2


def test_a_reader_waits_out_a_state_that_comes_back(tmp_path, monkeypatch):
    """The file is gone when it is to be read, and there again, under the same header, a moment later."""
    write_state(tmp_path, value_state(1))
    [file] = tmp_path.glob("tensors-*")
    plain, away = states._read_header, tmp_path / "away"

    def header(folder):
        result = plain(folder)
        if file.exists():
            if not away.exists():
                file.rename(away)
        else:
            away.rename(file)
            away.write_text("once")
        return result

    monkeypatch.setattr(states, "_read_header", header)
    assert read_state(tmp_path).meta == {"value": 1}


def test_a_state_is_read_where_nothing_may_be_written(tmp_path, monkeypatch):
    write_state(tmp_path, value_state(1))
    for name in ("open", "mkdir", "unlink", "replace"):
        plain = getattr(os, name)

        def guarded(path, *rest, name=name, plain=plain, **options):
            flags = rest[0] if name == "open" else os.O_RDWR
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return plain(path, *rest, **options)

        monkeypatch.setattr(os, name, guarded)
    assert read_state(tmp_path).meta == {"value": 1}
    with pytest.raises(WriteError, match=str(tmp_path)) as caught:
        write_state(tmp_path, value_state(2))
    assert caught.value.errno == errno.EROFS


def hold(folder, holding, release):
    with one_writer(folder):
        holding.set()
        release.wait(30)


def test_a_second_writer_waits_then_says_so_then_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SILENT", 0.05)
    holding, release = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, holding, release))
    process.start()
    holding.wait(30)
    try:
        with pytest.warns(UserWarning, match=str(tmp_path)), pytest.raises(BusyError, match=str(tmp_path)):
            one_writer(tmp_path, patience=0.2).__enter__()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(BusyError):
                one_writer(tmp_path, patience=0).__enter__()
    finally:
        threading.Timer(0.3, release.set).start()
    monkeypatch.setattr(files, "_SILENT", 5.0)
    write_state(tmp_path, value_state(1))  # waits
    process.join()
    assert read_state(tmp_path).meta == {"value": 1}


def hold_and_die(folder):
    with one_writer(folder):
        die()


def test_the_lock_of_a_killed_writer_is_free(tmp_path):
    killed(hold_and_die, tmp_path)
    with one_writer(tmp_path, patience=0):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("flock")])
def test_a_file_system_without_locks_is_told_once_and_written_to(tmp_path, monkeypatch, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(files.FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match=str(tmp_path)) as told:
        write_state(tmp_path, value_state(1))
    assert len(told) == 1
    assert read_state(tmp_path).meta == {"value": 1}


def adapter(rank):
    """What a checkpoint in PEFT's format holds, in short."""
    return {"lora_A": torch.zeros(rank, 4)}, {"r": rank}


def export_often(folder, rank, ready):
    peft_checkpoint.checkpoint = lambda *_: adapter(rank)  # in this process alone
    ready.wait()
    for _ in range(20):
        peft_checkpoint.write(folder, nn.Linear(4, 4), {})


def test_two_exports_into_one_folder_are_one_or_the_other(tmp_path):
    ready = FORK.Barrier(2)
    writers = [FORK.Process(target=export_often, args=(tmp_path, rank, ready)) for rank in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert load_file(tmp_path / "adapter_model.safetensors")["lora_A"].shape == (config["r"], 4)


# One sentence


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    keeper = KeepLora(net, KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5))
    task = [torch.randn(16, 8)] * 2
    keeper.before_task(task, lambda m, b: m(b).square().mean())
    with torch.no_grad():
        for parameter in keeper.trainable_parameters():
            parameter.normal_()
    keeper.after_task(task)
    return keeper


NET = nn.Linear(4, 4)
WRITES = {
    "state": (lambda path: trained().save(path), "keeplora.methods.state.write_tensors"),
    "header of a state": (lambda path: trained().save(path), "keeplora._files.flush"),
    "adapter": (
        lambda path: peft_checkpoint.write(path, nn.Linear(4, 4), {}),
        "keeplora.lora.peft_checkpoint.save_file",
    ),
    "JSON": (lambda path: write_json(path / "a.json", {}), "pathlib.Path.write_text"),
    "folder": (lambda path: write_json(path / "a.json", {}), "pathlib.Path.mkdir"),
    "lock": (lambda path: trained().save(path), "keeplora._files.FileLock.acquire"),
    "rename": (lambda path: trained().save(path), "os.replace"),
}


@pytest.fixture(autouse=True)
def _without_peft(monkeypatch):
    """It takes seconds to import, and says nothing about files."""
    monkeypatch.setattr(peft_checkpoint, "checkpoint", lambda *_: adapter(3))


@pytest.mark.parametrize("failure", [full, full_in_rust])
@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch, name, failure):
    write, broken = WRITES[name]
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(broken, failure)
        with pytest.raises(WriteError, match=os.strerror(errno.ENOSPC)) as caught:
            write(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    write(tmp_path)


@pytest.mark.parametrize("name", WRITES)
def test_a_place_that_is_a_file_is_one_sentence(tmp_path, name):
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(WriteError, match=str(place)) as caught:
        WRITES[name][0](place)
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_an_error_that_is_not_of_writing_stays_what_it_is(tmp_path):
    def broken(_):
        raise SafetensorError("a tensor that shares memory")

    with pytest.raises(SafetensorError, match="shares memory"):
        write_atomic(tmp_path / "a", broken)
    assert names(tmp_path) == []


def test_a_state_that_is_missing_is_a_state_error_and_makes_no_folder(tmp_path):
    with pytest.raises(StateError):
        read_state(tmp_path / "nothing")
    assert names(tmp_path) == []
