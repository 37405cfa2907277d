"""How a layer with adapters computes its output: one product with the merged weight, or the frozen one's plus theirs.

Both give ``y = x (W + Σ c_i E_i (B_i − B_{0,i}) A_i)ᵀ + b``, where ``E_i`` places adapter i in its rows of the weight.
Merged: the weight in the brackets is formed anew in every forward (:mod:`.merge_ahead` does it for all layers
at once), so it cannot be out of date, and is multiplied with like any frozen weight. Training needs ``t = x Aᵀ
[tokens, r]`` besides, and keeps that instead of x. Factored: ``x Aᵀ`` and its product with B, added to the frozen
layer's output; no second copy of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keeplora.ops.declare import OPS

from .adapter import compute_dtype

if TYPE_CHECKING:
    from .adapter import LoraAdapter
    from .host import LoraHost
    from .slot import LoraSlot, Rows

__all__ = ["Ahead", "ForwardMode", "Part", "adapted_linear", "compute_dtype", "merge_job", "own_linear"]

# The ops without their checks of arguments: between a layer's products Python runs from cold caches, and shows.
_merge, _thin_matmul = OPS["merge_weights"].call, OPS["thin_matmul"].call

ForwardMode = Literal["auto", "merged", "factored"]


class Part(NamedTuple):
    """An adapter and its rows of the layer's output; None for all."""

    adapter: LoraAdapter
    rows: Rows

    def of(self, y: Tensor) -> Tensor:
        """The adapter's columns of ``y [..., out]``."""
        return y if self.rows is None else y[..., self.rows[0] : self.rows[1]]


