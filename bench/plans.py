"""The ways to factorise as providers of one benchmark: on a GPU the choice is measured, not believed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from keeplora.math import factorise

PLANS = {
    "as on a CPU": factorise.CPU,
    "as on torch 2.11": factorise.CUDA_LOOPS,
    "iterated from 512": replace(factorise.CUDA, iterative_from=512),
    "never iterated": replace(factorise.CUDA, iterative_from=1 << 30),
}


def planned(plan: factorise.Plan, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` by another plan than its device's."""

    def run(*arguments: Any) -> Any:
        with patch.object(factorise, "plan_for", lambda device: plan):
            return call(*arguments)

    return run


def by_plan(call: Callable[..., Any], *, cuda: bool | None = None) -> dict[str, Callable[..., Any]]:
    """Providers for every plan beside the device's own; none without a GPU, where there is nothing to choose."""
    if not (torch.cuda.is_available() if cuda is None else cuda):
        return {}
    return {f"keeplora, {name}": planned(plan, call) for name, plan in PLANS.items()}
