"""The library's one rank rule: how many directions a share of the energy asks for."""

import math

import torch
from torch import Tensor

__all__ = ["fewest_directions", "fewest_directions_each", "rounding_level"]


def fewest_directions(
    energies: Tensor,
    total: float | Tensor,
    share: float,
    *,
    captured: float = 0.0,
    floor: float | None = None,
) -> int:
    r"""The fewest leading directions that bring the captured energy to ``share`` of the total.

    $$ \min\,\bigl\{ j \ge 0 :\; c + \textstyle\sum_{i \le j} e_i \;\ge\; \varepsilon\,T - f \bigr\} $$

    with energies ``e``, already captured energy ``c``, total ``T``, share ``ε`` and rounding level ``f``.
    An energy that does not exceed the rounding level is noise and is never counted: the answer is at most the
    number of energies above ``f``, so a rank-deficient input is not filled up with noise directions at ``ε =
    1``. A share missed by no more than the rounding level counts as reached, so ties go to the fewer
    directions. ``ε = 0`` and ``T = 0`` give 0.

    Args:
        energies: ``[n]``, float32 or float64, each ≥ 0, descending (squared singular values or eigenvalues).
        total: Energy that ``share`` is a fraction of, ≥ 0, in the units of ``energies``. It may exceed
            ``captured + energies.sum()`` where only the leading energies are known.
        share: Fraction of ``total`` to reach, in [0, 1].
        captured: Energy that is captured already, ≥ 0, in the units of ``energies``.
        floor: Rounding level ``f``, ≥ 0, in the units of ``energies``. Default: ``eps * total`` with the machine
            epsilon of ``energies.dtype``, and at least the error ``n * 2**-52 * total`` of the sums.

    Returns:
        A number of directions in ``0 … n``.

    Raises:
        ValueError: A shape or value is outside the ranges above, or not finite.
        TypeError: ``energies`` is not float32 or float64.

    Source: the ``ε``-rank criterion of Gradient Projection Memory, Saha et al., ICLR 2021, eq. 9, as used by
    KeepLoRA, arXiv:2601.19659. The public codes use "first count below" and "first to reach" side by side;
    this is the only one here.

    Examples:
        >>> energies = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> [fewest_directions(energies, 10.0, t) for t in (0.0, 0.4, 0.41, 0.7, 1.0)]
        [0, 1, 2, 2, 4]
        >>> fewest_directions(energies, 20.0, 0.7, captured=10.0)
        1
        >>> fewest_directions(torch.tensor([1.0, 1e-12, 1e-13]), 1.0, 1.0)
        1
    """
    _check(energies, float(total), share, captured, floor)
    if energies.numel() == 0:
        return 0
    count, _ = fewest_directions_each(
        energies[None],
        torch.as_tensor(total, dtype=torch.float64, device=energies.device).reshape(1),
        [share],
        captured=energies.new_tensor([captured], dtype=torch.float64),
        floor=None if floor is None else energies.new_tensor([floor], dtype=torch.float64),
    )
    return int(count.item())


def fewest_directions_each(
    energies: Tensor,
    total: Tensor,
    shares: list[float],
    *,
    captured: Tensor | None = None,
    floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The rank rule for many layers at once, without a transfer to the host.

    Args:
        energies: ``[layers, n]``, descending along ``n``; shorter lists are filled up with zeros, which never
            count.
        total: ``[layers]`` float64.
        shares: one fraction per layer.
        captured: ``[layers]`` float64 or None.
        floor: ``[layers]`` float64 or None, as in [`fewest_directions`][].

    Returns:
        ``(count [layers] int64, reached [layers] bool)`` on the device of ``energies``. ``reached`` is False
        where even all the given energies leave that share out of reach: the caller knows too few of them.

    Values are not checked here, for that would need a transfer.

    Examples:
        >>> energies = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
        >>> fewest_directions_each(energies, torch.tensor([4.0, 10.0]), [0.75, 0.5])
        (tensor([1, 2]), tensor([ True, False]))
    """
    # n float64 additions err by up to n eps; the energies themselves by the eps of their dtype.
    rounding = max(torch.finfo(energies.dtype).eps, energies.shape[1] * torch.finfo(torch.float64).eps)
    level = rounding * total if floor is None else floor
    known = energies.double()
    needed = total * torch.tensor(shares, dtype=torch.float64, device=energies.device) - level
    start = torch.zeros_like(needed) if captured is None else captured
    reach = torch.cat([start[:, None], start[:, None] + known.cumsum(1)], dim=1)
    missing = (reach < needed[:, None]).sum(1)  # positions 0 … n that fall short; n + 1 when none reaches
    reached = missing <= energies.shape[1]
    significant = (known > level[:, None]).sum(1)
    return torch.minimum(missing, significant), reached


def rounding_level(c: Tensor) -> Tensor:
    r"""What rounding leaves of an eigenvalue that is 0: ``eps ‖C‖_F`` with the eps of C's dtype, as a float64 scalar.

    Args:
        c: ``[…, d, d]``. Its squares are summed in float64: those of float32 end at 1.8e19, which energies may pass.

    Examples:
        >>> rounding_level(torch.tensor([[3e30, 0.0], [0.0, 4e30]]))
        tensor(5.9605e+23, dtype=torch.float64)
    """
    norm: Tensor = torch.linalg.matrix_norm(c, dtype=torch.float64)
    return torch.finfo(c.dtype).eps * norm


def _check(energies: Tensor, total: float, share: float, captured: float, floor: float | None) -> None:
    name = "fewest_directions"
    if energies.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: energies must be float32 or float64, got {energies.dtype}. Convert them first.")
    if energies.dim() != 1:
        raise ValueError(f"{name}: energies must be [n], got shape {list(energies.shape)}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name}: share must lie in [0, 1], got {share}. Give a fraction, not a percentage.")
    scalars = {"total": total, "captured": captured, "floor": 0.0 if floor is None else floor}
    for argument, value in scalars.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: {argument} must be finite and >= 0, got {value}")
    if energies.numel() == 0:
        return
    host = energies.detach().cpu()
    if not bool(host.isfinite().all()) or bool((host < 0).any()):
        bad = int((~host.isfinite() | (host < 0)).nonzero()[0])
        raise ValueError(
            f"{name}: energies must be finite and >= 0, got {float(host[bad])} at {bad}. Clamp rounding below 0."
        )
    if bool((host[1:] > host[:-1]).any()):
        bad = int((host[1:] > host[:-1]).nonzero()[0])
        raise ValueError(
            f"{name}: energies must be descending, got {float(host[bad])} before "
            f"{float(host[bad + 1])} at {bad}. Sort them."
        )
