"""One launch for all merged weights of a device: they are formed together when the model's forward begins.

Without this every layer forms its own when it is called, which gives the same numbers. What was formed ahead is used
once, by the forward it was formed for, and only if nothing it was made from has changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .forward import Ahead, Part, compute_dtype, merge_job
from .host import LoraHost

__all__ = ["merge_ahead"]


class _MergeAhead:
    """The hooks of one model. An object of its own, so that a deep copy of the model has its own hosts in it."""

    def __init__(self, hosts: Sequence[LoraHost]):
        self.hosts = list(hosts)
        # Which weights to form, and in which dtype, by the dtype they would be formed in from outside of the forward:
        # autocast may be entered inside of it, as Accelerate does.
        self.known: dict[tuple[LoraHost, str, torch.dtype], torch.dtype] = {}

    def begin(self, _model: nn.Module, _args: Any) -> None:
        # Without gradients a merged weight need not outlive its layer's call; in a compiled graph layers are on their
        # own.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        jobs: dict[tuple[torch.dtype, torch.device], list[tuple[LoraHost, str, Tensor, list[Part]]]] = {}
        for (host, parameter, outside), inside in self.known.items():
            weight, parts = merge_job(host, parameter)
            if parts and compute_dtype(weight) == outside:
                jobs.setdefault((inside, weight.device), []).append((host, parameter, weight, parts))
        for (dtype, _), group in jobs.items():
            for (host, parameter, *_), ahead in zip(group, Ahead.of([job[2:] for job in group], dtype), strict=True):
                host.merged_ahead[parameter] = ahead

    def end(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        """Forget what was not used, and learn which layers had to merge on their own."""
        for host in self.hosts:
            for parameter in host.merged_ahead:
                self.known.pop((host, parameter, compute_dtype(getattr(host, parameter))), None)
            for parameter, inside in host.to_merge.items():
                self.known[host, parameter, compute_dtype(getattr(host, parameter))] = inside
            host.merged_ahead.clear()
            host.to_merge.clear()


def merge_ahead(model: nn.Module) -> list[RemovableHandle]:
    """Let every forward of ``model`` form its layers' merged weights in one call of the op; returns the hooks' handles.

    Only layers that merged on their own in an earlier forward take part, so the first one forms nothing ahead. A change
    between the start of a forward and a layer's turn in it is noticed by torch's version counters; one through
    ``.data`` that happens just there leaves no trace and counts from the next forward on.

    Examples:
        >>> from keeplora.lora import linear_targets, merge_ahead, wrap
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> slots = wrap(model, linear_targets(model))
        >>> handles = merge_ahead(model)
        >>> for handle in handles:
        ...     handle.remove()
    """
    hooks = _MergeAhead([module for module in model.modules() if isinstance(module, LoraHost)])
    return [
        model.register_forward_pre_hook(hooks.begin),
        model.register_forward_hook(hooks.end, always_call=True),
    ]
