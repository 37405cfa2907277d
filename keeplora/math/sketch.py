"""Seeded randomized range finding: the row space of G P, and leading eigenvectors of large second moments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from keeplora.math.rank import fewest_directions_each
from keeplora.math.subspace import project
from keeplora.ops import orthonormalize

__all__ = ["gaussian", "leading_eigenvectors", "row_space"]


def gaussian(rows: int, cols: int, seed: int, like: Tensor) -> Tensor:
    """Standard normal ``[rows, cols]`` in dtype and on the device of ``like``, a function of the seed and
    shape alone.

    Own generator: the global one is neither read nor moved. The bits differ between kinds of devices.

    Example:
        >>> torch.equal(gaussian(2, 3, 7, torch.empty(0)), gaussian(2, 3, 7, torch.empty(0)))
        True
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=like.dtype, device=like.device)


def row_space(g: Tensor, q: Sequence[Tensor], width: int, *, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    r"""Orthonormal columns whose span holds the leading right singular vectors of ``G P``, ``P = I − QQᵀ``.

    .. math:: \mathrm{span}\,V = \mathrm{span}[Z_0, \dots, Z_s], \qquad Z_0 = P\,G^T \Omega, \quad
              Z_{j+1} = P\,G^T G Z_j, \qquad \Omega \sim N(0, 1)^{out \times width}

    Block Krylov iteration: every block is orthonormalised against ``Q`` and the blocks before it. Keeping the
    blocks costs no product with ``G`` and makes slowly falling spectra (``σ_i ~ i^-0.3``) as accurate with width
    ``r`` and 4 steps as subspace iteration is with width ``3 r`` and 4 steps. ``P`` is never formed.

    Args:
        g: ``[n, out, in]``. q: ``n`` bases ``[in, k_i]``.
        width: columns of a block. steps: ``s``. seed: of ``Ω``, one for all layers of the batch, so that a
            layer's result does not depend on which layers are worked on together.

    Returns:
        ``(V [n, in, (s + 1)·width], G V)``; columns beyond a layer's rank are zero.

    Source: Musco & Musco, "Randomized block Krylov methods", 2015, algorithm 2; the probe is that of Halko,
    Martinsson & Tropp, 2011.
    """
    z = g.mT @ gaussian(g.shape[1], width, seed, g)
    taken = list(q)
    blocks: list[Tensor] = []
    images: list[Tensor] = []
    for _ in range(steps + 1):
        columns, _ = orthonormalize(list(z), taken)
        taken = [torch.cat(pair, dim=1) for pair in zip(taken, columns, strict=True)]
        blocks.append(torch.stack(columns))
        images.append(g @ blocks[-1])
        z = g.mT @ images[-1]
    return torch.cat(blocks, dim=2), torch.cat(images, dim=2)


# Width is doubled while the energy is not reached. Beyond a third of the space, or when the ranks are not
# certain after the last step, the exact eigendecomposition costs as much as what was gained.
FIRST_WIDTH = 128
WIDEST = 1 / 3
STEPS = 10
OVERSAMPLE = 1.25
ROUNDING = 1e-6  # of the total: float32 products cannot tell energies closer than this apart
SAFETY = 4.0


def leading_eigenvectors(
    c: Tensor, q: Tensor, *, total: float, threshold: float, captured: float, floor: float, seed: int
) -> tuple[Tensor, Tensor] | None:
    r"""The fewest leading eigenpairs of ``P C P`` that bring the captured energy to ``threshold``, or None if
    uncertain.

    Blocked subspace iteration with Rayleigh-Ritz values. The captured energy is certain: Ritz values are the
    energies ``vᵀCv`` of the returned columns. The rank is taken as certain when the energy of one direction
    fewer falls short of the target by more than what its Ritz values can still gain,

    .. math:: \sum_{i < j} \lVert r_i \rVert^2 / (\theta_i - \mu), \qquad r_i = P C v_i - \theta_i v_i,

    the second-order perturbation of the eigenvalues with ``μ`` the first Ritz value outside the part that is
    used.

    Args:
        c: ``[d, d]`` symmetric, positive semidefinite. q: ``[d, k]``. total, captured, floor: energies as in
            :func:`keeplora.math.rank.fewest_directions`, ``threshold`` as there.

    Returns:
        ``(v [d, j], theta [j] float64)``, or None: then use the exact path.

    Source: Halko, Martinsson & Tropp 2011 (blocked iteration); Saad, "Numerical Methods for Large Eigenvalue
    Problems", 2011, sec. 4.3 (residual bounds).
    """
    d, free = c.shape[0], c.shape[0] - q.shape[1]
    need = threshold * total - captured
    # Cauchy-Schwarz: j eigenvalues hold at most √j ‖C‖_F, a lower bound of the rank that needs no eigenvalue.
    least = (max(need, 0.0) / float(torch.linalg.matrix_norm(c))) ** 2
    width = max(FIRST_WIDTH, int(OVERSAMPLE * least) + 16)
    v = gaussian(d, 0, seed, c)
    while width <= WIDEST * free:
        fresh = gaussian(d, width - v.shape[1], seed + width, c)
        v = torch.cat([v, project(fresh.mT, q).mT], dim=1)
        reached = False
        for step in range(STEPS):
            v = orthonormalize([v], [q])[0][0]
            moved = project((c @ v).mT, q).mT
            if step == 0:
                v = moved
                continue
            theta, turn = torch.linalg.eigh((v.mT @ moved).double())
            theta, turn = theta.flip(0).clamp_min(0), turn.flip(1).to(c.dtype)
            count, hit, gain, gap = _state(v @ turn, moved @ turn, theta, total, threshold, captured, floor)
            reached = hit and OVERSAMPLE * count <= width
            if reached and (gain < gap or gain < ROUNDING * total):
                return (v @ turn)[:, :count], theta[:count]
            if not reached and step >= 2 and not hit:
                break
            v = moved @ turn
        else:
            if reached:
                return None
        width = 2 * width
    return None


def _state(
    v: Tensor, moved: Tensor, theta: Tensor, total: float, threshold: float, captured: float, floor: float
) -> tuple[int, bool, float, float]:
    """(directions wanted, are they enough, energy one fewer can still gain, energy it lacks)."""

    def scalar(x: float) -> Tensor:
        return theta.new_tensor([x])

    count, hit = fewest_directions_each(
        theta[None], scalar(total), [threshold], captured=scalar(captured), floor=scalar(floor)
    )
    j = int(count.item())
    outside = theta[min(theta.shape[0] - 1, max(j, int(0.95 * theta.shape[0])))]
    residual = (moved[:, : max(j - 1, 0)] - v[:, : max(j - 1, 0)] * theta[: max(j - 1, 0)].to(v.dtype)).double()
    gains = residual.square().sum(0) / (theta[: max(j - 1, 0)] - outside).clamp_min(1e-12 * total)
    lacking = threshold * total - floor - captured - theta[: max(j - 1, 0)].sum()
    return j, bool(hit.item()), SAFETY * float(gains.sum()), float(lacking)
