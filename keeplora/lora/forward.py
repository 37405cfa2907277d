"""How a layer with adapters computes its output: one product with the merged weight, or the frozen one's plus theirs.

Both give ``y = x (W + Σ c_i E_i (B_i − B_{0,i}) A_i)ᵀ + b``, where ``E_i`` places adapter i in its rows of the weight.
Merged: the weight in the brackets is formed anew in every forward (``merge_ahead`` does it for all layers
at once), so it cannot be out of date, and is multiplied with like any frozen weight. Training needs ``t = x Aᵀ
[tokens, r]`` besides, and keeps that instead of x; the A's are stacked and cast where the weight is formed. A large
merged weight is not kept for the backward pass but formed again there, from the same numbers (``FORMED_AGAIN``): kept,
those of all layers would be a second copy of the model. Factored:
``x Aᵀ`` and its product with B, added to the frozen layer's output; no second copy of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
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

__all__ = [
    "Ahead",
    "ForwardMode",
    "Part",
    "adapted_linear",
    "added",
    "compute_dtype",
    "merge_job",
    "narrow",
    "own_linear",
]

# The ops without their checks of arguments: between a layer's products Python runs from cold caches, and shows.
_merge, _grads, _thin_matmul = OPS["merge_weights"].call, OPS["lora_grad_b"].call, OPS["thin_matmul"].call

FORMED_AGAIN = 2**22
"""Numbers of a weight from which on its merged copy is formed again in the backward pass, and never ahead: launches are
nothing there, and forming takes .004 to .04 of a layer's step (2048 wide, 4096 to 1024 tokens, one CPU thread)."""

ForwardMode = Literal["auto", "merged", "factored"]


class Part(NamedTuple):
    """An adapter, its rows of the layer's output (None for all), and its tensors, looked up once per forward."""

    adapter: LoraAdapter
    rows: Rows
    a: Tensor
    b: Tensor
    origin: Tensor | None

    def of(self, y: Tensor) -> Tensor:
        """The adapter's columns of ``y [..., out]``."""
        return y if self.rows is None else y[..., self.rows[0] : self.rows[1]]


