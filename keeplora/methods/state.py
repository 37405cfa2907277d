"""Saving and loading a ``State``: atomic, hashed, incremental, without pickle.

A saved state is a folder with one ``state.json`` and the tensor files it names, ``tensors-<hash>.safetensors``. A
tensor file never changes. What earlier saves wrote of a state's lasting tensors is named again, not written again. All
files are complete on disk before ``state.json`` is replaced; those that the new one does not name are deleted only
afterwards. Whenever the power fails, a reader meets the old state or the new one, never a mix. Writers take turns;
readers wait for nobody.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from keeplora._files import flush, folder_named, is_abandoned, one_writer, staged, told, write_json
from keeplora._untrusted import MOST_JSON, fault, parse_json, read_bytes

from .tensor_files import DamagedError, read_tensors, write_tensors

FORMAT = "keeplora-state"
SCHEMA = 5
"""The version this code writes, and the only one it reads."""

STATE_FILE = "state.json"
_TENSOR_FILES = "tensors-*.safetensors"
_REMEDY = "Restore the state from a copy, load it into the model it was made with, or start again in an empty folder."


@dataclass
class State:
    """All a method needs to go on later: ``tensors`` by name, and ``meta`` that fits JSON.

    ``lasting`` names the tensors that are never written to while anybody holds them: a save that finds their file from
    an earlier one does not write them again.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    lasting: frozenset[str] = frozenset()


class StateError(ValueError):
    """A saved state that cannot be used: missing, damaged, or written by another version of keeplora.

    The message ends with what to do about it; one that does not end with a full stop gets what always helps.
    """

    def __init__(self, message: str):
        super().__init__(message if message.endswith(".") else f"{message}. {_REMEDY}")


class _Written(NamedTuple):
    """Where a tensor is on disk."""

    version: int  # of the tensor, counted by torch
    name: str
    file: Path
    digest: str
    stamp: tuple[int, int]  # of the file: size and time of its last change

    def is_there(self, file: Path) -> bool:
        """Whether this file, which has its name, is still what was written."""
        try:
            return _stamp(file) == self.stamp
        except OSError:
            return False


_written: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By tensor: its file, where this process wrote or read it."""


def write_state(path: str | os.PathLike[str], state: State, *, store: str | os.PathLike[str] | None = None) -> None:
    """Save ``state`` in the folder ``path``, replacing what is saved there in one step.

    Tensors of any dtype are written as they are, in one pass, with 4 MiB of memory beyond them. ``state.meta`` must fit
    JSON without NaN or infinity; otherwise ``ValueError`` or ``TypeError`` is raised and the folder keeps its old
    state. So it does where it cannot be written to (``OSError``). Several processes may save into one folder: they take
    turns, and the last one's state stays. Of other files only those of the state before are deleted.

    Args:
        store: A folder for the files of lasting tensors; ``path`` gets hard links to them, or copies where the file
            system has no links. Folders that share a store hold one copy of what they have in common, also when any of
            them are deleted. What no folder links to is deleted from the store.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(folder, State({"q": torch.eye(2)}, {"task": 3}))
    ...     again = read_state(folder)
    >>> again.meta["task"], torch.equal(again.tensors["q"], torch.eye(2))
    (3, True)
    """
    folder, shared = folder_named("write", path), None if store is None else Path(store)
    try:
        meta = json.loads(json.dumps(state.meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"write_state: state.meta must fit strict JSON, got: {error}") from error
    if not isinstance(meta, dict):
        raise TypeError(f"write_state: state.meta must be a dict, got {type(state.meta).__name__}")
    with one_writer(folder):
        before = _named(folder)
        if shared is None:
            files = _write_files(folder, state, folder)
        else:
            with one_writer(shared):
                files = _write_files(folder, state, shared)
        write_json(folder / STATE_FILE, sealed({"format": FORMAT, "schema": SCHEMA, "files": files, "meta": meta}))
        with suppress(OSError):  # the state is saved; what cannot be deleted now goes with a later one
            for file in folder.glob(_TENSOR_FILES):
                if file.name not in files and (file.name in before or is_abandoned(file)):
                    file.unlink(missing_ok=True)
    if shared is not None:
        with suppress(OSError), one_writer(shared):
            for file in shared.glob(_TENSOR_FILES):
                if file.name not in files and file.stat().st_nlink == 1:
                    file.unlink(missing_ok=True)


def _write_files(folder: Path, state: State, store: Path) -> dict[str, Any]:
    """Bring all of the state's tensors into ``folder``; returns the files' entries in ``state.json``."""
    files: dict[str, dict[str, Any]] = {}
    with told(folder):
        _fill(folder, state, store, files)
    return files


def _fill(folder: Path, state: State, store: Path, files: dict[str, dict[str, Any]]) -> None:
    for known in _known_files(state, (folder, store)):
        _bring(known.file, folder, store)
        files[known.file.name] = {"sha256": known.digest, "tensors": known.names}
    left = [name for name in state.tensors if not any(name in entry["tensors"] for entry in files.values())]
    for lasts, place in ((True, store), (False, folder)):
        group = {name: state.tensors[name] for name in left if (name in state.lasting) is lasts}
        if not group:
            continue
        file, digest = _write_file(place, group)
        if lasts:
            _bring(file, folder, store)
            _remember(group, file, digest)
        files[file.name] = {"sha256": digest, "tensors": [*group]}
    flush(folder)


class _Known(NamedTuple):
    """A file that is there, and which of the state's tensors it holds."""

    file: Path
    digest: str
    names: list[str]


