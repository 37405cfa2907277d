"""Settings of methods that a configuration has no table for: one rate, LoRA's, and what is shared by all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from keeplora.methods import METHODS

__all__ = ["RATES", "SGD", "sibling"]

RATES: Mapping[str, float] = {
    "full": 0.17, "joint": 0.1, "lines": 0.057, "osf": 0.17, "inflora": 1.7, "o-lora": 0.6, "sd-lora": 1.0, "loda": 0.6,
    "dac": 11.0, "duallora": 1.0, "hdsd": 3.3, "keeplora": 1.0, "keeplora++": 1.7, "keeplora++cls": 1.0,
}  # fmt: skip
"""Learning rates as multiples of LoRA's: what the search on the embedded benchmark chose (``tools.sweep``). KeepLoRA's
are those of `keeplora compare`, since the search adapted fewer layers than its defaults do.

OSF, for which there was none, has that of full fine-tuning: it trains whole weights, too. Others have LoRA's rate.
"""
SGD: Mapping[str, float] = {"gpm": 0.01}
"""Learning rates of what is trained by SGD, which have nothing to do with Adam's: those of the public code."""


def sibling(label: str, shared: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Learning rate and settings of the registered method ``label``, of a table ``[every_method]``.

    Its ``learning_rate`` is LoRA's; of the other settings a method gets those that it has.

    >>> sibling("full", {"learning_rate": 1e-4, "r": 8})
    (1.7e-05, {})
    >>> sibling("lora", {"learning_rate": 1e-4, "r": 8})
    (0.0001, {'r': 8})
    """
    settings = {name: value for name, value in shared.items() if name != "learning_rate"}
    known = [entry.name for entry in fields(METHODS[label].config)] if label in METHODS else []
    rate = SGD.get(label) or float(f"{shared['learning_rate'] * RATES.get(label, 1.0):.2g}")
    return rate, {name: value for name, value in settings.items() if name in known}
