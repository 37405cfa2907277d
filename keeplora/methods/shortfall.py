"""Bases that hold less of a task's features than the config asks for: who trains on must know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from keeplora._messages import listed, warn
from keeplora.math.lowrank import Extension

__all__ = ["warn_of_shortfall"]


def warn_of_shortfall(config: Any, names: Sequence[str], new: Sequence[Extension], shares: Sequence[float]) -> None:
    """Name the layers whose basis, with all that was added, holds less of the feature energy than ``shares`` ask for.

    What rounding leaves of directions that do not exist is not missed: up to eps for each, of the energy.
    """
    missing = [
        (share - extension.fraction, name)
        for name, extension, share in zip(names, new, shares, strict=True)
        if extension.fraction < share - len(extension.q) * torch.finfo(torch.float32).eps
    ]
    if not missing:
        return
    missing.sort(key=lambda pair: -pair[0])
    worst = names.index(missing[0][1])
    sketched = getattr(config, "feature_statistic", None) == "sketch"
    remedy = f"Raise sketch_share, {config.sketch_share:g}, or take another statistic." if sketched else ""
    warn(
        f"{type(config).__name__}: feature_energy must be protected in every layer, got less in {len(missing)} of "
        f"{len(names)}, {new[worst].fraction:.3f} of {shares[worst]:g} in the worst: "
        f"{listed([name for _, name in missing])}. {remedy}".rstrip()
    )
