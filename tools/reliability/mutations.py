"""Changes to the bytes of a file, to JSON, and to the values and tensors of a state."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keeplora.methods.state import State

_STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, "", "0", "NaN", "a" * 1000, "\x00", "../x",
    [], {}, [[]], [None], {"": None}, [1, 2, 3], ["a", "b"],
]  # fmt: skip


def mutated_bytes(data: bytes, numbers: random.Random) -> tuple[str, bytes]:
    """The name of a change, and the data with it."""
    at = numbers.randrange(len(data) + 1)
    size = min(numbers.choice([1, 1, 2, 8, 64]), len(data) - at)
    noise = numbers.randbytes(max(size, 1))
    flipped = bytearray(data)
    if at < len(data):
        flipped[at] ^= 1 << numbers.randrange(8)
    kinds = {
        "a bit": bytes(flipped),
        "noise": data[:at] + noise + data[at + size :],
        "cut off": data[:at],
        "a hole": data[:at] + data[at + size :],
        "more": data[:at] + noise + data[at:],
        "longer": data + noise,
        "twice": data + data,
        "a long header": numbers.randbytes(8) + data[8:],
        "zeros": data[:at] + bytes(size) + data[at + size :],
    }
    name = numbers.choice(list(kinds))
    return name, kinds[name]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside another."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*path, key), *_places(inner, (*path, key)))]


def _change(value: Any, numbers: random.Random) -> str:
    """Change one place of a JSON value."""
    place = numbers.choice(_places(value))
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    key, kind = place[-1], numbers.choice(["other", "other", "gone", "added", "near", "deep"])
    where = "/".join(map(str, place))
    if kind == "gone":
        del inside[key]
    elif kind == "added":
        _add(inside, numbers)
    elif kind == "near" and isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
        inside[key] += numbers.choice([-1, 1])
    elif kind == "deep":
        inside[key] = json.loads("[" * 200 + "]" * 200)
    else:
        kind, inside[key] = "other", numbers.choice(_STRANGE)
    return f"{kind} at {where}"


def _add(inside: dict[str, Any] | list[Any], numbers: random.Random) -> None:
    if isinstance(inside, dict):
        inside[numbers.choice(["more", "", "tasks_learned", "weight"])] = numbers.choice(_STRANGE)
    else:
        inside.insert(numbers.randrange(len(inside) + 1), numbers.choice(_STRANGE))


def mutated_json(data: bytes, numbers: random.Random) -> tuple[str, bytes]:
    """As :func:`mutated_bytes`, but mostly JSON still."""
    value = json.loads(data)
    kind = numbers.choice(["value", "value", "value", "twice a key", "NaN", "long number"])
    if kind == "value":
        kind = _change(value, numbers)
        return kind, json.dumps(value).encode()
    text = data.decode()
    colons = [i for i, letter in enumerate(text) if letter == ":"]
    at = numbers.choice(colons)
    if kind == "twice a key":
        start = text.rfind('"', 0, text.rfind('"', 0, at)) if text[at - 1] == '"' else -1
        text = text[:start] + text[start : at + 1] + "null, " + text[start:] if start >= 0 else text + text
    else:
        text = text[: at + 1] + {"NaN": "NaN, ", "long number": "9" * 5000 + ", "}[kind] + text[at + 1 :]
    return kind, text.encode()


def _set(tensor: Tensor, value: float, numbers: random.Random) -> Tensor:
    changed = tensor.clone()
    if changed.numel():
        changed.view(-1)[numbers.randrange(changed.numel())] = value
    return changed


_TENSORS: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "NaN": lambda tensor, numbers: _set(tensor, float("nan"), numbers),
    "infinity": lambda tensor, numbers: _set(tensor, float("-inf"), numbers),
    "float64": lambda tensor, _: tensor.double(),
    "float16": lambda tensor, _: tensor.half(),
    "integers": lambda tensor, _: tensor.nan_to_num().clamp(-1000, 1000).long(),
    "booleans": lambda tensor, _: tensor.bool(),
    "complex": lambda tensor, _: tensor.to(torch.complex64),
    "a row more": lambda tensor, _: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor[None],
    "a row less": lambda tensor, _: tensor[1:] if tensor.dim() else tensor[None],
    "a column less": lambda tensor, _: tensor[..., 1:] if tensor.dim() else tensor[None],
    "turned": lambda tensor, _: tensor.T if tensor.dim() == 2 else tensor[None],
    "flat": lambda tensor, _: tensor.reshape(-1),
    "a dimension more": lambda tensor, _: tensor[None],
    "empty": lambda tensor, _: tensor.new_zeros(0),
    "none of many": lambda tensor, _: tensor.new_zeros(0, 2**40),
    "a number": lambda tensor, _: torch.tensor(1.0),
}


def mutated_state(state: State, numbers: random.Random) -> tuple[str, State]:
    """The name of a change, and a state with it."""
    kind = numbers.choice(["meta", "meta", "tensor", "tensor", "gone", "more", "swapped", "renamed"])
    name, other = numbers.choice(sorted(state.tensors)), numbers.choice(sorted(state.tensors))
    if kind == "meta":
        kind = _change(state.meta, numbers)
        return kind, state
    tensors = state.tensors
    if kind == "gone":
        del tensors[name]
    elif kind == "more":
        tensors[numbers.choice(["more", f"{name}.A", f"9.{name}"])] = torch.ones(2, 2)
    elif kind == "swapped":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "renamed":
        tensors[f"{name}x"] = tensors.pop(name)
    else:
        kind = numbers.choice(list(_TENSORS))
        tensors[name] = _TENSORS[kind](tensors[name], numbers).contiguous()
    return f"{kind} of {name}", state