def own_linear(host: LoraHost, x: Tensor, parameter: str, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` for one of the layer's weights, with the adapters of all its slots."""
    places = [(slot, slot.rows) for slot in host.by_parameter.get(parameter, ())]
    return adapted_linear(host, x, getattr(host, parameter), bias, places, parameter)


def adapted_linear(
    host: LoraHost,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[tuple[LoraSlot, Rows]],
    parameter: str = "",
) -> Tensor:
    """``x Wᵀ + b`` with the adapters of slots at their rows of this weight, which may be rows of the layer's own."""
    parts = _parts(places)
    if not parts:
        y = F.linear(x, weight, bias)
    elif _merges(host, x, weight, bias, parts):
        y = _merged_linear(x, _merged_weight(host, weight, parts, parameter), bias, parts)
    else:
        y = _factored_linear(x, weight, bias, parts)
    return y if host.tap is None else host.tap(host, x, y, {slot.slot: rows for slot, rows in places})


def _parts(places: Sequence[tuple[LoraSlot, Rows]]) -> list[Part]:
    parts = []
    for slot, rows in places:
        adapter = slot.adapter
        if adapter is not None:
            parts.append(Part(adapter, rows))
    return parts


def _merges(host: LoraHost, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> bool:
    """Whether to multiply with the merged weight.

    Not where W, b or A are trained, whose gradients need x, nor inside torch.func's transforms, which have to see
    every step.
    """
    if host.forward_mode == "factored" or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if any(part.adapter.A.requires_grad or part.adapter.dropout for part in parts):
        return False
    return host.forward_mode == "merged" or _merge_is_cheaper(x.numel() // x.shape[-1], weight)


def _merge_is_cheaper(tokens: int, weight: Tensor) -> bool:
    """Whether forming ``B A`` takes fewer operations than ``(x Aᵀ) Bᵀ``, whatever the rank."""
    out, width = weight.shape
    return tokens * (out + width) >= out * width


def _merged_weight(host: LoraHost, weight: Tensor, parts: Sequence[Part], parameter: str) -> Tensor:
    """The merged weight that was formed ahead, if it still is what would be formed now, else formed now."""
    ahead = host.merged_ahead.pop(parameter, None)
    if ahead is not None and ahead.is_current(weight, parts):
        return ahead.merged
    dtype = compute_dtype(weight)
    if parameter and torch.is_grad_enabled():
        host.to_merge[parameter] = dtype
    return _merged_weights([(weight, parts)], dtype)[0]


def merge_job(host: LoraHost, parameter: str) -> tuple[Tensor, list[Part]]:
    """One of the layer's weights and the adapters that would be merged into it."""
    return getattr(host, parameter), _parts([(slot, slot.rows) for slot in host.by_parameter[parameter]])


def _exact(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which would round factors before their product."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _stack(weight: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor, float]:
    """``(A [Σr, in], B [out, Σr], c)`` with ``c B A`` the sum of all updates, each in its rows."""
    if len(parts) == 1 and parts[0].rows is None:
        adapter = parts[0].adapter
        return adapter.A, adapter.update(), adapter.scaling
    a = torch.cat([part.adapter.A for part in parts])
    a = a.double() if weight.dtype == torch.float64 else a
    b = a.new_zeros(weight.shape[0], a.shape[0])
    begin = 0
    for part in parts:
        end = begin + part.adapter.rank
        rows = slice(None) if part.rows is None else slice(*part.rows)
        b[rows, begin:end] = part.adapter.update().to(b.dtype) * part.adapter.scaling
        begin = end
    return a, b, 1.0


@torch.no_grad()
def _merged_weights(jobs: Sequence[tuple[Tensor, Sequence[Part]]], dtype: torch.dtype) -> list[Tensor]:
    """The merged weight of every (weight, adapters), in one call of the op."""
    factors = [_stack(weight, parts) for weight, parts in jobs]
    with _exact(jobs[0][0]):
        merged: list[Tensor] = _merge(
            [weight for weight, _ in jobs],
            [a for a, _, _ in factors],
            [b for _, b, _ in factors],
            [scale for _, _, scale in factors],
            dtype,
        )
    return merged


@dataclass(frozen=True)
class Ahead:
    """A merged weight in the dtype its layer multiplies in, and what it was made from."""

    merged: Tensor
    stamp: tuple[Any, ...]

    @staticmethod
    def of(jobs: Sequence[tuple[Tensor, Sequence[Part]]], dtype: torch.dtype) -> list[Ahead]:
        """The merged weights of many layers that multiply in one dtype, in one call of the op."""
        return [Ahead(matrix, _stamp(*job)) for matrix, job in zip(_merged_weights(jobs, dtype), jobs, strict=True)]

    def is_current(self, weight: Tensor, parts: Sequence[Part]) -> bool:
        return self.merged.dtype == compute_dtype(weight) and self.stamp == _stamp(weight, parts)


def _stamp(weight: Tensor, parts: Sequence[Part]) -> tuple[Any, ...]:
    """What changes whenever a merged weight would: objects, storages, version counters, numbers."""
    stamp: list[Any] = []
    tensors: list[Tensor | None] = [weight]
    for part in parts:
        stamp += [part.rows, part.adapter.scaling]
        tensors += [part.adapter.A, part.adapter.B, part.adapter.origin]
    for tensor in tensors:
        stamp.append(None if tensor is None else (id(tensor), tensor.data_ptr(), tensor._version))
    return tuple(stamp)


def _merged_linear(x: Tensor, merged: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """``x Mᵀ + b`` for the merged weight M, with the gradients of the adapters' B."""
    x = x.to(merged.dtype) if torch.is_autocast_enabled(x.device.type) else x
    bias = None if bias is None else bias.to(merged.dtype)
    with _exact(x):
        y: Tensor = _Merged.apply(x, merged, bias, tuple(parts), *(part.adapter.B for part in parts))
    return y


def _factored_linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """``x Wᵀ + b`` plus every adapter's share, step by step."""
    y = F.linear(x, weight, bias)
    for part in parts:
        if part.rows is None:
            y = y + part.adapter(x)
        else:
            part.of(y).add_(part.adapter(x))
    return y


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, merged: Tensor, bias: Tensor | None, parts: tuple[Part, ...], *b: Tensor
    ) -> Tensor:
        ctx.parts = parts
        if any(ctx.needs_input_grad[4:]):
            a: list[Tensor] = [part.adapter.A for part in parts]
            t = _narrow(x, (a[0] if len(a) == 1 else torch.cat(a)).to(x.dtype))
        else:
            t = x.new_empty(0)
        ctx.save_for_backward(merged, t)
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'LoraLinear: forward_mode must be "factored" for second derivatives (create_graph=True), got '
                '"merged" or "auto": the merged product is no function of B to autograd. Set forward="factored" '
                'in KeepLoraConfig, or forward_mode="factored" on the layers.'
            )
        merged, t = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (_flat(dy) @ merged).view(*dy.shape[:-1], merged.shape[1])
        grads: list[Tensor | None] = []
        begin = 0
        for part, wanted in zip(ctx.parts, ctx.needs_input_grad[4:], strict=True):
            end = begin + part.adapter.rank
            grads.append(_grad_b(part.of(dy), t[..., begin:end], part.adapter) if wanted else None)
            begin = end
        return dx, None, None, None, *grads


def _flat(x: Tensor) -> Tensor:
    """``[tokens, width]``: matmul of three dimensions may expand the matrix to a batch of copies."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _narrow(x: Tensor, a: Tensor) -> Tensor:
    """``x Aᵀ [..., r]``, where r is small."""
    if not _is_thin(x):
        return F.linear(x, a)
    t: Tensor = _thin_matmul(_flat(x), a, 1.0)
    return t.view(*x.shape[:-1], a.shape[0])


def _grad_b(dy: Tensor, t: Tensor, adapter: LoraAdapter) -> Tensor:
    """``c dyᵀ t [out, r]`` in the dtype of B."""
    dy, t = _flat(dy), _flat(t)
    if _is_thin(dy) and t.shape[1] <= 64:  # 128 columns take 1.1 times as long as in a gemm
        thin: Tensor = _thin_matmul(dy.T, t.T, adapter.scaling)
        return thin.to(adapter.B.dtype)
    # As (tᵀ dy)ᵀ, which keeps the gemm's inner loop long on a CPU.
    return (t.T @ dy).to(adapter.B.dtype).mul_(adapter.scaling).T.contiguous()


def _is_thin(x: Tensor) -> bool:
    """Whether the op has a kernel for it that is faster than a gemm; a compiler does better by seeing the product."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
