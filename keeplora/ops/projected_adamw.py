"""projected_adamw: AdamW that stays outside a protected subspace."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import MASTER, float_list, matrices, orthonormal, same_length
from keeplora.ops.declare import declare
from keeplora.ops.outside import inside, outside
from keeplora.ops.samples import random_basis

__all__ = ["projected_adamw"]


def projected_adamw(
    a: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    q: Sequence[Tensor],
    *,
    step: int | Tensor | Sequence[Tensor],
    lr: Sequence[float] | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    check_basis: bool = False,
) -> Tensor:
    r"""One AdamW step on every ``a[i]``, in place, that keeps its rows orthogonal to ``q[i]``.

    $$
    g \leftarrow gP, \quad A \leftarrow \mathrm{AdamW}(A, g), \quad A \leftarrow AP, \qquad
    P = I - QQ^T
    $$

    Projecting the gradient alone is not enough: Adam rescales element by element and leaves the subspace.

    Args:
        a: ``n`` parameters ``[r_i, d_i]``, contiguous, all float32 or all float64; overwritten.
        grad: ``n`` gradients ``[r_i, d_i]``, any floating dtype.
        exp_avg: ``n`` moments each, like ``a``; overwritten. Start at zero.
        exp_avg_sq: ``n`` moments each, like ``a``; overwritten. Start at zero.
        q: ``n`` bases ``[d_i, k_i]`` with orthonormal columns, dtype of ``a``; ``k_i`` may be 0.
        step: number of this step, from 1 (bias correction): one for all, or one tensor per parameter. Tensors are
            float32 without dimensions, on the CPU or on the device of ``a``; there only the device reads them, so that
            a captured CUDA graph follows their values.
        lr: learning rate, one number or one per parameter.
        betas: as in ``torch.optim.AdamW``.
        eps: as in ``torch.optim.AdamW``.
        weight_decay: as in ``torch.optim.AdamW``.
        check_basis: also check that the columns of every ``q[i]`` are orthonormal. Waits for the device.

    Returns:
        ``leak [n]``: ``‖A Q‖_F / ‖A‖_F`` after the step, 0 for ``A = 0``.

    Raises:
        ValueError: lengths or shapes do not fit, a tensor to overwrite is not contiguous, a hyperparameter
            is out of range, or a checked basis has ``max|QᵀQ - I|`` above 1e-4 (float64: 1e-10). Nothing has
            been changed then.
        TypeError: a dtype does not fit.

    Not differentiable.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, alg. 2, arXiv:1711.05101, with
    the projections of Saha et al., ICLR 2021.

    Examples:
        >>> a, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> leak = projected_adamw([a], [torch.ones(1, 2)], [torch.zeros(1, 2)], [torch.zeros(1, 2)], [q],
        ...                        step=1, lr=0.1, weight_decay=0.0)
        >>> a, leak
        (tensor([[0.0000, 0.9000]]), tensor([0.]))
    """
    arguments = checked_arguments(a, grad, exp_avg, exp_avg_sq, q, step, lr, betas, eps, weight_decay)
    if check_basis:
        orthonormal("projected_adamw", arguments[4])
    leak: Tensor = _op.call(*arguments)
    return leak


def checked_arguments(
    a: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    q: Sequence[Tensor],
    step: int | Tensor | Sequence[Tensor],
    lr: Sequence[float] | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Any, ...]:
    """The arguments of the op, or what ``projected_adamw`` raises of them."""
    state = {"a": a, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "q": q}
    lists = {name: matrices("projected_adamw", name, values, MASTER) for name, values in state.items()}
    lists["grad"] = matrices("projected_adamw", "grad", grad, uniform=False)
    same_length("projected_adamw", **lists)
    for i, parameter in enumerate(lists["a"]):
        for name, values in lists.items():
            _check_fit(name, values[i], i, parameter)
    rates = float_list("projected_adamw", "lr", lr, len(lists["a"]))
    steps = _steps(step, lists["a"])
    for name, value, fits in (
        ("lr", rates, all(rate >= 0 for rate in rates)),
        ("betas", betas, 0 <= betas[0] < 1 and 0 <= betas[1] < 1),
        ("eps", eps, 0 <= eps < math.inf),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf),
    ):
        if not fits:
            rule = "lie in [0, 1)" if name == "betas" else "not be negative, and be finite"
            raise ValueError(f"projected_adamw: {name} must {rule}, got {value}.")
    flat = {name: [m.detach() for m in values] for name, values in lists.items()}
    return (
        flat["a"], flat["grad"], flat["exp_avg"], flat["exp_avg_sq"], flat["q"],
        steps, rates, betas[0], betas[1], eps, weight_decay,
    )  # fmt: skip


def _steps(step: int | Tensor | Sequence[Tensor], a: Sequence[Tensor]) -> list[Tensor]:
    """One tensor per parameter."""
    if isinstance(step, int):
        if step < 1:
            raise ValueError(f"projected_adamw: step must be at least 1, got {step}.")
        step = torch.tensor(step, dtype=torch.float32)
    if not isinstance(step, Tensor | Sequence):
        raise TypeError(f"projected_adamw: step must be an int or float32 tensors, got {type(step).__name__}.")
    steps = [step] * len(a) if isinstance(step, Tensor) else list(step)
    same_length("projected_adamw", a=a, step=steps)
    for i, (count, parameter) in enumerate(zip(steps, a, strict=True)):
        if not isinstance(count, Tensor) or count.dim() or count.dtype != torch.float32:
            got = f"{count.dtype} {list(count.shape)}" if isinstance(count, Tensor) else type(count).__name__
            raise TypeError(f"projected_adamw: step must be an int or float32 tensors without dimensions, got {got}.")
        if count.device.type != "cpu" and count.device != parameter.device:
            places = " or on ".join(dict.fromkeys(("cpu", str(parameter.device))))
            raise ValueError(f"projected_adamw: step must be on {places} to fit a[{i}], got {count.device}.")
    return steps


def _check_fit(name: str, value: Tensor, i: int, parameter: Tensor) -> None:
    """Raise unless ``value``, item ``i`` of the argument ``name``, fits ``a[i]``."""
    fits = value.shape[0] == parameter.shape[1] if name == "q" else value.shape == parameter.shape
    if not fits or value.device != parameter.device:
        want = f"[{parameter.shape[1]}, k]" if name == "q" else str(list(parameter.shape))
        raise ValueError(
            f"projected_adamw: {name}[{i}] must be {want} on {parameter.device} to fit a[{i}], got "
            f"{list(value.shape)} on {value.device}."
        )
    if name != "grad" and value.dtype != parameter.dtype:
        raise TypeError(f"projected_adamw: {name}[{i}] must be {parameter.dtype} like a[{i}], got {value.dtype}.")
    if name not in ("q", "grad") and not value.is_contiguous():
        raise ValueError(
            f"projected_adamw: {name}[{i}] must be contiguous, got strides {list(value.stride())}. It is "
            "overwritten in place."
        )


def _reference(
    a: list[Tensor],
    grad: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    q: list[Tensor],
    step: list[Tensor],
    lr: list[float],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Tensor:
    leaks = []
    for p, g, m, v, basis, count, rate in zip(a, grad, exp_avg, exp_avg_sq, q, step, lr, strict=True):
        g = outside(g.to(p.dtype), basis)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = (1 - beta ** count.double() for beta in (beta1, beta2))
        direction = m / (v.sqrt() / correction2.sqrt()).add_(eps)
        moved = p * (1 - rate * weight_decay) - rate / correction1 * direction
        p.copy_(outside(outside(moved, basis), basis))
        length = torch.linalg.matrix_norm(p, dtype=torch.float64)
        within = torch.linalg.matrix_norm(inside(p, basis), dtype=torch.float64)
        leaks.append(torch.where(length != 0, within / length, 0).to(p.dtype))
    return torch.stack(leaks) if leaks else torch.zeros(0)


def _fake(a: list[Tensor], *_: Any) -> Tensor:
    return a[0].new_empty(len(a)) if a else torch.empty(0)


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def sample(*shapes: tuple[int, int, int], step: int) -> tuple[Any, ...]:
        a, grad, m = ([torch.randn(r, d, device=device, dtype=dtype) for r, d, _ in shapes] for _ in range(3))
        v = [torch.rand(r, d, device=device, dtype=dtype) for r, d, _ in shapes]
        q = [random_basis(d, k, device, dtype) for _, d, k in shapes]
        steps = [torch.tensor(float(step), device="cpu" if i % 2 else device) for i in range(len(shapes))]
        return a, grad, m, v, q, steps, [1e-2] * len(shapes), 0.9, 0.999, 1e-8, 0.01

    return [sample((3, 5, 2), step=1), sample((4, 33, 8), (1, 7, 0), (2, 6, 6), step=10)]


_op = declare(
    "projected_adamw(Tensor(a!)[] a, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor[] q, Tensor[] step, float[] lr, float beta1, float beta2, float eps, float weight_decay) -> Tensor",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
