"""Files that are not what was saved: refused as StateError, soon, with the model as it was; or loaded as what they say.

What carries the right hash cannot be told from what was saved, so there the question is another: does the method that
is loaded say what the file says, and can it be?
"""

from __future__ import annotations

import copy
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import keeplora
from keeplora.methods.state import State, StateError, read_state, write_state

from .children import HUNG, end, start
from .mutations import mutated_bytes, mutated_json, mutated_state
from .subjects import METHODS, fingerprint, learned, pretrained, same, unsound
from .trials import Tries

BATCH = 100
SECONDS = 5
"""A file that takes longer hangs."""
MEMORY = 4 * 2**30
"""Bytes that a process may ask for beyond what it has."""


class _Hang(BaseException):
    """Not an Exception, so that nothing takes it for a damaged file."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _Hang


def judged(folder: Path, saved: State, *, signed: bool) -> str | None:
    """What is wrong about how the package takes the files in ``folder``, or None."""
    model = pretrained()
    before = fingerprint(model)
    signal.alarm(SECONDS)
    try:
        method = keeplora.load(folder, model)
        says = method.live_state()
        wrong = unsound(method)
    except StateError as error:
        if not str(error).strip() or "\n" in str(error):
            return f"the refusal is not a sentence: {str(error)[:200]!r}"
        return None if fingerprint(model) == before else "a refused file changed the model"
    except _Hang:
        return "hangs"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    if wrong:
        return f"accepted, but {wrong}"
    if signed:
        return None if same(says, read_state(folder)) else "accepted, but the method says something else"
    return None if same(says, saved) else "accepted, though it is not what was saved"


def _batches(folder: Path, numbers: random.Random, tried: Callable[[Path], tuple[str, str | None]]) -> Tries:
    """Try files in processes of their own, which may crash, many in each."""
    while True:
        report, seed = folder / "report", numbers.getrandbits(64)
        report.write_text("")

        def work(report: Path = report, seed: int = seed) -> None:
            _limit()
            numbers.seed(seed)  # a fork would go on with the draws of the one before it
            with report.open("a", buffering=1) as file:
                for _ in range(BATCH):
                    name, wrong = tried(folder)
                    file.write(f"{name}\t{'' if wrong is None else wrong.replace(chr(10), ' ')}\n")

        code = end(start(work), (BATCH + 1) * SECONDS)
        lines = report.read_text().splitlines()
        for line in lines:
            name, _, wrong = line.partition("\t")
            yield f"{name}: {wrong}" if wrong else None
        if code != 0:
            yield "hangs for good" if code == HUNG else f"crash (exit code {code}) after {lines[-1:] or 'none'}"


def _limit() -> None:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # nothing here has to survive
    signal.signal(signal.SIGALRM, _alarm)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, resource.RLIM_INFINITY))


def _originals(folder: Path) -> list[tuple[str, Path, State]]:
    """Saved states of every method; of KeepLoRA in an open task, too."""
    result = []
    for name in (*METHODS, "keeplora open"):
        method = learned(name.split()[0], 2, open_task=name.endswith("open"))
        place = folder / name.replace(" ", "-")
        method.save(place)
        result.append((name, place, method.live_state()))
    return result


def files(
    folder: Path, numbers: random.Random, mutate: Callable[[bytes, random.Random], tuple[str, bytes]], names: str
) -> Tries:
    """One file of a state is changed; hashes are as they were."""
    originals = _originals(folder)

    def tried(folder: Path) -> tuple[str, str | None]:
        name, place, saved = numbers.choice(originals)
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(place, work)
        file = numbers.choice(sorted(work.glob(names)))
        kind, changed = mutate(file.read_bytes(), numbers)
        file.write_bytes(changed)
        return f"{name}, {file.suffix[1:]}, {kind}", judged(work, saved, signed=False)

    yield from _batches(folder, numbers, tried)


def changed_bytes(folder: Path, numbers: random.Random) -> Tries:
    yield from files(folder, numbers, mutated_bytes, "[st][te]*.*s*")


def changed_json(folder: Path, numbers: random.Random) -> Tries:
    yield from files(folder, numbers, mutated_json, "state.json")


def signed(folder: Path, numbers: random.Random) -> Tries:
    """Values and tensors are changed and saved by the package itself, so that every hash is right."""
    originals = _originals(folder)

    def tried(folder: Path) -> tuple[str, str | None]:
        name, _, saved = numbers.choice(originals)
        kind, changed = mutated_state(State(dict(saved.tensors), copy.deepcopy(saved.meta)), numbers)
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        write_state(work, changed)
        return f"{name}, signed, {kind}", judged(work, saved, signed=True)

    yield from _batches(folder, numbers, tried)


def odd(folder: Path, numbers: random.Random) -> Tries:
    """What stands where a file should be."""
    method = learned()
    saved = method.live_state()
    method.save(folder / "saved")
    for which in ("state.json", "tensors-*"):
        for name, make in ODD.items():
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder / "saved", work)
            [file] = work.glob(which)

            def work_on(file: Path = file, make: Callable[[Path], Any] = make, work: Path = work) -> None:
                _limit()
                text = file.read_bytes()
                file.unlink()
                make(file)
                del text
                wrong = judged(work, saved, signed=False)
                if wrong:
                    (folder / "wrong").write_text(wrong)

            (folder / "wrong").unlink(missing_ok=True)
            code = end(start(work_on), 2 * SECONDS)
            wrong = (folder / "wrong").read_text() if (folder / "wrong").exists() else None
            if code != 0:
                wrong = "hangs for good" if code == HUNG else f"crash (exit code {code})"
            yield f"{which} is {name}: {wrong}" if wrong else None


def _sparse(path: Path, size: int, first: bytes = b"") -> None:
    path.write_bytes(first)
    os.truncate(path, size)


ODD: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "empty": Path.touch,
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "/dev/zero": partial(Path.symlink_to, target="/dev/zero"),
    "/dev/urandom": partial(Path.symlink_to, target="/dev/urandom"),
    "/dev/tty": partial(Path.symlink_to, target="/dev/tty"),
    "40 GB of nothing": lambda path: _sparse(path, 40 * 10**9),
    "40 GB after a header": lambda path: _sparse(path, 40 * 10**9, b"\x02\0\0\0\0\0\0\0{}"),
    "brackets without end": lambda path: path.write_bytes(b"[" * 10**6),
    "braces without end": lambda path: path.write_bytes(b'{"a":' * 10**6),
    "a long number": lambda path: path.write_bytes(b"1" * 10**6),
    "NaN": lambda path: path.write_bytes(b"NaN"),
    "not UTF-8": lambda path: path.write_bytes(b'{"\xff": 1}'),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
}
