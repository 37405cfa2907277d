"""The method's three subspace computations: where a task wants to go, what a weight knows, what a task used."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from keeplora.math import check, factorise, sketch
from keeplora.math.batch import batched, padded, same_kind, stacked
from keeplora.math.factorise import symmetric_eigh
from keeplora.math.moment import Extension, SketchedMoment, extend_sketched
from keeplora.math.orthonormal import reorthogonalize
from keeplora.math.rank import fewest_directions_each, rounding_level
from keeplora.math.scale import powers, scaled
from keeplora.math.sketch import (
    Enough,
    TopDirections,
    leading_eigenvectors,
    right_spectrum,
    row_space,
    significant,
    triples,
)
from keeplora.math.subspace import shifts, spectrum_outside
from keeplora.math.wide import wide_gram, wide_image
from keeplora.ops.check import FLOATS, MASTER, matrices, same_length
from keeplora.ops.precision import full_precision

__all__ = ["Extension", "TopDirections", "directions_within", "extend_basis", "top_directions", "weight_basis"]

LEAST_WIDTH = 8  # columns of a block of the sketch, also for a rank below it
STEPS = 4
MOST_STEPS = 8  # where after those the worst direction may still gain
EXACT_SHARE = 0.8  # of the smaller side: from here on the exact factorisation is as fast as the sketch
ENOUGH_GAIN = 2e-4  # of the energy: what further steps would add is not worth them
ENOUGH_WORST = 0.1  # of a direction's energy: the most that the worst may gain; it gains a seventh of that (measured)


def top_directions(
    g: Sequence[Tensor],
    q: Sequence[Tensor],
    rank: int | Sequence[int],
    *,
    seed: int = 0,
    check_basis: bool = False,
) -> list[TopDirections]:
    r"""The leading singular triples of every ``G P``, ``P = I − QQᵀ``, without forming ``P``.

    $$ G P \approx U_r\, \mathrm{diag}(s)\, A, \qquad A A^T = I, \qquad A Q = 0 $$

    Randomized block Krylov SVD (``keeplora.math.sketch.row_space``, width ``r``, 4 steps, on a CPU fewer where they
    would add nothing, neither to all directions together nor to the worst; 8 for layers whose worst direction may still
    gain a tenth after those); where its space would be about as large as the matrix, the exact factorisation. Measured
    energy, as a fraction of the optimal: ≥ 0.9995 for ``σ_i ~ i^-0.3`` and all that fall faster, and ≥ 0.98 of
    directions ``i … r`` for every i, also where one direction holds nearly all of it. In float32 less (0.88) of
    directions that are 1e-4 as long as most of the r. Singular values at the rounding level of ``G`` are not
    directions: ``r`` shrinks, to 0 if ``G`` lies inside ``Q`` or nothing is left. ``g`` may be of any size: it is
    scaled by a power of two first.

    Args:
        g: ``[out_i, in_i]`` each, all float32 or all float64, finite.
        q: ``[in_i, k_i]`` each, orthonormal columns, dtype of ``g``; ``k_i`` from 0 to ``in_i``.
        rank: wanted directions, ``1 … in_i``; one number or one per layer.
        seed: of the random probes. Same seed, same bits, whatever the global generator did and whatever other
            layers are in the list.
        check_basis: also verify that ``q`` is orthonormal (costs a product per layer).

    Returns:
        One [`TopDirections`][] per layer, in the dtype of ``g``.

    Raises:
        ValueError: shapes, lengths, ``rank`` or values (NaN, infinite) break the rules above.
        TypeError: wrong dtype, or a single tensor in place of a list.

    Source: KeepLoRA's initialisation, arXiv:2601.19659, sec. 3.3; Halko, Martinsson & Tropp, "Finding structure
    with randomness", 2011; Musco & Musco, "Randomized block Krylov methods", 2015.

    Examples:
        >>> g = torch.tensor([[5.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
        >>> (top,) = top_directions([g], [torch.tensor([[1.0], [0.0], [0.0]])], 1)
        >>> top.a.abs(), top.s
        (tensor([[0., 1., 0.]]), tensor([3.]))
    """
    name = "top_directions"
    g = matrices(name, "g", g, MASTER)
    q = check.bases(name, "g", g, q)
    ranks = check.ranks(name, rank, [m.shape[1] for m in g])
    sizes = powers(name, "g", g)
    check.finite(name, "q", q)
    if check_basis:
        check.orthonormal(name, q)
    g = [scaled(*pair) for pair in zip(g, sizes, strict=True)]
    widths = [_width(m, b, r) for m, b, r in zip(g, q, ranks, strict=True)]
    kinds = [(m.shape, r if w else 0, 0 if w else b.shape[1]) for m, b, w, r in zip(g, q, widths, ranks, strict=True)]
    tops: dict[int, TopDirections] = {}
    for group in same_kind(kinds, g):
        with full_precision(*g):
            tops.update(_top(g, q, ranks, group, widths[group[0]], seed, STEPS))
    return [_of_size(tops[i], size) for i, size in enumerate(sizes)]


def directions_within(
    images: Sequence[Tensor], frames: Sequence[Tensor], rank: int | Sequence[int]
) -> list[TopDirections]:
    r"""The leading singular triples of every ``(G V) Vᵀ``, from the images ``G V`` alone.

    Where the rows of ``G`` lie nearly in the span of ``V``, those are nearly the triples of ``G``: Rayleigh-Ritz.

    Args:
        images: ``G V [out_i, w_i]`` each.
        frames: ``V [in_i, w_i]`` with orthonormal columns each; all float32 or all float64.
        rank: wanted directions, one number or one per layer; fewer where there are fewer.

    Returns:
        One [`TopDirections`][] per layer.

    Raises:
        ValueError, TypeError: as [`top_directions`][].

    Source: the second stage of Halko, Martinsson & Tropp, 2011, sec. 5.1.

    Examples:
        >>> frame = torch.tensor([[0.0], [1.0], [0.0]])
        >>> (top,) = directions_within([torch.tensor([[3.0], [4.0]])], [frame], 2)
        >>> top.a.abs(), top.s
        (tensor([[0., 1., 0.]]), tensor([5.]))
    """
    name = "directions_within"
    images, frames = matrices(name, "images", images, MASTER), matrices(name, "frames", frames, MASTER)
    same_length(name, images=images, frames=frames)
    sizes = powers(name, "images", images)
    check.finite(name, "frames", frames)
    ranks = [rank] * len(images) if isinstance(rank, int) else list(rank)
    same_length(name, images=images, rank=ranks)
    for i, (image, v) in enumerate(zip(images, frames, strict=True)):
        if image.shape[1] != v.shape[1] or image.dtype != v.dtype:
            raise ValueError(
                f"{name}: images[{i}] must have the columns and the dtype of frames[{i}], got {list(image.shape)} "
                f"{image.dtype} for {list(v.shape)} {v.dtype}."
            )
    images = [scaled(*pair) for pair in zip(images, sizes, strict=True)]
    tops: dict[int, TopDirections] = {}
    for group in same_kind([(*m.shape, len(v)) for m, v in zip(images, frames, strict=True)], images):
        image, v = stacked(images, group), stacked(frames, group)
        with full_precision(image):
            most = min(max(ranks[i] for i in group), *image.shape[1:])
            a, s, b = triples(image, v, right_spectrum(image).vectors, most)
            host = torch.cat([torch.linalg.matrix_norm(image).double()[:, None], s], dim=1).tolist()
        for j, (i, (norm, *values)) in enumerate(zip(group, host, strict=True)):
            tops[i] = significant(a[j], s[j], b[j], image.dtype, norm, values[: ranks[i]])
    return [_of_size(tops[i], size) for i, size in enumerate(sizes)]


def _of_size(top: TopDirections, power: float) -> TopDirections:
    """Of the matrix itself, not of its product with ``power``."""
    return top if power == 1 else replace(top, s=top.s / power)


def _width(g: Tensor, q: Tensor, rank: int, steps: int = STEPS) -> int:
    """Columns of the sketch; 0 for the exact path."""
    side = min(g.shape[0], g.shape[1] - q.shape[1])
    width = max(LEAST_WIDTH, rank)
    return 0 if (steps + 1) * width >= EXACT_SHARE * side else width


def _top(
    all_g: list[Tensor], all_q: list[Tensor], ranks: list[int], group: list[int], width: int, seed: int, steps: int
) -> Iterator[tuple[int, TopDirections]]:
    g, bases = stacked(all_g, group), [all_q[i] for i in group]
    rank = max(ranks[i] for i in group)
    gains = g.new_zeros(len(group), dtype=torch.float64)
    if width:
        enough = None if batched(all_g[group[0]]) else Enough(rank, ENOUGH_GAIN, ENOUGH_WORST)
        v, image, spectrum = row_space(g, bases, width, steps=steps, seed=seed, enough=enough)
        if steps < MOST_STEPS and v.shape[2] == (steps + 1) * width:  # it has not stopped because it was enough
            gains = sketch.worst_gains(g, padded(all_q, group), v, image, spectrum, width, rank)
    else:
        v = sketch.whole_row_space(g, padded(all_q, group), bases)
        image = g @ v
        spectrum = right_spectrum(image)
    a, s, b = triples(image, v, spectrum.vectors, rank)
    host = torch.cat([torch.linalg.matrix_norm(g).double()[:, None], gains[:, None], s], dim=1).tolist()
    for j, (i, (norm, gain, *values)) in enumerate(zip(group, host, strict=True)):
        if gain > ENOUGH_WORST:
            more = _width(all_g[i], all_q[i], ranks[i], MOST_STEPS)
            yield from _top(all_g, all_q, ranks, [i], more, seed, MOST_STEPS)
            continue
        yield i, significant(a[j], s[j], b[j], g.dtype, norm, values[: ranks[i]])


def weight_basis(w: Sequence[Tensor], weight_energy: float | Sequence[float], *, side: str = "input") -> list[Tensor]:
    r"""What a pretrained weight knows: its fewest leading singular vectors that hold ``weight_energy``
    of ``‖W‖_F²``.

    $$
    W = U \Sigma V^T, \qquad Q = V_{:, :k}, \qquad
    k = \min\,\{ j : \textstyle\sum_{i \le j} \sigma_i^2 \ge \varepsilon \sum_i \sigma_i^2 \}
    $$

    From the Gram matrix of the smaller side in float64: squaring a float32 matrix loses nothing there, and rank and
    energy are float64's up to ``weight_energy = 1``. Large sides (``keeplora.math.factorise.Plan``) first try blocked
    subspace iteration, which wins where the rank is small.

    Args:
        w: ``[out_i, in_i]`` each, any float dtype, finite.
        weight_energy: ``ε_w`` in [0, 1]; one number or one per layer. 0 protects nothing.
        side: "input" protects input directions, as the method needs. "output" takes ``U`` in their place, for square
            matrices: only to repeat the public CLIP code of KeepLoRA, which does so by mistake.

    Returns:
        ``[in_i, k_i]`` with orthonormal columns each; float64 for float64 weights, else float32.

    Raises:
        ValueError: an argument breaks the rules above; a matrix is not square with ``side="output"``.
        TypeError: wrong dtype, or a single tensor in place of a list.

    Source: KeepLoRA, arXiv:2601.19659, sec. 3.1; KeepLoRA++, arXiv:2606.16256.

    Examples:
        >>> (q,) = weight_basis([torch.diag(torch.tensor([1.0, 3.0, 2.0]))], 0.9)
        >>> q.abs()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])
    """
    name = "weight_basis"
    w = matrices(name, "w", w, FLOATS, uniform=False)
    shares = check.fractions(name, "weight_energy", weight_energy, len(w))
    if side not in ("input", "output"):
        raise ValueError(f'{name}: side must be "input" or "output", got {side!r}.')
    for i, matrix in enumerate(w):
        if side == "output" and matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f'{name}: w[{i}] must be square for side="output", got shape {list(matrix.shape)}. '
                f'Output directions cannot protect inputs; use side="input".'
            )
    sizes = powers(name, "w", w)
    bases: dict[int, Tensor] = {}
    for group in same_kind([(m.shape, m.dtype, _alone(i, m, min(m.shape))) for i, m in enumerate(w)], w):
        wide = torch.float64 if w[group[0]].dtype == torch.float64 else torch.float32
        batch = stacked([scaled(w[i].to(wide), sizes[i]) for i in group], range(len(group)))
        with full_precision(batch):
            bases.update(_weight(batch.mT if side == "output" else batch, group, [shares[i] for i in group]))
    return [bases[i] for i in range(len(w))]


def _weight(w: Tensor, group: list[int], shares: list[float]) -> Iterator[tuple[int, Tensor]]:
    tall = w.shape[1] >= w.shape[2]
    factor = w if tall else w.mT
    eps = torch.finfo(w.dtype).eps
    if _alone(group[0], w, factor.shape[2]) is not None:
        gram = factor[0].mT @ factor[0]
        energy = float(gram.diagonal().double().sum())
        pairs = energy > 0 and leading_eigenvectors(
            gram, gram[:, :0], total=energy, share=shares[0], captured=0.0, floor=eps * energy, seed=0
        )
        if pairs:
            yield group[0], _to_input(w, [pairs[0]], tall)[0]
            return
        del gram
    values, vectors = symmetric_eigh(wide_gram(factor))
    values, vectors = values.flip(1).clamp_min(0), vectors.flip(2)
    total = values.sum(1)
    # Rounding of the entries of W moves its singular values by eps ‖W‖_F, so energies by eps² of the total; the
    # Gram matrix itself is rounded to a few eps of float64.
    floor = max(eps**2, 16 * torch.finfo(torch.float64).eps) * total
    count, _ = fewest_directions_each(values, total, shares, floor=floor)
    kept = [vectors[j, :, :k] for j, k in enumerate(count.tolist())]
    yield from zip(group, _to_input(w, kept, tall), strict=True)


def _alone(i: int, matrix: Tensor, side: int) -> int | None:
    """``i`` where subspace iteration is tried for the matrix, which works on one at a time; else None."""
    return i if side >= factorise.plan_for(matrix.device.type).iterative_from else None


def _to_input(w: Tensor, vectors: list[Tensor], tall: bool) -> list[Tensor]:
    """Input-side bases from orthonormal eigenvectors of the smaller side."""
    if not tall:
        images = [wide_image(m, v) for m, v in zip(w, vectors, strict=True)]
        return [basis.contiguous() for basis in reorthogonalize(images)]
    return [v.to(w.dtype).contiguous() for v in vectors]


def extend_basis(
    q: Sequence[Tensor],
    c: Sequence[Tensor | SketchedMoment],
    feature_energy: float | Sequence[float],
    *,
    check_basis: bool = False,
) -> list[Extension]:
    r"""Extend every basis by the fewest directions with which it captures the share ``feature_energy``.

    $$
    \frac{\mathrm{tr}([Q, V]^T C\, [Q, V])}{\mathrm{tr}\, C} \ge \varepsilon, \qquad
    V = \text{leading eigenvectors of } P C P
    $$

    The eigenproblem is solved in float64 inside the complement of ``Q`` (``in − k`` rows: it gets cheaper with every
    task, and eigenvectors cannot lean into ``Q``). On a GPU layers of one width are solved together whatever their k,
    with ``Q`` moved to negative eigenvalues; many inputs, from 1536 on, by blocked subspace iteration where its rank is
    certain, every block orthonormalised against ``Q`` (``keeplora.math.factorise.Plan``). The old columns are kept
    bit for bit. Eigenvalues at the rounding level ``eps ‖C‖_F`` are not directions.

    Args:
        q: ``[in_i, k_i]`` each, orthonormal columns.
        c: ``[in_i, in_i]`` each, ``Σ xᵀx`` of the layer's inputs, symmetric positive semidefinite, same dtype: all
            float32 or all float64. Or a sketch of it each: then as [`keeplora.math.moment.extend_sketched`][].
        feature_energy: ``ε_f`` in [0, 1]; one number or one per layer.
        check_basis: also verify that ``q`` is orthonormal (costs a product per layer).

    Returns:
        One [`Extension`][] per layer. ``added = 0`` where the basis captures enough already or ``C = 0``.

    Raises:
        ValueError: an argument breaks the rules above; ``c`` is not symmetric positive semidefinite up to rounding.
        TypeError: wrong dtype, or a single tensor in place of a list.

    Source: KeepLoRA, arXiv:2601.19659, sec. 3.4; Gradient Projection Memory, Saha et al., ICLR 2021, sec. 5.

    Examples:
        >>> c = torch.diag(torch.tensor([5.0, 1.0, 4.0]))
        >>> (new,) = extend_basis([torch.tensor([[1.0], [0.0], [0.0]])], [c], 0.9)
        >>> new.q.abs(), new.added, new.fraction
        (tensor([[1., 0.],
                [0., 0.],
                [0., 1.]]), 1, 0.9)
    """
    name = "extend_basis"
    sketches = [m for m in c if isinstance(m, SketchedMoment)]
    if sketches:
        if len(sketches) < len(c):
            raise TypeError(
                f"{name}: c must be all matrices or all sketches, got {len(sketches)} of {len(c)} sketched."
            )
        return extend_sketched(q, sketches, feature_energy)
    moments = matrices(name, "c", [m for m in c if not isinstance(m, SketchedMoment)], MASTER)
    for i, matrix in enumerate(moments):
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"{name}: c[{i}] must be square, got shape {list(matrix.shape)}. Pass xᵀx, not x.")
    q = check.bases(name, "c", moments, q)
    shares = check.fractions(name, "feature_energy", feature_energy, len(moments))
    sizes = powers(name, "c", moments)
    check.finite(name, "q", q)
    check.second_moments(name, moments)
    if check_basis:
        check.orthonormal(name, q)
    moments = [scaled(*pair) for pair in zip(moments, sizes, strict=True)]
    extensions: dict[int, Extension] = {}
    for group in same_kind([_kind_of_extension(i, b) for i, b in enumerate(q)], moments):
        with full_precision(*moments):
            extensions.update(_extend(moments, q, shares, group))
    return [extensions[i].of_size(size) for i, size in enumerate(sizes)]


def _kind_of_extension(i: int, q: Tensor) -> tuple[int | None, ...]:
    """What layers that are solved together have in common."""
    d, k = q.shape
    return d, None if shifts(q) else k, _alone(i, q, d - k)


def _extend(
    all_c: list[Tensor], all_q: list[Tensor], all_shares: list[float], group: list[int]
) -> Iterator[tuple[int, Extension]]:
    c, q, shares = stacked(all_c, group), padded(all_q, group), [all_shares[i] for i in group]
    total = c.diagonal(dim1=1, dim2=2).double().sum(1)
    held = ((c @ q) * q).double().sum((1, 2)).clamp_min(0)
    floor = rounding_level(c)
    host = torch.stack([total, held], dim=1).tolist()
    if all(h >= share * e for (e, h), share in zip(host, shares, strict=True)):
        vectors, values, count = q[:, :, :0], total[:, None][:, :0], [0] * len(group)
    else:
        vectors, values, count = _new_directions(c, q, total, shares, held, floor)
    energies = values.cumsum(1).tolist()
    for j, (i, added) in enumerate(zip(group, count, strict=True)):
        new = torch.cat([all_q[i], vectors[j, :, :added].to(c.dtype)], dim=1)
        captured = host[j][1] + (energies[j][added - 1] if added else 0.0)
        yield i, Extension(new, added, min(captured, host[j][0]), host[j][0])


def _new_directions(
    c: Tensor, q: Tensor, total: Tensor, shares: list[float], held: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    d, k = q.shape[1:]
    if _alone(0, c, d - k) is not None:
        pairs = leading_eigenvectors(
            c[0],
            q[0],
            total=float(total),
            share=shares[0],
            captured=float(held),
            floor=float(floor),
            seed=0,
        )
        if pairs:
            return pairs[0][None], pairs[1][None], [pairs[1].shape[0]]
    values, vectors = spectrum_outside(c, q, floor / torch.finfo(c.dtype).eps)
    count, _ = fewest_directions_each(values, total, shares, captured=held, floor=floor)
    return vectors, values, count.tolist()
