"""Files of tensors in safetensors' format, written and read in one pass that hashes them and copies nothing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keeplora._untrusted import tensor_file

__all__ = ["DamagedError", "read_tensors", "write_tensors"]

PIECE = 2**22
"""Bytes that are on their way at a time: all the memory that reading and writing take besides the tensors."""

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class DamagedError(ValueError):
    """A file whose bytes are not those that were written."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a new file, as safetensors does; returns the sha256 of its bytes.

    Tensors may lie on any device and in any layout: they come over in pieces.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     digest = write_tensors(Path(folder) / "x", {"q": torch.eye(2)})
    ...     read_tensors(Path(folder) / "x", digest, {"q"})
    {'q': tensor([[1., 0.],
            [0., 1.]])}
    """
    table: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file:
        for piece in _pieces(len(text).to_bytes(8, "little") + text, tensors):
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
    return digest.hexdigest()


def _pieces(head: bytes, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors.values():
        if not tensor.numel():
            continue
        rows = tensor.detach().resolve_conj().resolve_neg()
        rows = rows.reshape(-1) if rows.is_contiguous() else rows
        step = max(1, PIECE * len(rows) // (rows.numel() * rows.element_size()))
        for part in torch.split(rows, step):
            raw = part.to("cpu").contiguous().reshape(-1).view(torch.uint8)
            yield raw.numpy().data


def read_tensors(path: Path, digest: str, names: Collection[str]) -> dict[str, Tensor]:
    """Some of a file's tensors, each in memory of its own; the whole file is read, once, and hashed meanwhile.

    It is not mapped: what was hashed is what is used, and the file may go away or change later.

    Raises:
        OSError: there is none, or we may not.
        DamagedError: the hash is another.
        ValueError: something else than a file of tensors, or one of them is missing.
    """
    with tensor_file(path) as (file, head, table):
        found = {name: _place(name, table) for name in names}
        hashed = hashlib.sha256(head)
        scratch = torch.empty(PIECE, dtype=torch.uint8)
        for name, begin, end in _spans(table):
            tensor = found.get(name)
            raw = None if tensor is None else tensor.reshape(-1).view(torch.uint8)
            for start in range(begin, end, PIECE):
                size = min(PIECE, end - start)
                piece = scratch[:size] if raw is None else raw[start - begin : start - begin + size]
                view = memoryview(piece.numpy().data)
                _fill(file, view)
                hashed.update(view)
    if hashed.hexdigest() != digest:
        raise DamagedError(f"have sha256 {digest[:16]}…, got {hashed.hexdigest()[:16]}…")
    return found


def _spans(table: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Names with their first byte and the one after their last, in the order of the file, without gaps."""
    spans = sorted(((*entry["data_offsets"], name) for name, entry in table.items()), key=lambda span: span[:2])
    at = 0
    for begin, end, name in spans:
        if begin != at or end < begin:
            raise ValueError(f"a safetensors file, got a tensor at bytes {begin} to {end} after {at} [{name[:80]}]")
        at = end
    return [(name, begin, end) for begin, end, name in spans]


def _place(name: str, table: Mapping[str, Any]) -> Tensor:
    """Room for a tensor of the file."""
    entry = table.get(name)
    if entry is None:
        raise ValueError(f"a file that holds {name[:80]!r}, got none of that name")
    dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
    begin, end = entry["data_offsets"]
    count = 1
    for size in shape:
        count *= size
    if dtype is None or count * dtype.itemsize != end - begin:
        raise ValueError(f"a safetensors file, got {end - begin} bytes for {entry['dtype']} of {shape} [{name[:80]}]")
    return torch.empty(shape, dtype=dtype)


def _fill(file: Any, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise ValueError("of the size it had when it was opened, got one that became shorter")
        view = view[count:]
