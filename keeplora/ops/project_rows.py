"""project_rows: take a subspace out of the rows of many matrices (kernel: csrc/kernels/project_rows.h)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.check import MASTER, float_list, matrices, orthonormal, same_length
from keeplora.ops.declare import declare
from keeplora.ops.outside import inside, outside
from keeplora.ops.samples import random_basis

__all__ = ["project_rows"]


def project_rows(
    g: Sequence[Tensor],
    q: Sequence[Tensor],
    *,
    scale: Sequence[float] | float = 1.0,
    passes: int = 2,
    check_basis: bool = False,
) -> tuple[list[Tensor], Tensor]:
    r"""Remove from the rows of every ``g[i]`` what lies in the span of the columns of ``q[i]``.

    $$
    R_i = \lambda_i\,(G_i - (G_i Q_i) Q_i^T), \qquad
    \mathrm{leak}_i = \lVert R_i Q_i \rVert_F / \lVert R_i \rVert_F
    $$

    All problems, of any mixture of shapes, run in one launch on a GPU.

    Args:
        g: ``n`` matrices ``[r_i, d_i]``, all float32 or all float64.
        q: ``n`` matrices ``[d_i, k_i]`` with orthonormal columns, dtype of ``g``; ``k_i`` may be 0.
        scale: ``λ``, one number or one per problem; KeepLoRA++'s depth scale.
        passes: 1 or 2. One pass leaves a leak of up to 3e-6 in float32, two leave 5e-7.
        check_basis: also check that the columns of every ``q[i]`` are orthonormal. Waits for the device.

    Returns:
        ``(r, leak)``: ``n`` new matrices shaped like ``g``, and ``[n]`` leaks in the dtype of ``g``;
        the leak of ``R_i = 0`` is 0.

    Raises:
        ValueError: lengths or shapes do not fit, ``scale`` is not finite, ``passes`` is not 1 or 2, or a checked
            basis has ``max|QᵀQ - I|`` above 1e-4 (float64: 1e-10).
        TypeError: an argument is not a sequence of float32 or of float64 matrices.

    Differentiable in ``g``; ``q`` is a constant and ``leak`` carries no gradient.

    Source: the gradient projection of Saha et al., "Gradient Projection Memory", ICLR 2021, eq. 6, with the
    depth scale of KeepLoRA++, arXiv:2606.16256.

    Examples:
        >>> g, q = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
        >>> rows, leak = project_rows([g], [q], scale=0.5)
        >>> rows, leak
        ([tensor([[0., 2.]])], tensor([0.]))
    """
    g = matrices("project_rows", "g", g, MASTER)
    q = matrices("project_rows", "q", q, MASTER)
    same_length("project_rows", g=g, q=q)
    for i, (rows, basis) in enumerate(zip(g, q, strict=True)):
        if rows.shape[1] != basis.shape[0]:
            raise ValueError(
                f"project_rows: q[{i}] must have as many rows as g[{i}] has columns, got "
                f"{list(basis.shape)} for {list(rows.shape)}."
            )
    if g and (g[0].dtype != q[0].dtype or g[0].device != q[0].device):
        raise TypeError(
            f"project_rows: q must have the dtype and device of g, got {q[0].dtype} on {q[0].device} for "
            f"{g[0].dtype} on {g[0].device}."
        )
    if passes not in (1, 2):
        raise ValueError(f"project_rows: passes must be 1 or 2, got {passes}.")
    scales = float_list("project_rows", "scale", scale, len(g))
    if check_basis:
        orthonormal("project_rows", q)
    rows, leak = _op.call(g, q, scales, passes)
    return rows, leak


def _reference(g: list[Tensor], q: list[Tensor], scale: list[float], passes: int) -> tuple[list[Tensor], Tensor]:
    rows, whole, within = [], [], []
    for matrix, basis, factor in zip(g, q, scale, strict=True):
        left = matrix
        for _ in range(passes):
            left = outside(left, basis)
        whole.append(torch.linalg.vector_norm(left, dtype=torch.float64))
        within.append(torch.linalg.vector_norm(inside(left, basis), dtype=torch.float64))
        rows.append(left.mul_(factor))
    if not g:
        return rows, torch.zeros(0)
    length = torch.stack(whole)
    moves = (length != 0) & torch.tensor([factor != 0 for factor in scale], device=length.device)
    return rows, torch.where(moves, torch.stack(within) / length, 0).to(g[0].dtype)


def _fake(g: list[Tensor], q: list[Tensor], scale: list[float], passes: int) -> tuple[list[Tensor], Tensor]:
    rows = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in g]
    return rows, g[0].new_empty(len(g)) if g else torch.empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    _, q, ctx.scale, ctx.passes = inputs
    ctx.save_for_backward(*q)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_rows: list[Tensor], _: Tensor) -> tuple[Any, ...]:
    # λ(I − QQᵀ)ᵖ is symmetric, so the gradient goes through the same map.
    grad_g, _ = _op.call(grad_rows, list(ctx.saved_tensors), ctx.scale, ctx.passes)
    return grad_g, [None] * len(grad_rows), None, None


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def sample(*shapes: tuple[int, int, int], scale: float, passes: int) -> tuple[Any, ...]:
        g = [torch.randn(r, d, device=device, dtype=dtype, requires_grad=True) for r, d, _ in shapes]
        q = [random_basis(d, k, device, dtype) for _, d, k in shapes]
        return g, q, [scale] * len(shapes), passes

    return [
        sample((3, 5, 2), scale=1.0, passes=1),
        sample((4, 33, 8), (1, 7, 0), (2, 6, 6), (0, 5, 2), scale=0.2, passes=2),
    ]


_op = declare(
    "project_rows(Tensor[] g, Tensor[] q, float[] scale, int passes) -> (Tensor[], Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    save=_save,
    backward=_backward,
)