def _known_files(state: State, places: Iterable[Path]) -> list[_Known]:
    """Files of earlier saves that hold lasting tensors of ``state``, and little else."""
    by_file: dict[str, tuple[_Written, list[str]]] = {}
    for name in state.tensors:
        tensor = state.tensors[name]
        at: _Written | None = _written.get(tensor) if name in state.lasting else None  # type: ignore[no-untyped-call]
        if at is not None and (at.name, at.version) == (name, _version(tensor)):
            by_file.setdefault(at.file.name, (at, []))[1].append(name)
    known = []
    for at, names in by_file.values():
        there = [file for place in places if at.is_there(file := place / at.file.name)]
        there += [at.file] if at.is_there(at.file) else []
        size = sum(_bytes(state.tensors[name]) for name in names)
        if there and 2 * size >= at.stamp[0] - MOST_TABLE:  # else most of it belongs to nobody any more
            known.append(_Known(there[0], at.digest, names))
    return known


MOST_TABLE = 2**16
"""Bytes of a file that count for nothing when it is judged how much of it is still needed."""


def _write_file(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[Path, str]:
    """A file of these tensors, named by its content."""
    with staged(folder / "tensors.safetensors") as temporary:
        digest = write_tensors(temporary, tensors)
        file = folder / f"tensors-{digest[:16]}.safetensors"
        flush(temporary)
        os.replace(temporary, file)
        flush(folder)
    return file, digest


def _bring(file: Path, folder: Path, store: Path) -> None:
    """Let ``folder`` have the file too, and ``store`` if that is where files are shared: by a link, else by a copy."""
    for place in dict.fromkeys((store, folder)):
        target = place / file.name
        if target == file:
            continue
        if target.exists():
            if _stamp(target) == _stamp(file):
                continue
            target.unlink()
        try:
            os.link(file, target)
        except OSError:  # another file system, or one without links
            with staged(target) as temporary:
                shutil.copy2(file, temporary)
                flush(temporary)
                os.replace(temporary, target)


def _remember(tensors: Mapping[str, Tensor], file: Path, digest: str) -> None:
    stamp = _stamp(file)
    for name, tensor in tensors.items():
        if not tensor.is_inference():
            _written[tensor] = _Written(_version(tensor), name, file, digest, stamp)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _named(folder: Path) -> set[str]:
    """The tensor files of the state that is saved in ``folder``, if one is."""
    try:
        return set(parse_json(read_bytes(folder / STATE_FILE, most=MOST_JSON))["files"])
    except (OSError, LookupError, TypeError, ValueError):
        return set()  # nothing to read: then nothing of it is deleted


def has_state(path: str | os.PathLike[str]) -> bool:
    """Whether the folder ``path`` holds a saved state, or what stands in the place of one and is to be refused."""
    return os.path.lexists(folder_named("has_state", path) / STATE_FILE)


def read_state(path: str | os.PathLike[str]) -> State:
    """Load what ``write_state`` saved in the folder ``path``.

    Raises ``StateError`` (a ``ValueError``) naming the file when something is missing or is no regular file, a
    value of ``state.json`` or a byte of a tensor file is not what was written (hashes cover both), or the schema
    is unknown or not this version's. Whatever the files are, this is said quickly. Memory: the tensors and 4 MiB.
    """
    folder = folder_named("read_state", path)
    while True:
        header = _read_header(folder)
        tensors: dict[str, Tensor] = {}
        try:
            for name, entry in header["files"].items():
                file = folder / name
                mine = read_tensors(file, entry["sha256"], entry["tensors"])
                _remember(mine, file, entry["sha256"])
                tensors |= mine
        except (OSError, ValueError, RuntimeError) as error:
            gone = isinstance(error, FileNotFoundError)
            if gone and (_read_header(folder) != header or file.exists()):
                continue  # a writer replaced the state between our two reads
            said = str(error) if isinstance(error, DamagedError) else fault(error)
            said += f", it is named by {STATE_FILE}" if gone else ""
            raise StateError(f"read_state: {file} must {said}") from error
        return State(tensors=tensors, meta=header["meta"])


def _read_header(folder: Path) -> dict[str, Any]:
    file = folder / STATE_FILE
    try:
        header = parse_json(read_bytes(file, most=MOST_JSON))
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        remedy = ". Give the folder of a saved state." if missing else ""
        raise StateError(f"read_state: {file} must {fault(error)}{remedy}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StateError(f'read_state: {file} must have "format": "{FORMAT}". It is not a keeplora state')
    schema = header.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        remedy = (
            "It was written by a newer keeplora: upgrade to read it."
            if newer
            else "It was written by another keeplora: start again in an empty folder, or use the one that wrote it."
        )
        raise StateError(f"read_state: {file} must have schema {SCHEMA}, got {schema!r}. {remedy}")
    if not _are_files(header.get("files")) or not isinstance(header.get("meta"), dict):
        raise StateError(f"read_state: {file} must name its tensor files, their hashes and tensors, and meta")
    if header.get("sha256") != sealed(header)["sha256"]:
        raise StateError(f"read_state: {file} must hold what was written, got values that were changed")
    return header


def sealed(header: dict[str, Any]) -> dict[str, Any]:
    """The header with a hash of all its values, those of the tensor files among them: nothing in a state is outside."""
    values = {name: value for name, value in header.items() if name != "sha256"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**values, "sha256": _sha256(text.encode())}


def _are_files(value: Any) -> bool:
    """Whether a JSON value is entries of tensor files, none of which names another folder, or another one's tensor."""
    if not isinstance(value, dict):
        return False
    seen: set[str] = set()
    for name, entry in value.items():
        names = entry.get("tensors") if isinstance(entry, dict) else None
        if (
            Path(name).name != name
            or not isinstance(names, list)
            or not isinstance(entry.get("sha256"), str)
            or not all(isinstance(tensor, str) for tensor in names)
            or len({*seen, *names}) != len(seen) + len(names)
        ):
            return False
        seen |= set(names)
    return True


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
