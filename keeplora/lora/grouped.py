"""Products of many experts with the rows that are each one's own, with their adapters.

They are factored unless ``"merged"`` is asked for, which forms and keeps a second copy of all experts' weights in every
forward, also of those that few tokens come to.

Rows lie in the order of the experts. On a GPU, and where transformers does so, one grouped product serves all; a loop
over experts where it was asked for (``experts_implementation="eager"``), and where torch has no grouped product: for
float64, and for sizes that are no multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keeplora.ops.declare import OPS

from .adapter import LoraAdapter
from .forward import ForwardMode, narrow

__all__ = ["Groups", "Stack", "grouped_linear"]

_merge, _grads = OPS["merge_weights"].call, OPS["lora_grad_b"].call
_ALIGNED = 16
"""Bytes that rows of a grouped product's operands are multiples of."""


@dataclass(frozen=True)
class Groups:
    """Which rows each expert has: those up to ``ends [experts]``, from where the one before it ends.

    Attributes:
        ends: int32, on the rows' device.
        loops: Whether products are formed one expert after the other.
    """

    ends: Tensor
    loops: bool

    @staticmethod
    def of(ids: Tensor, experts: int, *, loops: bool) -> Groups:
        """The groups of rows whose experts are ``ids [rows]``, in ascending order."""
        every = torch.arange(experts, device=ids.device, dtype=ids.dtype)
        return Groups(torch.searchsorted(ids, every, right=True, out_int32=True), loops)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First row and the one after the last, of every expert; the host waits for them."""
        ends = self.ends.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def split(self, rows: Tensor) -> list[Tensor]:
        """Every expert's rows: views."""
        return list(torch.split(rows, [stop - start for start, stop in self.spans]))

    def ids(self, rows: int) -> Tensor:
        """The expert of each of the ``rows``."""
        counts = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        return torch.repeat_interleave(counts, output_size=rows)


@dataclass(frozen=True)
class Stack:
    """Weights ``[experts, out, in]``, or ``[experts, in, out]``, with biases ``[experts, out]`` or None."""

    weight: Tensor
    transposed: bool
    bias: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """``(out, in)``."""
        rows, columns = self.weight.shape[1:]
        return (columns, rows) if self.transposed else (rows, columns)

    def swapped(self) -> Stack:
        """The transposed weights, without biases."""
        return Stack(self.weight, not self.transposed)


def grouped_linear(
    x: Tensor,
    stack: Stack,
    groups: Groups,
    adapters: Sequence[LoraAdapter | None],
    mode: ForwardMode,
    dtype: torch.dtype,
) -> Tensor:
    """``x_e W_eᵀ + b_e`` of every expert e and its rows of ``x [rows, in]``, with the adapters that there are.

    Args:
        dtype: What is multiplied in.
    """
    stack, x = Stack(stack.weight.to(dtype), stack.transposed, stack.bias), x.to(dtype)
    held = [adapter for adapter in adapters if adapter is not None]
    if held and mode == "merged" and _can_merge(stack, held):
        merged = Stack(_merged(stack, adapters), stack.transposed)
        origin = [adapter.B for adapter in held]
        y: Tensor = _Merged.apply(x, merged.weight, merged.transposed, groups, adapters, *origin)
        return _biased(y, stack, groups)
    y = _biased(_product(x, stack, groups), stack, groups)
    if not held:
        return y
    if all(type(adapter) is LoraAdapter for adapter in held) and _groups_fit(x, stack, groups):
        return y + _stacked_updates(x, groups, adapters)
    parts = [
        out if adapter is None or not len(rows) else out + adapter(rows)
        for out, rows, adapter in zip(groups.split(y), groups.split(x), adapters, strict=True)
    ]
    return torch.cat(parts)


def _biased(y: Tensor, stack: Stack, groups: Groups) -> Tensor:
    return y if stack.bias is None else y + stack.bias.to(y.dtype)[groups.ids(len(y))]


def _product(x: Tensor, stack: Stack, groups: Groups) -> Tensor:
    """``x_e W_eᵀ`` for every expert and its rows."""
    if _groups_fit(x, stack, groups):
        weight = stack.weight if stack.transposed else stack.weight.transpose(1, 2)
        return F.grouped_mm(x, weight, offs=groups.ends)
    matrices = stack.weight.unbind(0)
    parts = [
        rows @ matrix if stack.transposed else F.linear(rows, matrix)
        for rows, matrix in zip(groups.split(x), matrices, strict=True)
        if len(rows)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, stack.size[0])


def _groups_fit(x: Tensor, stack: Stack, groups: Groups) -> bool:
    """Whether torch has a grouped product for these."""
    if groups.loops or x.dtype == torch.float64 or not len(x):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return all(size * x.element_size() % _ALIGNED == 0 for size in stack.size)


