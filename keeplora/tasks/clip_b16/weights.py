"""Read the initializers of an ONNX file, and undo the int8 quantisation of its matrix products, with numpy alone.

An ONNX file is one protobuf message. Four kinds of its fields are all that weights need, so the wire format is read
here: numbers and byte ranges, each behind a key `8 · field + kind`. The package `onnx` would be a dependency for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["dequantised", "read_onnx"]

Array = np.ndarray[Any, np.dtype[Any]]
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_DIMS, _DATA_TYPE, _FLOATS, _SMALL, _NAME, _RAW = 1, 2, 4, 5, 8, 9
_INPUT, _NODE_NAME, _OP_TYPE = 1, 3, 4
_DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}


def read_onnx(path: Path) -> tuple[dict[str, Array], list[tuple[str, str, list[str]]]]:
    """Tensors of a file by name, and its nodes: kind of operation, name, names of the inputs.

    Raises:
        ValueError: the file is no ONNX file, or has tensors of another kind or outside of it.
    """
    tensors: dict[str, Array] = {}
    nodes: list[tuple[str, str, list[str]]] = []
    model = memoryview(path.read_bytes())
    for _, graph in _fields(model, _GRAPH):
        for field, part in _fields(graph, _NODE, _INITIALIZER):
            if field == _INITIALIZER:
                name, tensor = _tensor(part)
                tensors[name] = tensor
            else:
                texts = [(field, bytes(text).decode()) for field, text in _fields(part, _INPUT, _NODE_NAME, _OP_TYPE)]
                of = dict(texts)
                inputs = [text for field, text in texts if field == _INPUT]
                nodes.append((of.get(_OP_TYPE, ""), of.get(_NODE_NAME, ""), inputs))
    if not tensors:
        raise ValueError(f"read_onnx: path must be an ONNX file with weights, got none in {path}.")
    return tensors, nodes


def dequantised(tensors: dict[str, Array], nodes: list[tuple[str, str, list[str]]]) -> dict[str, Array]:
    """Float32 weights by parameter name: those stored as such, and `W = (Q − zero point) · scale` of every product.

    A product `MatMulInteger(x, Q, …)` of a layer `layers.0.fc1` is the node `/layers.0/fc1/MatMul_quant`; `Q` is
    `[in, out]` with one scale and one zero point per output, and becomes the layer's weight `[out, in]`.
    """
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dtype == np.float32 and "::" not in name}
    for kind, node, inputs in nodes:
        if kind == "MatMulInteger":
            _, quantised, _, zero_point = inputs
            scale = tensors[quantised.removesuffix("_quantized") + "_scale"]
            centred = tensors[quantised].astype(np.float32) - tensors[zero_point].astype(np.float32)
            layer = node.strip("/").rpartition("/")[0].replace("/", ".")
            weights[f"{layer}.weight"] = np.ascontiguousarray((centred * scale).T)
    return weights


def _tensor(message: memoryview) -> tuple[str, Array]:
    dims: list[int] = []
    name, kind, data = "", 0, memoryview(b"")
    for field, value in _fields(message, _DIMS, _DATA_TYPE, _FLOATS, _SMALL, _NAME, _RAW):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else _numbers(value)
        elif field == _DATA_TYPE:
            kind = value
        elif field == _NAME:
            name = bytes(value).decode()
        elif field == _SMALL:  # int8 and the like, as int32 in two's complement of 64 bits
            data = memoryview(np.array(_numbers(value), np.uint64).astype(_DTYPES[kind]).tobytes())
        else:  # little-endian numbers, floats in a field of their own or anything as raw bytes
            data = value
    dtype = _DTYPES.get(kind)
    if dtype is None or len(data) != np.dtype(dtype).itemsize * math.prod(dims):
        raise ValueError(
            f"read_onnx: tensors must be numbers of a known type inside the file, got type {kind} with {len(data)} "
            f"bytes for {dims} [{name}]."
        )
    return name, np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(dims)


def _fields(message: memoryview, *wanted: int) -> Iterator[tuple[int, Any]]:
    """The wanted fields of a message in order: numbers as int, everything else as its bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, kind = key >> 3, key & 7
        value: Any
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"read_onnx: path must be an ONNX file, got a field of kind {kind}.")
        if field in wanted:
            yield field, value


def _numbers(packed: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(packed):
        number, at = _varint(packed, at)
        numbers.append(number)
    return numbers


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
