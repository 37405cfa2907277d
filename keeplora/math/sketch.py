"""Seeded randomized range finding: the row space of G P, and leading eigenvectors of large second moments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from keeplora.math import factorise
from keeplora.math.factorise import symmetric_eigh
from keeplora.math.orthonormal import complement, nearest_orthonormal
from keeplora.math.rank import fewest_directions_each
from keeplora.math.subspace import project
from keeplora.ops.declare import OPS
from keeplora.ops.precision import full_precision

__all__ = ["Enough", "gaussian", "leading_eigenvectors", "right_spectrum", "row_space", "worst_gains"]

_orthonormalize = OPS["orthonormalize"].call  # of numbers that the callers have found finite

NOISE_EPS = 10  # singular values up to this many eps of ‖G‖_F are what rounding leaves of zero


def gaussian(rows: int, cols: int, seed: int, like: Tensor) -> Tensor:
    """Standard normal ``[rows, cols]`` in dtype and on the device of ``like``, a function of the seed and
    shape alone.

    Own generator: the global one is neither read nor moved. The bits differ between kinds of devices.

    Examples:
        >>> torch.equal(gaussian(2, 3, 7, torch.empty(0)), gaussian(2, 3, 7, torch.empty(0)))
        True
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Enough:
    """Of further steps: when ``rank`` directions together would gain no more than ``together`` of their energy, and
    none of them may gain more than ``worst`` of its own."""

    rank: int
    together: float
    worst: float


def row_space(
    g: Tensor, q: Sequence[Tensor], width: int, *, steps: int, seed: int, enough: Enough | None = None
) -> tuple[Tensor, Tensor, RightSpectrum]:
    r"""Orthonormal columns whose span holds the leading right singular vectors of ``G P``, ``P = I − QQᵀ``.

    $$
    \mathrm{span}\,V = \mathrm{span}[Z_0, \dots, Z_s], \qquad Z_0 = P\,G^T \Omega, \quad
    Z_{j+1} = P\,G^T G Z_j, \qquad \Omega \sim N(0, 1)^{out \times width}
    $$

    Block Krylov iteration: every block is orthonormalised against ``Q`` and the blocks before it. Keeping the
    blocks costs no product with ``G`` and makes slowly falling spectra (``σ_i ~ i^-0.3``) as accurate with width
    ``r`` and 4 steps as subspace iteration is with width ``3 r`` and 4 steps. ``P`` is never formed.

    Args:
        g: ``[n, out, in]``.
        q: ``n`` bases ``[in, k_i]``.
        width: columns of a block.
        steps: ``s`` at most.
        seed: of ``Ω``, one for all layers of the batch, so that a layer's result does not depend on which layers are
            worked on together.
        enough: stops as soon as no more is expected to be gained. It looks at numbers after every step: for single
            layers on a CPU.

    Returns:
        ``(V [n, in, (s + 1)·width], G V, spectrum)`` with the ``s`` that was used; columns beyond a layer's rank are
        zero. ``spectrum`` is that of ``G V``, leading directions first.

    Source: Musco & Musco, "Randomized block Krylov methods", 2015, algorithm 2; the probe is that of Halko,
    Martinsson & Tropp, 2011.
    """
    held = [basis.shape[1] for basis in q]
    # Every basis with room for the blocks to come: joining them anew in every step would copy it each time.
    frames = [
        basis.new_empty(count + (steps + 1) * width, basis.shape[0]).T for basis, count in zip(q, held, strict=True)
    ]
    for frame, basis, count in zip(frames, q, held, strict=True):
        frame[:, :count] = basis
    images: list[Tensor] = []
    spectrum, together = None, 1.0
    image = gaussian(g.shape[1], width, seed, g).expand(len(g), -1, -1)
    with full_precision(g):
        for step in range(steps + 1):
            first, last = step * width, (step + 1) * width
            z = (image.mT @ g).mT  # in this layout both the product and what follows are fastest
            if enough is not None and spectrum is not None and together <= enough.together:
                left = project(z[0].mT, frames[0][:, : held[0] + first]).mT
                if float(_worst_gains(spectrum, left[None], enough.rank)) <= enough.worst:
                    break
            columns, _ = _orthonormalize(
                list(z), [frame[:, : k + first] for frame, k in zip(frames, held, strict=True)]
            )
            for frame, k, block in zip(frames, held, columns, strict=True):
                frame[:, k + first : k + last] = block
            image = g @ torch.stack(columns)
            images.append(image)
            if enough is not None and step >= 2:
                spectrum = right_spectrum(torch.cat(images, dim=2))
                together = _expected_gain(_leading_energies(spectrum, enough.rank, width))
        image = torch.cat(images, dim=2)
    v = torch.stack([frame[:, k : k + image.shape[2]] for frame, k in zip(frames, held, strict=True)])
    return v, image, spectrum or right_spectrum(image)


