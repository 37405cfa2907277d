"""Saving and loading a ``State``: atomic, hashed, without pickle.

A saved state is a folder with one ``state.json`` and the tensor file it names, ``tensors-<hash>.safetensors``.
The tensor file is complete on disk before ``state.json`` is replaced, and the previous tensor file is deleted
only afterwards. Whenever the power fails, a reader meets the old state or the new one, never a mix. Writers take turns;
readers wait for nobody.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from keeplora._files import flush, is_abandoned, one_writer, staged, write_json
from keeplora._untrusted import MOST_JSON, check_tensor_file, fault, parse_json, read_bytes

FORMAT = "keeplora-state"
SCHEMA = 3
"""The version this code writes, and the only one it reads."""

STATE_FILE = "state.json"
_TENSOR_FILES = "tensors-*.safetensors"
_REMEDY = "Restore the state from a copy, load it into the model it was made with, or start again in an empty folder."


@dataclass
class State:
    """All a method needs to go on later: ``tensors`` by name, and ``meta`` that fits JSON."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class StateError(ValueError):
    """A saved state that cannot be used: missing, damaged, or written by a newer keeplora.

    The message ends with what to do about it; one that does not end with a full stop gets what always helps.
    """

    def __init__(self, message: str):
        super().__init__(message if message.endswith(".") else f"{message}. {_REMEDY}")


def write_state(path: str | os.PathLike[str], state: State) -> None:
    """Save ``state`` in the folder ``path``, replacing what is saved there in one step.

    Tensors of any dtype are written as they are (on the CPU, contiguous). ``state.meta`` must fit JSON without
    NaN or infinity; otherwise ``ValueError`` or ``TypeError`` is raised and the folder keeps its old state. So it does
    where it cannot be written to (``OSError``). Several processes may save into one folder: they take turns, and the
    last one's state stays. Of other files only the tensors of the state before are deleted.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(folder, State({"q": torch.eye(2)}, {"task": 3}))
    ...     again = read_state(folder)
    >>> again.meta["task"], torch.equal(again.tensors["q"], torch.eye(2))
    (3, True)
    """
    folder = Path(path)
    try:
        meta = json.loads(json.dumps(state.meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"write_state: state.meta must fit strict JSON, got: {error}") from error
    if not isinstance(meta, dict):
        raise TypeError(f"write_state: state.meta must be a dict, got {type(state.meta).__name__}")
    tensors = _own_storage(state.tensors)
    with one_writer(folder):
        before = _named(folder)
        with staged(folder / "tensors.safetensors") as temporary:
            save_file(tensors, temporary)
            with temporary.open("rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
            name = f"tensors-{digest[:16]}.safetensors"
            flush(temporary)
            os.replace(temporary, folder / name)
            flush(folder)
        header = {"format": FORMAT, "schema": SCHEMA, "tensors": {"file": name, "sha256": digest}, "meta": meta}
        write_json(folder / STATE_FILE, sealed(header))
        with suppress(OSError):  # the state is saved; what cannot be deleted now goes with a later one
            for file in folder.glob(_TENSOR_FILES):
                if file.name != name and (file.name == before or is_abandoned(file)):
                    file.unlink(missing_ok=True)


def _named(folder: Path) -> str | None:
    """The tensor file of the state that is saved in ``folder``, if one is."""
    try:
        return str(parse_json(read_bytes(folder / STATE_FILE, most=MOST_JSON))["tensors"]["file"])
    except (OSError, LookupError, TypeError, ValueError):
        return None  # nothing to read: then nothing of it is deleted


def has_state(path: str | os.PathLike[str]) -> bool:
    """Whether the folder ``path`` holds a saved state, or what stands in the place of one and is to be refused."""
    return os.path.lexists(Path(path) / STATE_FILE)


def read_state(path: str | os.PathLike[str]) -> State:
    """Load what ``write_state`` saved in the folder ``path``.

    Raises ``StateError`` (a ``ValueError``) naming the file when something is missing or is no regular file, a
    value of ``state.json`` or a byte of the tensor file is not what was written (one hash covers both), or the schema
    is unknown or newer than this version's. Whatever the files are, this is said quickly.
    """
    folder = Path(path)
    while True:
        header = _read_header(folder)
        file = folder / header["tensors"]["file"]
        try:
            raw = read_bytes(file, size=check_tensor_file(file))
        except (OSError, ValueError) as error:
            gone = isinstance(error, FileNotFoundError)
            if gone and (_read_header(folder) != header or file.exists()):
                continue  # a writer replaced the state between our two reads
            said = f"{fault(error)}, it is named by {STATE_FILE}" if gone else fault(error)
            raise StateError(f"read_state: {file} must {said}") from error
        break
    digest = _sha256(raw)
    if digest != header["tensors"]["sha256"]:
        raise StateError(f"read_state: {file} must have sha256 {header['tensors']['sha256'][:16]}…, got {digest[:16]}…")
    try:
        tensors = load_tensors(raw)
    except (SafetensorError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise StateError(f"read_state: {file} must be a safetensors file, got: {error}") from error
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
    tensors = header.get("tensors")
    if (
        not isinstance(tensors, dict)
        or not isinstance(tensors.get("file"), str)
        or not isinstance(tensors.get("sha256"), str)
        or Path(tensors["file"]).name != tensors["file"]
        or not isinstance(header.get("meta"), dict)
    ):
        raise StateError(f"read_state: {file} must name its tensor file, hash and meta")
    if header.get("sha256") != sealed(header)["sha256"]:
        raise StateError(f"read_state: {file} must hold what was written, got values that were changed")
    return header


def sealed(header: dict[str, Any]) -> dict[str, Any]:
    """The header with a hash of all its values, that of the tensor file among them: nothing in a state is outside."""
    values = {name: value for name, value in header.items() if name != "sha256"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**values, "sha256": _sha256(text.encode())}


def _own_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares memory with another (safetensors demands both)."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size():
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