# ---------------------------------------------------------------------- factored


def _stacked_updates(x: Tensor, groups: Groups, adapters: Sequence[LoraAdapter | None]) -> Tensor:
    """``c_e (x_e A_eᵀ)(B_e − B_{0,e})ᵀ`` of every expert, in two grouped products."""
    held = [adapter for adapter in adapters if adapter is not None]
    multiple = _ALIGNED // x.element_size()
    rank = -(-max(adapter.rank for adapter in held) // multiple) * multiple
    a = torch.stack([_of_rank(adapter, rank, held[0]) for adapter in adapters])
    b = torch.stack([_up(adapter, rank, held[0]) for adapter in adapters])
    dropout = held[0].dropout if held[0].training else 0.0
    t = _product(F.dropout(x, dropout) if dropout else x, Stack(a.to(x.dtype), False), groups)
    return _product(t, Stack(b.to(x.dtype), False), groups)


def _of_rank(adapter: LoraAdapter | None, rank: int, like: LoraAdapter) -> Tensor:
    """A ``[rank, in]``, with rows of zeros where it has fewer; all of them zeros where there is no adapter."""
    if adapter is None:
        return like.A.new_zeros(rank, like.A.shape[1])
    return F.pad(adapter.A, (0, 0, 0, rank - adapter.rank))


def _up(adapter: LoraAdapter | None, rank: int, like: LoraAdapter) -> Tensor:
    """``c (B − B₀) [out, rank]``."""
    if adapter is None:
        return like.B.new_zeros(len(like.B), rank)
    return F.pad(adapter.update() * adapter.scaling, (0, rank - adapter.rank))


# ---------------------------------------------------------------------- merged


def _can_merge(stack: Stack, held: Sequence[LoraAdapter]) -> bool:
    """Not where a weight or an A is trained, nor with dropout or inside torch.func's transforms, as of a layer."""
    frozen = (stack.weight, *(() if stack.bias is None else (stack.bias,)), *(adapter.A for adapter in held))
    if any(tensor.requires_grad for tensor in frozen) or any(adapter.dropout for adapter in held):
        return False
    return not torch._C._are_functorch_transforms_active()


@torch.no_grad()
def _merged(stack: Stack, adapters: Sequence[LoraAdapter | None]) -> Tensor:
    """All experts' weights with their adapters, in one call of the op: row ranges of one long matrix."""
    weight, height = stack.weight.reshape(-1, stack.weight.shape[2]), stack.weight.shape[1]
    left, right, scale, place = [], [], [], list[int]()
    for expert, adapter in enumerate(adapters):
        if adapter is not None:
            up, down = adapter.update(), adapter.A
            right.append(up.T.contiguous() if stack.transposed else down)
            left.append(down.T.contiguous() if stack.transposed else up)
            scale.append(adapter.scaling)
            place += (0, expert * height, (expert + 1) * height, -1)
    [merged], _ = _merge([weight], right, left, [], place, scale, False, weight.dtype)
    whole: Tensor = merged.view(stack.weight.shape)
    return whole


class _Merged(torch.autograd.Function):
    """Products with merged weights, which keep ``t = x Aᵀ`` for the gradients of B instead of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        transposed: bool,
        groups: Groups,
        adapters: Sequence[LoraAdapter | None],
        *b: Tensor,
    ) -> Tensor:
        ctx.stack, ctx.groups, ctx.adapters = Stack(weight, transposed), groups, adapters
        wanted = any(ctx.needs_input_grad[5:])
        narrowed = [
            narrow(rows, adapter.A.to(x.dtype)) if wanted and adapter is not None and len(rows) else None
            for rows, adapter in zip(groups.split(x), adapters, strict=True)
        ]
        ctx.save_for_backward(weight, *narrowed)
        return _product(x, ctx.stack, groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'LoraExperts: forward_mode must be "factored" for second derivatives (create_graph=True), got '
                '"merged" or "auto": the merged product is no function of B to autograd. Set forward="factored" '
                'in KeepLoraConfig, or forward_mode="factored" on the layers.'
            )
        weight, *narrowed = ctx.saved_tensors
        dy = dy.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, Stack(weight, ctx.stack.transposed).swapped(), ctx.groups)
        grads: list[Tensor | None] = []
        for rows, t, adapter in zip(ctx.groups.split(dy), narrowed, ctx.adapters, strict=True):
            if adapter is None:
                continue
            if t is None or not ctx.needs_input_grad[5 + len(grads)]:
                grads.append(None)
                continue
            [grad] = _grads(rows, t, [0, t.shape[1], 0, rows.shape[1]], [adapter.scaling])
            grads.append(grad.to(adapter.B.dtype))
        return dx, None, None, None, None, *grads
