"""Linear layers whose weight a library keeps quantised: bitsandbytes' 8 and 4 bits, and torchao's.

Their weight is read in floating point, and never written. A layer computes its own product, whatever that is; what
tasks learn is added to it: ``y = layer(x) + Σ_t c_t (x A_tᵀ) B_tᵀ``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .device_map import hand_over
from .forward import added
from .four_bit import dequantize_four_bit, is_four_bit
from .host import LoraHost
from .kept import Kept
from .slot import LoraSlot, Rows
from .targets import Target

__all__ = [
    "LoraQuantised", "QuantisedSlot", "biases_that_are_cast", "dequantised", "is_quantised", "layer_shape",
    "quantised_layers", "to_ordinary",
]  # fmt: skip


def is_quantised(weight: Any) -> bool:
    """Whether [`dequantised`][] can read it: of bitsandbytes once it is quantised, or of torchao."""
    if type(weight).__name__ == "Int8Params":
        return bool(weight.dtype == torch.int8)
    return is_four_bit(weight) or type(weight).__module__.startswith("torchao.")


def quantised_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of ``model`` with such a weight, by path."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module._parameters.get("weight"))
    ]


def layer_shape(layer: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    """That of one of a layer's parameters, also where its library has packed it."""
    if isinstance(layer, nn.Linear) and parameter is layer._parameters.get("weight"):
        return layer.out_features, layer.in_features
    return tuple(parameter.shape)


def biases_that_are_cast(model: nn.Module) -> list[nn.Parameter]:
    """Those that bitsandbytes' layers put into the dtype of their inputs, for good, in the first forward."""
    layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m._parameters.get("bias") is not None)
    return [m.bias for m in layers if any(k.__module__.startswith("bitsandbytes.") for k in type(m).__mro__)]


@torch.no_grad()
def dequantised(layer: nn.Linear, *, comparable: bool = False) -> Tensor:
    """The weight ``[out, in]`` that a quantised layer multiplies with, in float32.

    bitsandbytes' 8 bits: ``SCB_i · CB_ij / 127``. In ``eval()`` that layer rounds its inputs to 8 bits, too.

    Args:
        comparable: The same bits whether bitsandbytes has repacked 4-bit weights for the CPU or not, which rounds their
            scales: to hash, not to compute with.
    """
    weight: Any = layer.weight
    if is_four_bit(weight):
        return dequantize_four_bit(weight, rounded_scales=comparable)
    if type(weight).__name__ == "Int8Params":
        of_layer: Any = layer
        scales: Tensor = of_layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward moves them
        codes: Tensor = weight.detach().as_subclass(Tensor)
        return codes.float() * (scales.to(weight.device).float()[:, None] / 127)
    dense: Tensor = weight.dequantize()
    return dense.detach().float()


class QuantisedSlot(LoraSlot):
    """The slot of a weight that can be read in floating point, and not be written.

    Its ``weight`` has shape and device alone, as float32 zeros that take no memory.
    """

    def __init__(self, target: Target, host: LoraHost, slot: str, parameter: str, rows: Rows, layer: nn.Linear):
        super().__init__(target, host, slot, parameter, rows)
        self.__dict__["layer"] = layer  # not as a child
        self.exact = Kept(self)

    @property
    def stored(self) -> Tensor:
        return self.layer.weight

    @property
    def whole(self) -> Tensor:
        size = (self.layer.out_features, self.layer.in_features)
        return torch.zeros((), device=self.layer.weight.device).expand(size)

    def readable(self, *, comparable: bool = False) -> Tensor:
        return dequantised(self.layer, comparable=comparable)

    @property
    def coarse(self) -> bool:
        return True

    layer: nn.Linear


class LoraQuantised(LoraHost):
    r"""A quantised linear layer with low-rank adapters, and what earlier tasks learned kept beside its weight.

    $$ y = \text{layer}(x) + \sum_t c_t\,(x A_t^\top) B_t^\top + c\,(x A^\top)(B - B_0)^\top $$

    It is the layer itself, of a class derived from its own: parameters, buffers and what its library keeps of them stay
    where they are. Made by ``of``.
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> LoraQuantised:
        """``layer`` itself, whose class changes."""
        kind = type(layer)
        with _unhooked(layer):
            layer.__class__ = _derived(kind)
        assert isinstance(layer, cls)
        layer._init_host()
        layer.taken_over, layer.forward_mode = kind, "factored"
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` to ``[…, out]``, by the formula above."""
        if self.observer is not None:
            self.observer(self, dict.fromkeys(self.slots, x))
        assert self.taken_over is not None
        y: Tensor = self.taken_over.forward(self, x)  # type: ignore[arg-type]
        return added(self, x, y, self.by_parameter.get("weight", ()))

    def plain(self) -> nn.Module:
        """The layer itself, of its own class again."""
        kind = self.taken_over
        assert kind is not None
        for name in LoraHost.__annotations__:
            delattr(self, name)
        with _unhooked(self):
            self.__class__ = kind  # type: ignore[assignment]
        return self

    def _new_slot(self, target: Target, slot: str, parameter: str, rows: Rows) -> LoraSlot:
        return QuantisedSlot(target, self, slot, parameter, rows, self)  # type: ignore[arg-type]

    def _rows_of(self, parameter: str) -> int | None:
        out: int = self.out_features  # type: ignore[assignment]
        return out if parameter == "weight" else None


_DERIVED: dict[type[nn.Linear], type[nn.Linear]] = {}


def _derived(kind: type[nn.Linear]) -> type[nn.Linear]:
    if kind not in _DERIVED:
        _DERIVED[kind] = type(f"Lora{kind.__name__}", (LoraQuantised, kind), {"__module__": __name__})
    return _DERIVED[kind]


@torch.no_grad()
def to_ordinary(model: nn.Module, slots: Sequence[LoraSlot], dtype: torch.dtype | None = None) -> None:
    """Every quantised linear layer becomes an ``nn.Linear`` in ``dtype``, with what slots keep beside its weight in it.

    None is the dtype of the model's first parameter that is not quantised; bfloat16 without one. One layer at a time:
    the weight in float32, rounded once. What transformers notes of the quantisation goes, too.
    """
    others = (p.dtype for p in model.parameters() if p.is_floating_point() and not is_quantised(p))
    dtype = dtype or next(others, torch.bfloat16)
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    for _, layer in quantised_layers(model):
        dense = dequantised(layer)
        for slot in slots:
            if isinstance(slot, QuantisedSlot) and slot.layer is layer:
                slot.part(dense).copy_(slot.exact_weight)
        bias = layer.bias
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(dense.to(dtype), requires_grad=False)
        plain.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        hand_over(layer, plain.train(layer.training))
        for path in places[id(layer)]:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(mark, None)


@contextmanager
def _unhooked(layer: nn.Module) -> Iterator[None]:
    """accelerate's hook, which holds on to the forward of the layer's class, is off for the moment."""
    hook = vars(layer).get("_hf_hook")
    if hook is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(layer)
    vars(layer).pop("forward", None)
    try:
        yield
    finally:
        add_hook_to_module(layer, hook)
