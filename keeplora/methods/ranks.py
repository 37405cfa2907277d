"""Layers whose adapters are smaller than asked for, or missing: named by cause, with the advice that fits it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from keeplora._messages import listed, warn

__all__ = ["warn_of_ranks", "warn_of_unreached"]


def warn_of_unreached(
    function: str, names: Sequence[str], count: int, *, closing: bool, experts: Collection[str] = ()
) -> None:
    """Name the layers, of ``count`` that are adapted, that no token of the task's batches has come to.

    Args:
        function: What the user called.
        closing: Whether it closes a task.
        experts: Of all layers those to which tokens are routed: that none came to some is no fault of a loss function.
    """
    idle = [name for name in names if name in experts]
    names = [name for name in names if name not in experts]
    what = "What they learned is kept, and nothing more is protected there" if closing else "They learn nothing from it"
    if names:
        warn(
            f"{function}: no batch of the task reached {len(names)} of {count} adapted layers: {listed(names, 8)}. "
            f"{what}. Check that loss_fn runs their part of the model, or leave them out of target_modules."
        )
    if idle:
        warn(
            f"{function}: no token of the task was routed to {len(idle)} of {len(experts)} adapted weights of experts: "
            f"{listed(idle)}. {what}."
        )


def warn_of_ranks(
    function: str,
    names: Sequence[str],
    ranks: Sequence[int],
    wanted: Sequence[int],
    *,
    none: str,
    full: Collection[str] = (),
    silent: Collection[str] = (),
    unreached: Collection[str] = (),
    remedy: str = "",
) -> None:
    """Name the layers whose adapters have less than the ranks that were ``wanted``.

    Args:
        function: What speaks.
        none: What layers without an adapter have not.
        full: Those that have no free direction at all.
        silent: Those that get no gradient.
        unreached: Those that have been named already.
        remedy: For layers that lack room.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, rank, r in zip(names, ranks, wanted, strict=True):
        if rank >= r or name in unreached:
            continue
        how, advice = f"have fewer than r = {r} useful free directions and use those", remedy
        if name in silent:
            how, advice = "get no gradient and do not adapt", "Check that the loss depends on their outputs."
        elif rank == 0:
            how = f"have no {'free direction left' if name in full else none} and do not adapt"
        groups.setdefault((how, advice), []).append(name)
    for (how, advice), mine in groups.items():
        warn(f"{function}: {len(mine)} of {len(names)} layers {how}: {listed(mine)}. {advice}".rstrip())
