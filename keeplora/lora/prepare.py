"""One launch for all merged weights: they are formed together when the model's forward begins.

Without this every layer forms its own when it is called, which gives the same numbers. What was formed ahead is used
once, by the forward it was formed for, and only if nothing it was made from has changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapter import LoraHost
from .forward import Ahead, Part, compute_dtype

__all__ = ["merge_ahead"]


class _MergeAhead:
    """The hooks of one model. An object of its own, so that a deep copy of the model has its own hosts in it."""

    def __init__(self, hosts: Sequence[LoraHost]):
        self.hosts = list(hosts)
        self.known: list[tuple[LoraHost, str]] = []

    def begin(self, _model: nn.Module, _args: Any) -> None:
        # Without gradients a merged weight need not outlive its layer's call; in a compiled graph layers are on their
        # own.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        jobs: dict[torch.dtype, list[tuple[LoraHost, str, Tensor, list[Part]]]] = {}
        for host, parameter in self.known:
            weight, parts = host.merge_job(parameter)
            if parts:
                jobs.setdefault(compute_dtype(weight), []).append((host, parameter, weight, parts))
        for group in jobs.values():
            for (host, parameter, *_), ahead in zip(group, Ahead.of([job[2:] for job in group]), strict=True):
                host.merged_ahead[parameter] = ahead

    def end(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        """Forget what was not used, and learn which layers had to merge on their own."""
        unused = {(host, name) for host in self.hosts for name in host.merged_ahead}
        self.known = [job for job in self.known if job not in unused]
        for host in self.hosts:
            host.merged_ahead.clear()
            self.known += [(host, name) for name in sorted(host.to_merge) if (host, name) not in self.known]
            host.to_merge.clear()


def merge_ahead(model: nn.Module) -> list[RemovableHandle]:
    """Let every forward of ``model`` form its layers' merged weights in one call of the op; returns the hooks' handles.

    Only layers that merged on their own in an earlier forward take part, so the first one forms nothing ahead.

    Example:
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