def whole_row_space(g: Tensor, q: Tensor, bases: list[Tensor]) -> Tensor:
    """``[n, in, min(out, in − k)]``: orthonormal columns that hold every row of ``G P``."""
    if g.shape[2] - q.shape[2] <= g.shape[1]:
        return complement(q.double()).to(g.dtype)
    return torch.stack(_orthonormalize(list(g.mT), bases)[0])


@dataclass(frozen=True)
class RightSpectrum:
    """``gram = MᵀM [n, columns, columns]``, its eigenvalues ``[n, columns]``, falling, and eigenvectors, in float64."""

    gram: Tensor
    values: Tensor
    vectors: Tensor


def right_spectrum(m: Tensor) -> RightSpectrum:
    """Of ``M [n, rows, columns]``: squared singular values and right singular vectors."""
    wide = m.double()
    gram = wide.mT @ wide
    values, vectors = symmetric_eigh(gram)
    return RightSpectrum(gram, values.flip(1), vectors.flip(2))


@dataclass(frozen=True)
class TopDirections:
    """``G P ≈ b diag(s) a``: ``a [r, in]`` orthonormal rows ⟂ Q, ``s [r]`` descending, ``b [out, r]``
    orthonormal columns."""

    a: Tensor
    s: Tensor
    b: Tensor


