"""Argument checks shared by the ops. Each raises before anything is computed or changed."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from keeplora.ops.precision import full_precision

__all__ = ["FLOATS", "MASTER", "float_list", "matrices", "matrix", "orthonormal", "repeated", "same_length", "wide"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASTER = (torch.float32, torch.float64)


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float64 as soon as one input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _is_matrix(value: object, dtypes: Sequence[torch.dtype]) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype in dtypes


def matrix(op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise unless ``value`` is a matrix of one of ``dtypes``."""
    if _is_matrix(value, dtypes):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}.")
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must be a matrix (2 dimensions), got shape {list(value.shape)}.")
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise TypeError(f"{op}: {name} must be one of {allowed}, got {value.dtype}. Cast it with .to(torch.float32).")


def matrices(
    op: str,
    name: str,
    values: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] = FLOATS,
    *,
    uniform: bool = True,
) -> list[Tensor]:
    """Return ``values`` as a list, or raise unless it is a sequence of matrices on one device.

    ``uniform`` also asks for one dtype throughout, which a grouped kernel needs.
    """
    if isinstance(values, Tensor):
        raise TypeError(f"{op}: {name} must be a sequence of matrices, got a single tensor. Pass [{name}].")
    checked = list(values)
    for i, value in enumerate(checked):
        if not _is_matrix(value, dtypes):
            matrix(op, f"{name}[{i}]", value, dtypes)  # says what is wrong: names are formatted only then
        if value.device != checked[0].device:
            raise ValueError(
                f"{op}: {name} must lie on one device, got {value.device} at {name}[{i}] and "
                f"{checked[0].device} at {name}[0]."
            )
        if uniform and value.dtype != checked[0].dtype:
            raise TypeError(
                f"{op}: {name} must have one dtype, got {value.dtype} at {name}[{i}] and {checked[0].dtype} at "
                f"{name}[0]."
            )
    return checked


def same_length(op: str, **named: Sequence[object]) -> None:
    """Raise unless all named sequences have as many items as the first."""
    (first, head), *others = named.items()
    for name, values in others:
        if len(values) != len(head):
            raise ValueError(f"{op}: {name} must have one item for each of {first}, got {len(values)} for {len(head)}.")


def float_list(op: str, name: str, value: Sequence[float] | float, count: int) -> list[float]:
    """One finite number per problem; a single number is repeated."""
    numbers = repeated(op, name, value, count, "problem")
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{op}: {name} must be finite, got {number} at {name}[{i}].")
    return numbers


def repeated(op: str, name: str, value: Sequence[float] | float, count: int, each: str) -> list[float]:
    """One number for ``each`` of ``count``; a single one is repeated. Booleans and text are no numbers."""
    if isinstance(value, bool | str) or not isinstance(value, int | float | Iterable):
        raise TypeError(f"{op}: {name} must be one number or one per {each}, got {value!r}.")
    items = [value] * count if isinstance(value, int | float) else list(value)
    if len(items) != count:
        raise ValueError(f"{op}: {name} must be one number or one per {each}, got {len(items)} for {count} {each}s.")
    for i, item in enumerate(items):
        if isinstance(item, bool | str):
            raise TypeError(f"{op}: {name} must be numbers, got {item!r} at {name}[{i}].")
    return [float(item) for item in items]


def orthonormal(op: str, q: Sequence[Tensor]) -> None:
    """Raise unless every ``q[i]`` has orthonormal columns to 1e-4 (float64: 1e-10).

    Waits for the device, once for all matrices: what ``check_basis=True`` of an op asks for.
    """
    with full_precision(*q):
        off = [_off_identity(basis.detach()) for basis in q]
    for i, error in enumerate(torch.stack(off).tolist() if off else []):
        allowed = 1e-4 if q[i].dtype == torch.float32 else 1e-10
        if not error <= allowed:  # a NaN neither
            raise ValueError(
                f"{op}: q[{i}] must have orthonormal columns, got max|QᵀQ - I| = {error:.2e} > {allowed:.0e}. "
                f"Pass orthonormalize([q[{i}]]) of keeplora.ops."
            )


def _off_identity(q: Tensor) -> Tensor:
    """``max|QᵀQ − I|``, on the device."""
    if q.numel() == 0:
        return q.new_zeros(())
    return (q.T @ q - torch.eye(q.shape[1], dtype=q.dtype, device=q.device)).abs().amax()
