"""Second moments too large to keep: one-pass sketches of them, and what these add to a basis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keeplora.math import check
from keeplora.math.orthonormal import reorthogonalize
from keeplora.math.rank import fewest_directions_each
from keeplora.math.scale import powers, scaled
from keeplora.math.subspace import project
from keeplora.ops.check import MASTER, matrices, same_length

__all__ = ["Extension", "SketchedMoment", "extend_sketched", "nystrom"]


@dataclass(frozen=True)
class Extension:
    """The basis ``q [in, k']`` whose last ``added`` columns are new; ``captured`` of ``total`` energy lies
    inside it."""

    q: Tensor
    added: int
    captured: float
    total: float

    @property
    def fraction(self) -> float:
        """``captured / total``; 1 where there was no energy at all."""
        return self.captured / self.total if self.total > 0 else 1.0

    def of_size(self, power: float) -> Extension:
        """Of the moment itself, where this one is of its product with ``power``."""
        return self if power == 1 else replace(self, captured=self.captured / power, total=self.total / power)


@dataclass(frozen=True)
class SketchedMoment:
    """``C ≈ F Fᵀ`` from below (``C − F Fᵀ`` is positive semidefinite), ``factor F [in, w]`` with orthogonal columns
    of falling length, and the exact ``total = tr C``."""

    factor: Tensor
    total: float


def nystrom(y: Tensor, omega: Tensor, total: float) -> SketchedMoment:
    r"""The best approximation of ``C`` that its image ``Y = C Ω`` alone allows.

    $$ F F^T = Y (\Omega^T Y)^{+} Y^T \preceq C $$

    Energies found in ``F Fᵀ`` are therefore never more than those of ``C``: what a basis captures of it, it captures
    of the features. A shift ``C + ν I`` with ``ν = eps ‖Y‖₂`` keeps the pseudo-inverse stable and is taken out again;
    the bound holds up to ν.

    Args:
        y: ``[in, w]``, the accumulated ``Σ xᵀ(x Ω)``.
        omega: ``[in, w]``, the random test matrix. Float32 or float64.
        total: ``tr C``, summed on its own.

    Returns:
        The sketch, its factor in float64.

    Raises:
        ValueError: shapes differ, a value is NaN or infinite, or ``total`` is negative.
        TypeError: wrong dtype.

    Source: Tropp, Yurtsever, Udell & Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data", 2017, algorithm 3, arXiv:1706.05736.

    Examples:
        >>> c = torch.diag(torch.tensor([3.0, 1.0, 0.0]).double())
        >>> omega = torch.eye(3).double()[:, :2]
        >>> torch.allclose(nystrom(c @ omega, omega, 4.0).factor.square().sum(1), c.diagonal())
        True
    """
    matrices("nystrom", "y", [y, omega], MASTER)
    if y.shape != omega.shape:
        raise ValueError(f"nystrom: y must have the shape of omega, got {list(y.shape)} for {list(omega.shape)}.")
    check.finite("nystrom", "omega", [omega])
    _check_total("nystrom: total", total)
    (power,) = powers("nystrom", "y", [y])
    eps = torch.finfo(y.dtype).eps  # what y was accumulated with
    y, omega = scaled(y, power).double(), omega.double()
    # The shift covers the rounding of y, or the core would not be positive definite.
    shift = eps * torch.linalg.eigvalsh(y.T @ y)[-1].clamp_min(0).sqrt()
    shifted = y + shift * omega
    core = omega.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > eps * values.amax().clamp_min(0)
    root = torch.where(kept, values, 1).rsqrt() * kept
    u, s, _ = torch.linalg.svd(shifted @ (vectors * root), full_matrices=False)
    return SketchedMoment(u * ((s.square() - shift).clamp_min(0).sqrt() / power**0.5), float(total))


def _check_total(argument: str, total: float) -> None:
    if not (math.isfinite(total) and total >= 0):
        raise ValueError(f"{argument} must be finite and >= 0, got {total}. Pass the trace of C.")


def extend_sketched(
    q: Sequence[Tensor], moments: Sequence[SketchedMoment], feature_energy: float | Sequence[float]
) -> list[Extension]:
    r"""As [`keeplora.math.lowrank.extend_basis`][], from sketched moments.

    New directions are the leading left singular vectors of ``P F``. ``captured`` counts only energy that the sketch
    has seen, so it is a lower bound; where the sketch is too narrow to reach ``feature_energy``, all of it is taken.

    Args:
        q: ``[in_i, k_i]`` each, orthonormal columns.
        moments: one per layer.
        feature_energy: as there.

    Returns:
        One [`Extension`][] per layer.

    Raises:
        ValueError: lengths or shapes do not fit, ``feature_energy`` is outside [0, 1], or a number is NaN or infinite.

    Examples:
        >>> c = SketchedMoment(torch.diag(torch.tensor([5.0, 4.0, 1.0]).double().sqrt()), 10.0)
        >>> (new,) = extend_sketched([torch.tensor([[1.0], [0.0], [0.0]])], [c], 0.9)
        >>> new.added, new.fraction
        (1, 0.9)
    """
    name = "extend_sketched"
    q = matrices(name, "q", q, MASTER)
    same_length(name, q=q, moments=moments)
    shares = check.fractions(name, "feature_energy", feature_energy, len(q))
    check.finite(name, "q", q)
    sizes = powers(name, "moments", [moment.factor for moment in moments])
    result = []
    for i, (basis, moment, share) in enumerate(zip(q, moments, shares, strict=True)):
        _check_total(f"{name}: moments[{i}].total", moment.total)
        if moment.factor.shape[0] != basis.shape[0]:
            raise ValueError(
                f"{name}: moments[{i}] must have as many rows as q[{i}], got {list(moment.factor.shape)} for "
                f"{list(basis.shape)}."
            )
        of_size = SketchedMoment(scaled(moment.factor, sizes[i]), moment.total * sizes[i] ** 2)
        result.append(_extend(basis, of_size, share).of_size(sizes[i] ** 2))
    return result


def _extend(q: Tensor, moment: SketchedMoment, share: float) -> Extension:
    factor, total = moment.factor, moment.total
    held = min(float((q.double().T @ factor).square().sum()), total)
    if held >= share * total or q.shape[0] == q.shape[1]:
        return Extension(q, 0, held, total)
    left = project(project(factor.T, q.double()), q.double()).T
    u, s, _ = torch.linalg.svd(left, full_matrices=False)
    energies = s.square()
    floor = torch.finfo(q.dtype).eps * total
    count, _ = fewest_directions_each(
        energies[None],
        energies.new_tensor([total]),
        [share],
        captured=energies.new_tensor([held]),
        floor=energies.new_tensor([floor]),
    )
    (new,) = reorthogonalize([u[:, : int(count.item())].to(q.dtype)], [q])
    captured = held + float((new.double().T @ factor).square().sum())
    return Extension(torch.cat([q, new], dim=1), new.shape[1], min(captured, total), total)