def triples(image: Tensor, v: Tensor, turn: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples of ``(G V) Vᵀ`` in float64, ``turn`` being the right singular vectors of ``G V``:
    ``(a [n, r, in], s [n, r], b [n, out, r])``."""
    turn = turn[:, :, :rank]
    # The squared problem gives directions; lengths and left vectors come from their images, so that b is
    # orthonormal also where singular values are small.
    left = image.double() @ turn
    if factorise.plan_for(image.device.type).qr or image.dtype == torch.float64:
        b, r = torch.linalg.qr(left)
        diagonal = r.diagonal(dim1=1, dim2=2)
        b, s = b * diagonal.sign()[:, None, :], diagonal.abs()
    else:
        # Of float32 numbers the columns are orthogonal to 2e-4 of their lengths, down to those that are noise.
        s = torch.linalg.vector_norm(left, dim=1)
        noise = NOISE_EPS * torch.finfo(image.dtype).eps * torch.linalg.vector_norm(s, dim=1, keepdim=True)
        b = nearest_orthonormal(left * torch.where(s > noise, 1 / s, 0)[:, None, :])
    a = F.normalize((v.double() @ turn).mT, dim=2)  # V is orthonormal to the rounding of its dtype only
    return a, s, b


def significant(a: Tensor, s: Tensor, b: Tensor, dtype: torch.dtype, norm: float, values: list[float]) -> TopDirections:
    """Those of the directions whose singular values ``values`` are more than rounding leaves of zero."""
    level = NOISE_EPS * torch.finfo(dtype).eps * norm
    r = sum(value > level for value in values)
    return TopDirections(a[:r].to(dtype), s[:r].to(dtype), b[:, :r].to(dtype))


def _leading_energies(spectrum: RightSpectrum, count: int, width: int) -> list[float]:
    """The energy that ``count`` directions can hold inside all blocks but the last two, all but the last, and all."""
    gram, sizes = spectrum.gram[0], [spectrum.gram.shape[1] - 2 * width, spectrum.gram.shape[1] - width]
    parts = [gram[:n, :n] for n in sizes]
    less = [float((m.diagonal() if len(m) <= count else torch.linalg.eigvalsh(m)[-count:]).sum()) for m in parts]
    return [*less, float(spectrum.values[0, :count].sum())]


def _expected_gain(energies: list[float]) -> float:
    """What all further steps will add, as a share of what there is, if gains go on shrinking by the factor they shrank
    by last."""
    first, second = energies[1] - energies[0], energies[2] - energies[1]
    if second <= 0:
        return 0.0
    ratio = min(second / first, 0.9) if first > 0 else 0.9
    return second * ratio / (1 - ratio) / energies[2]


def worst_gains(
    g: Tensor, q: Tensor, v: Tensor, image: Tensor, spectrum: RightSpectrum, width: int, count: int
) -> Tensor:
    """What the worst of ``count`` directions of every layer can still gain, after ``row_space``; one product.

    Args:
        q: ``[n, in, k]``, filled up with zeros.
        v: what it returned for ``g`` and these bases.
        image: what it returned for ``g`` and these bases.
        spectrum: what it returned for ``g`` and these bases.

    Returns:
        ``[n]`` in float64, shares of a direction's energy.
    """
    with full_precision(g):
        left = project(project(image[:, :, -width:].mT @ g, q), v).mT
        return _worst_gains(spectrum, left, count)


def _worst_gains(spectrum: RightSpectrum, left: Tensor, count: int) -> Tensor:
    r"""What the direction that has most to gain can still gain, as a share of its energy, to second order.

    $$ \lVert r_i \rVert^2 / (\theta_i (\theta_i - \theta_{count + 1})), \qquad r_i = P G^T G v_i - \theta_i v_i $$

    The worst counts, not the sum: an optimizer that rescales gradients learns along the last direction as fast as along
    the first, whose energy may hide all others'. ``left [n, in, width]`` is what ``P Gᵀ G`` of the last block has
    outside of all blocks: the residuals are combinations of its columns.
    """
    theta, turn = spectrum.values, spectrum.vectors[:, -left.shape[2] :, :count]
    residual = (left.double() @ turn).square().sum(1)
    noise = (NOISE_EPS * torch.finfo(left.dtype).eps) ** 2 * theta.sum(1, keepdim=True)
    used = theta[:, :count]
    gap = (used - theta[:, count : count + 1]).clamp_min(1e-3 * used)
    gain = (residual / gap / used).clamp(max=1.0)
    return torch.where(used > noise, gain, 0).amax(1)


# Of blocked iteration: a block is a quarter wider than the rank it is to certify, or its last directions converge
# slowly. It gives up when it would spend half of what the exact eigendecomposition costs, 17 d³ multiplications of
# float32 (measured, d = 1024 and 2048).
FIRST_WIDTH = 128
BLOCK_MARGIN = 1.25
MOST_COST = 10.0
LEAST_STEPS = 5  # a width that leaves room for fewer is not begun: three before the first look, and filters
ROUNDING = 1e-6  # of the total: float32 products cannot tell energies closer than this apart
SAFETY = 4.0
GROWTH = 1e8  # of the first column of a block beside its last, in a filter: float32 tells both apart afterwards
MOST_STEPS = 8  # of a filter


def leading_eigenvectors(
    c: Tensor, q: Tensor, *, total: float, share: float, captured: float, floor: float, seed: int
) -> tuple[Tensor, Tensor] | None:
    r"""The fewest leading eigenpairs of ``P C P`` that bring the captured energy to ``share`` of the total, or None if
    uncertain.

    Blocked subspace iteration with Rayleigh-Ritz values. The captured energy is certain: Ritz values are the
    energies ``vᵀCv`` of the returned columns. The rank is taken as certain when the energy of one direction
    fewer falls short by more than what its Ritz values can still gain,

    $$ \sum_{i < j} \lVert r_i \rVert^2 / (\theta_i - \mu), \qquad r_i = P C v_i - \theta_i v_i, $$

    the second-order perturbation of the eigenvalues with ``μ`` the first Ritz value outside the part that is
    used.

    Args:
        c: ``[d, d]`` symmetric, positive semidefinite.
        q: ``[d, k]``.
        total: energies as in ``keeplora.math.rank.fewest_directions``, ``share`` as there.
        captured: energies as in ``keeplora.math.rank.fewest_directions``, ``share`` as there.
        floor: energies as in ``keeplora.math.rank.fewest_directions``, ``share`` as there.

    Returns:
        ``(v [d, j], theta [j] float64)``, or None: then use the exact path.

    Source: Halko, Martinsson & Tropp 2011 (blocked iteration); Saad, "Numerical Methods for Large Eigenvalue
    Problems", 2011, sec. 4.3 (residual bounds).
    """
    with full_precision(c):
        return _leading(c, q, total, share, captured, floor, seed)


def _leading(
    c: Tensor, q: Tensor, total: float, share: float, captured: float, floor: float, seed: int
) -> tuple[Tensor, Tensor] | None:
    d, left = c.shape[0], MOST_COST
    needed = share * total - captured
    # Cauchy-Schwarz: j eigenvalues hold at most √j ‖C‖_F, a lower bound of the rank that needs no eigenvalue.
    least = (needed / float(torch.linalg.matrix_norm(c))) ** 2
    width = max(FIRST_WIDTH, int(BLOCK_MARGIN * least) + 16)
    v = gaussian(d, 0, seed, c)
    while LEAST_STEPS * _cost(width / d) <= left and width <= d - q.shape[1]:
        fresh = gaussian(d, width - v.shape[1], seed + width, c)
        v = torch.cat([v, project(fresh.mT, q).mT], dim=1)
        for step in itertools.count():
            left -= _cost(width / d)
            if left < 0:
                return None
            v = _orthonormalize([v], [q])[0][0]
            moved = project((c @ v).mT, q).mT
            if step < 2:  # Ritz values of a fresh block say little
                v = moved
                continue
            values, turn = symmetric_eigh((v.mT @ moved).double())
            theta, turn = values.flip(0).clamp_min(0), turn.flip(1).to(c.dtype)
            v, moved = v @ turn, moved @ turn
            count, reached = _rank(theta, total, share, captured, floor)
            wide = reached and BLOCK_MARGIN * count <= width
            if not wide and (step > 2 or width > d // 8):
                break  # a narrow block is looked at once more: how its energies fall says how wide it must be
            if wide:
                lacking = needed - floor - float(theta[: count - 1].sum())
                gain = SAFETY * _gain(v, moved, theta, count)
                if gain < lacking or gain < ROUNDING * total:
                    return v[:, :count], theta[:count]
            cut, degree = float(theta[-1]), _degree(theta, count)
            left -= 2 * (degree - 1) * width / d
            v = _filtered(c, q, v, moved, cut, degree)
        if not reached:
            count = width + _expected_beyond(theta, needed - float(theta.sum()), d)
        width = int(1.1 * BLOCK_MARGIN * count) + 32
        v = moved
    return None


def _degree(theta: Tensor, count: int) -> int:
    """Of the filter: as high as leaves float32 room for what the first column grows by beside the last wanted one."""
    bottom = theta[-1].clamp_min(float(theta[0]) * GROWTH**-0.5)
    first, last = (torch.acosh((2 * theta[i] / bottom - 1).clamp_min(1)) for i in (0, count - 1))
    return max(1, min(MOST_STEPS, int(math.log(GROWTH) / max(float(first - last), 1e-9))))


def _filtered(c: Tensor, q: Tensor, v: Tensor, moved: Tensor, cut: float, degree: int) -> Tensor:
    """``T_m(2 P C P / cut − I) V``: Chebyshev's polynomial stays within 1 up to ``cut`` and grows fastest beyond.

    ``moved`` is ``P C V``. Degree 1 is a step of plain iteration.
    """
    if degree == 1 or cut <= 0:
        return moved
    before, now = v, moved * (2 / cut) - v
    for _ in range(degree - 1):
        before, now = now, (4 / cut) * project((c @ now).mT, q).mT - 2 * now - before
    return now


def _expected_beyond(theta: Tensor, missing: float, d: int) -> int:
    """How many directions beyond the block hold ``missing`` if energies go on falling as the power of their position
    that they fall by from a quarter to half of it; nearer to its end they have not converged."""
    width = theta.shape[0]
    quarter, half = theta[[width // 4, width // 2]].clamp_min(torch.finfo(theta.dtype).tiny).tolist()
    beyond = torch.arange(width, d, dtype=theta.dtype, device=theta.device) / (width // 2)
    reach = (half * beyond ** math.log2(half / quarter)).cumsum(0)
    return int((reach < missing).sum())


def _cost(width: float) -> float:
    """Multiplications of one step with ``width · d`` columns, in d³: the product, factorisations, turns."""
    return 2 * width + 12 * width**2 + 20 * width**3


def _rank(theta: Tensor, total: float, share: float, captured: float, floor: float) -> tuple[int, bool]:
    total_, captured_, floor_ = theta.new_tensor([[total], [captured], [floor]])
    count, reached = fewest_directions_each(theta[None], total_, [share], captured=captured_, floor=floor_)
    return int(count.item()), bool(reached.item())


def _gain(v: Tensor, moved: Tensor, theta: Tensor, count: int) -> float:
    """Energy that all but the last of ``count`` Ritz vectors can still gain, to second order."""
    used = slice(0, count - 1)
    residual = (moved[:, used].double() - v[:, used].double() * theta[used]).square().sum(0)
    outside = theta[max(count, int(0.95 * theta.shape[0])) :][:1]
    return float((residual / (theta[used] - outside).clamp_min(torch.finfo(theta.dtype).tiny)).sum())