def own_linear(host: LoraHost, x: Tensor, parameter: str, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` for one of the layer's weights, with the adapters of all its slots."""
    return adapted_linear(host, x, _own(host, parameter), bias, host.by_parameter.get(parameter, ()), parameter)


def _own(host: LoraHost, parameter: str) -> Tensor:
    weight: Tensor | None = host._parameters.get(parameter)  # as getattr, which takes ten times as long
    return getattr(host, parameter) if weight is None else weight


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
    return _with_the_rest(host, x, y, places)


def added(host: LoraHost, x: Tensor, y: Tensor, places: Sequence[tuple[LoraSlot, Rows]]) -> Tensor:
    """A layer's own output ``y``, which nothing is known of, with what the adapters of slots add, step by step."""
    parts = _parts(places)
    if any(part.rows is not None for part in parts):
        y = y.clone()  # an output of somebody's own autograd function may not be written to
    return _with_the_rest(host, x, _plus(x, y, parts), places)


def _with_the_rest(host: LoraHost, x: Tensor, y: Tensor, places: Sequence[tuple[LoraSlot, Rows]]) -> Tensor:
    """``y`` and what the updates add that are kept beside weights, as a tap hands it on."""
    for slot, rows in places:
        share = slot.exact.share(x)
        if share is not None:
            y = y + (share if rows is None else F.pad(share, (rows[0], y.shape[-1] - rows[1])))
    return y if host.tap is None else host.tap(host, x, y, {slot.slot: rows for slot, rows in places})


def _parts(places: Sequence[tuple[LoraSlot, Rows]]) -> list[Part]:
    parts = []
    for slot, rows in places:
        adapter: Any = slot._modules.get("adapter")  # as slot.adapter and adapter.A, which take ten times as long
        if adapter is not None:
            own = adapter._parameters
            a, b = (own["A"], own["B"]) if "A" in own and "B" in own else (adapter.A, adapter.B)
            parts.append(Part(adapter, rows, a, b, adapter._buffers["origin"]))
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
    for adapter, _, a, *_ in parts:
        if a.requires_grad or adapter.dropout:
            return False
    return host.forward_mode == "merged" or _merge_is_cheaper(x.numel() // x.shape[-1], weight)


def _merge_is_cheaper(tokens: int, weight: Tensor) -> bool:
    """Whether forming ``B A`` takes fewer operations than ``(x Aᵀ) Bᵀ``, whatever the rank."""
    out, width = weight.shape
    return tokens * (out + width) >= out * width


def forms_again(weight: Tensor) -> bool:
    """Whether a merged weight of this one is formed again in the backward pass; a compiler chooses by itself."""
    return weight.numel() >= FORMED_AGAIN and not torch.compiler.is_compiling()


class Merged(NamedTuple):
    """A layer's weight with its adapters, and where gradients are wanted their A's ``[Σr, in]``, in one dtype.

    ``source`` is the weight without its adapters, where the merged one is formed again in the backward pass.
    """

    weight: Tensor
    a: Tensor | None
    source: Tensor | None = None


def _merged_weight(host: LoraHost, weight: Tensor, parts: Sequence[Part], parameter: str) -> Merged:
    """The merged weight that was formed ahead, if it still is what would be formed now, else formed now."""
    ahead = host.merged_ahead.pop(parameter, None)
    if ahead is not None and ahead.is_current(weight, parts):
        return ahead.merged
    dtype = compute_dtype(weight)
    [merged] = _merged_weights([(weight, parts)], dtype, stack=torch.is_grad_enabled())
    if forms_again(weight):
        return merged._replace(source=weight)
    if parameter and torch.is_grad_enabled():
        host.to_merge[parameter] = dtype
    return merged


def merge_job(host: LoraHost, parameter: str) -> tuple[Tensor, list[Part]]:
    """One of the layer's weights and the adapters that would be merged into it."""
    return _own(host, parameter), _parts(host.by_parameter[parameter])


def _merged_weights(jobs: Sequence[tuple[Tensor, Sequence[Part]]], dtype: torch.dtype, *, stack: bool) -> list[Merged]:
    """The merged weight of every (weight, adapters), in one call of the op; ``stack``: and the A's."""
    a, b, scale = [], [], []
    origins: list[Tensor] = []
    place: list[int] = []
    for k, (weight, parts) in enumerate(jobs):
        for adapter, rows, down, up, origin in parts:
            if origin is not None and up.dtype != weight.dtype == torch.float64:
                up, origin = (up - origin).detach(), None  # rounded, as wherever this update is formed
            a.append(down)
            b.append(up)
            scale.append(adapter.scaling)
            start, stop = (0, weight.shape[0]) if rows is None else rows
            place += (k, start, stop, -1 if origin is None else len(origins))
            if origin is not None:
                origins.append(origin)
    with torch.no_grad():
        weights, stacks = _merge([weight for weight, _ in jobs], a, b, origins, place, scale, stack, dtype)
    return [Merged(weight, stacks[k] if stack else None) for k, weight in enumerate(weights)]


_storages, _versions = Tensor.data_ptr, attrgetter("_version")


class Ahead(NamedTuple):
    """A merged weight in the dtype its layer multiplies in, and what changes whenever it would: objects and numbers."""

    merged: Merged
    tensors: list[Tensor]
    numbers: list[Any]

    @staticmethod
    def of(jobs: Sequence[tuple[Tensor, Sequence[Part]]], dtype: torch.dtype) -> list[Ahead]:
        """The merged weights of many layers that multiply in one dtype, in one call of the op."""
        merged = _merged_weights(jobs, dtype, stack=True)
        return [Ahead(one, *_made_from(*job)) for one, job in zip(merged, jobs, strict=True)]

    def is_current(self, weight: Tensor, parts: Sequence[Part]) -> bool:
        if self.merged.weight.dtype != compute_dtype(weight):
            return False
        tensors, numbers = _made_from(weight, parts)
        return numbers == self.numbers and all(map(is_, tensors, self.tensors))


def _made_from(weight: Tensor, parts: Sequence[Part]) -> tuple[list[Tensor], list[Any]]:
    """The tensors of a merged weight; their storages and version counters, and the adapters' rows and scales."""
    tensors: list[Tensor] = [weight]
    numbers: list[Any] = []
    for adapter, rows, a, b, origin in parts:
        tensors += (a, b) if origin is None else (a, b, origin)
        numbers += (rows, adapter.scaling)
    numbers += map(_storages, tensors)
    numbers += map(_versions, tensors)
    return tensors, numbers


def _merged_linear(x: Tensor, merged: Merged, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """``x Mᵀ + b`` for the merged weight M, with the gradients of the adapters' B.

    Everything is in M's dtype, which is autocast's where that is on: it finds nothing to cast.
    """
    dtype = merged.weight.dtype
    if x.dtype != dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    y: Tensor = _Merged.apply(x, *merged, bias, parts, *[part.b for part in parts])
    return y


def _factored_linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """``x Wᵀ + b`` plus every adapter's share, step by step."""
    return _plus(x, F.linear(x, weight, bias), parts)


def _plus(x: Tensor, y: Tensor, parts: Sequence[Part]) -> Tensor:
    for part in parts:
        if part.rows is None:
            y = y + part.adapter(x)
        else:
            part.of(y).add_(part.adapter(x))
    return y


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, merged: Tensor, a: Tensor | None, source: Tensor | None, bias: Tensor | None,
        parts: Sequence[Part], *b: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.parts, ctx.dtype = parts, merged.dtype
        t = narrow(x, a) if a is not None and any(ctx.needs_input_grad[6:]) else None
        if source is None:
            ctx.save_for_backward(merged, t)
        else:  # with all that it is formed of, so that autograd notices a change of any
            ctx.save_for_backward(source, t, *(tensor for part in parts for tensor in part[2:]))
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'LoraLinear: forward_mode must be "factored" for second derivatives (create_graph=True), got '
                '"merged" or "auto": the merged product is no function of B to autograd. Set forward="factored" '
                'in KeepLoraConfig, or forward_mode="factored" on the layers.'
            )
        merged, t, *sources = ctx.saved_tensors
        needs, flat = ctx.needs_input_grad, _flat(dy)
        if sources and needs[0]:
            formed_of = [part._replace(a=a, b=b, origin=o) for part, a, b, o in _by_part(ctx.parts, sources)]
            [(merged, *_)] = _merged_weights([(merged, formed_of)], ctx.dtype, stack=False)
        dx = None
        if needs[0]:
            dx = torch.mm(flat, merged)
            dx = dx if flat is dy else dx.view(*dy.shape[:-1], dx.shape[1])
        grads: list[Tensor | None] = [None] * len(ctx.parts)
        if t is not None:
            place: list[int] = []
            wanted, scale, begin = [], [], 0
            for i, (adapter, rows, _, b, _) in enumerate(ctx.parts):
                end = begin + b.size(1)
                if needs[6 + i]:
                    wanted.append((i, b.dtype))
                    place += (begin, end, 0, flat.shape[1]) if rows is None else (begin, end, *rows)
                    scale.append(adapter.scaling)
                begin = end
            for (i, dtype), grad in zip(wanted, _grads(flat, t, place, scale), strict=True):
                grads[i] = grad if grad.dtype == dtype else grad.to(dtype)
        return dx, None, None, None, None, None, *grads


def _by_part(parts: Sequence[Part], tensors: Sequence[Any]) -> Iterator[tuple[Part, Tensor, Tensor, Tensor | None]]:
    """Every part with its A, B and B₀ among the saved tensors."""
    return zip(parts, tensors[::3], tensors[1::3], tensors[2::3], strict=True)


def _flat(x: Tensor) -> Tensor:
    """``[tokens, width]``: matmul of three dimensions may expand the matrix to a batch of copies."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def narrow(x: Tensor, a: Tensor) -> Tensor:
    """``t = x Aᵀ [tokens, r]``, where r is small, in float32 where that costs nothing."""
    x = _flat(x)
    if torch.compiler.is_compiling():  # a compiler does better by seeing the product
        return F.linear(x, a)
    if x.dtype == torch.float32 and x.is_cpu:
        t: Tensor = _thin_matmul(x, a, 1.0)
        return t
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, a.T, out_dtype=torch.float32)
    return F.linear(x, a)
