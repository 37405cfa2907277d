"""What a protected subspace does: projections, and the certificate that a change of the weights kept out of
it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.math import factorise
from keeplora.math.check import bases
from keeplora.math.orthonormal import complement, nearest_orthonormal
from keeplora.ops.check import FLOATS, MASTER, matrices, same_length
from keeplora.ops.precision import full_precision
from keeplora.ops.product import product

__all__ = ["Certificate", "certificate", "certificates", "orthogonality", "project", "shifts", "spectrum_outside"]


def project(x: Tensor, q: Tensor) -> Tensor:
    r"""What is left of the rows of ``x`` outside the span of the columns of ``q``.

    $$ x P = x - (x Q) Q^T $$

    One pass; its leak ``‖xPQ‖ / ‖xP‖`` is 1e-6 in float32 and 1e-7 when applied twice, that of its gradient, too. The
    projector is never formed.

    Args:
        x: ``[…, d]``.
        q: ``[d, k]`` (or ``[n, d, k]`` for ``x [n, rows, d]``), orthonormal columns;
            ``k`` may be 0.

    Returns:
        A new tensor shaped like ``x``.

    Raises:
        ValueError: the last dimension of ``x`` is not ``d``.

    Examples:
        >>> project(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([[0., 4.]])
    """
    if q.dim() < 2 or x.dim() < 1 or x.shape[-1] != q.shape[-2]:
        raise ValueError(f"project: x must be [..., d] and q [d, k], got shapes {list(x.shape)} and {list(q.shape)}.")
    if q.shape[-1] == 0:
        return x.clone()
    if torch.is_grad_enabled() and (x.requires_grad or q.requires_grad):
        rows = x.reshape(-1, x.shape[-1]) if q.dim() == 2 else x
        return x - product(product(rows, q), q.mT).reshape(x.shape)
    with full_precision(x):
        return x - (x @ q) @ q.mT


def shifts(q: Tensor) -> bool:
    """Whether [`spectrum_outside`][] moves the directions of such a basis out of the way, so that bases of different
    width, filled up with zeros, can be worked on together."""
    # The shift is rounded to the eps of float64, which for float64 is no longer below what counts as nothing.
    return q.dtype == torch.float32 and q.shape[-2] < factorise.plan_for(q.device.type).qr_from


def spectrum_outside(c: Tensor, q: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of every ``P C P``, ``P = I − QQᵀ``, in float64.

    Those of ``Nᵀ C N`` inside the complement ``N`` of ``Q``. Or, where ``N`` would take a QR for every layer, those of

    $$ P C P - \lVert C \rVert\, Q Q^T $$

    for eigenvalues from 0 on, which are apart from those of ``Q`` by ``‖C‖`` at least. Both are orthogonal to ``Q`` to
    1e-15.

    Args:
        c: ``[n, d, d]``, symmetric positive semidefinite.
        norm: ``[n]`` float64, the size of each.
        q: ``[n, d, k]``, orthonormal columns, in the dtype of ``c``; or zeros, where [`shifts`][].

    Returns:
        ``(values [n, m], vectors [n, d, m])`` in float64, ``m = d`` or ``d − k``, falling; no value is below 0.

    Examples:
        >>> c, q = torch.diag(torch.tensor([5.0, 2.0]))[None], torch.eye(2)[None, :, :1]
        >>> values, vectors = spectrum_outside(c, q, torch.tensor([5.4]).double())
        >>> float(values[0, 0]), vectors[0, :, 0].abs().tolist()
        (2.0, [0.0, 1.0])
    """
    k, shifted = q.shape[2], shifts(q)
    c, q = c.double(), q.double()
    if shifted and k:
        q = nearest_orthonormal(q)
        half = c - q @ (q.mT @ c)
        values, vectors = factorise.symmetric_eigh(half - (half @ q + norm[:, None, None] * q) @ q.mT)
    else:
        free = complement(q)  # in float64 it is orthogonal to Q however Q is rounded: nothing to repair after
        inner = free.mT @ (c @ free) if k else c
        del c  # as large as what is decomposed
        values, turn = factorise.symmetric_eigh(inner)
        vectors = free @ turn
    return values.flip(1).clamp_min(0), vectors.flip(2)


def orthogonality(q: Tensor) -> float:
    r"""``max|QᵀQ − I|`` of ``q [d, k]``, summed in float64; 0 for ``k = 0``.

    Examples:
        >>> orthogonality(torch.eye(3)[:, :2])
        0.0
    """
    matrices("orthogonality", "q", [q], MASTER)
    return float(_off_identity(q).item())


@dataclass(frozen=True)
class Certificate:
    r"""What one layer's task did to its protected space.

    Attributes:
        leak: ``‖ΔW Q‖_F / ‖ΔW‖_F`` of the change ``ΔW = B A`` as trained; 0 for no change. At most 1e-6 in
            float32.
        leak_after_rounding: the same of the change the stored weights really made; None where it was not
            given.
        orthogonality: ``max|QᵀQ − I|`` of the basis. At most 5e-6 after 20 tasks.
        captured: fraction of the feature energy ``tr(QᵀCQ)/tr(C)`` inside the basis, in [0, 1]; None where
            not given.
        rank: directions ``k`` of the basis.
        free: directions left, ``in − k``. At 0 the layer stops adapting.
    """

    leak: float
    leak_after_rounding: float | None
    orthogonality: float
    captured: float | None
    rank: int
    free: int


def certificate(
    a: Tensor,
    b: Tensor,
    q: Tensor,
    *,
    basis: Tensor | None = None,
    captured: float | None = None,
    delta: Tensor | None = None,
) -> Certificate:
    """[`certificates`][] for a single layer; the arguments are that layer's.

    Examples:
        >>> q = torch.tensor([[1.0], [0.0], [0.0]])
        >>> one = certificate(torch.tensor([[0.0, 1.0, 0.0]]), torch.ones(2, 1), q, captured=0.99)
        >>> one.leak, one.captured, one.rank, one.free
        (0.0, 0.99, 1, 2)
    """
    return certificates(
        [a],
        [b],
        [q],
        basis=None if basis is None else [basis],
        captured=None if captured is None else [captured],
        delta=None if delta is None else [delta],
    )[0]


def certificates(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    q: Sequence[Tensor],
    *,
    basis: Sequence[Tensor] | None = None,
    captured: Sequence[float] | None = None,
    delta: Sequence[Tensor] | None = None,
) -> list[Certificate]:
    r"""The retention certificate of every layer.

    $$
    \mathrm{leak} = \frac{\lVert B\,(A Q) \rVert_F}{\lVert B A \rVert_F}
    = \frac{\lVert \Delta W\, Q \rVert_F}{\lVert \Delta W \rVert_F}
    $$

    from the factors, in float64: forming ``ΔW`` in float32 first would hide a leak below 1e-7 under its own
    rounding. A constant factor (``alpha / r``, the depth scale) cancels.

    Args:
        a: ``[r_i, in_i]`` each.
        b: ``[out_i, r_i]`` each. All float32 or all float64.
        q: ``[in_i, k_i]`` each: what was protected while ``a`` and ``b`` were trained.
        basis: the basis as it is now (after its extension), ``[in_i, k'_i]`` each, for ``orthogonality``,
            ``rank`` and ``free``. Default ``q``.
        captured: fraction of the feature energy inside the basis, as [`Extension.fraction`][] gives it.
        delta: the change ``[out_i, in_i]`` that the stored weights really made, any float dtype: subtract in
            float64.

    Returns:
        One [`Certificate`][] per layer, all numbers brought over in one transfer.

    Raises:
        ValueError: lengths or shapes do not fit. TypeError: dtypes do not fit.

    Source: the guarantee of KeepLoRA, arXiv:2601.19659, sec. 3.2; stated there for exact arithmetic, measured
    here.

    Examples:
        >>> q = [torch.tensor([[1.0], [0.0]])]
        >>> round(certificates([torch.tensor([[3.0, 4.0]])], [torch.ones(2, 1)], q)[0].leak, 9)
        0.6
    """
    name = "certificates"
    a, b = matrices(name, "a", a, MASTER), matrices(name, "b", b, MASTER)
    same_length(name, a=a, b=b)
    protected = bases(name, "a", a, q)
    current = protected if basis is None else bases(name, "a", a, basis)
    for i, (rows, columns) in enumerate(zip(a, b, strict=True)):
        if columns.shape[1] != rows.shape[0]:
            raise ValueError(
                f"{name}: b[{i}] must have one column per row of a[{i}], got shapes "
                f"{list(columns.shape)} and {list(rows.shape)}."
            )
    fractions: list[float | None] = [None] * len(a) if captured is None else list(captured)
    changes: list[Tensor | None] = [None] * len(a) if delta is None else list(matrices(name, "delta", delta, FLOATS))
    same_length(name, a=a, captured=fractions, delta=changes)
    numbers = []
    for i, (rows, columns, kept, now) in enumerate(zip(a, b, protected, current, strict=True)):
        change = changes[i]
        if change is not None and list(change.shape) != [columns.shape[0], rows.shape[1]]:
            raise ValueError(
                f"{name}: delta[{i}] must be {[columns.shape[0], rows.shape[1]]} like b[{i}] @ a[{i}], got "
                f"{list(change.shape)}."
            )
        wide, keep = rows.double(), kept.double()
        left = columns.double()
        inner = _product_norm(left, wide @ keep), _product_norm(left, wide)
        rounded = torch.zeros_like(inner[0])
        if change is not None:
            moved = change.double()
            rounded = _ratio(torch.linalg.vector_norm(moved @ keep), torch.linalg.vector_norm(moved))
        numbers.append(torch.stack([_ratio(*inner), rounded, _off_identity(now)]))
    host = torch.stack(numbers).tolist() if numbers else []
    return [
        Certificate(
            leak=leak,
            leak_after_rounding=None if changes[i] is None else rounded,
            orthogonality=off,
            captured=fractions[i],
            rank=current[i].shape[1],
            free=current[i].shape[0] - current[i].shape[1],
        )
        for i, (leak, rounded, off) in enumerate(host)
    ]


def _product_norm(left: Tensor, right: Tensor) -> Tensor:
    # ‖LR‖ = ‖(triangular factor of L) R‖: r rows in place of `out` rows, without squaring as LᵀL would. On a GPU the
    # product is cheaper than the factorisation.
    if left.shape[0] > left.shape[1] and factorise.plan_for(left.device.type).qr:
        left = torch.linalg.qr(left, mode="r").R
    norm: Tensor = torch.linalg.vector_norm(left @ right)
    return norm


def _ratio(inside: Tensor, length: Tensor) -> Tensor:
    return torch.where(length == 0, torch.zeros_like(length), inside / length)  # NaN stays NaN


def _off_identity(q: Tensor) -> Tensor:
    if q.shape[1] == 0:
        return torch.zeros((), dtype=torch.float64, device=q.device)
    wide = q.double()
    gram = wide.T @ wide
    gram.diagonal().sub_(1)
    return gram.abs().amax()
