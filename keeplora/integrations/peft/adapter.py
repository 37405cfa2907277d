"""PEFT: the LoRA layers of a stock ``PeftModel``, and what a model may not have if its training is to be confined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.families import find_targets
from keeplora.lora import BorrowedLinear, LoraHost, LoraSlot, Target, require_whole
from keeplora.lora.four_bit import keep_differentiable
from keeplora.lora.peft_config import check_plain_lora
from keeplora.lora.quantised import dequantised, is_quantised
from keeplora.lora.update import Update
from keeplora.methods.buffers import Buffers

__all__ = [
    "PeftAdapter", "PeftLayer", "borrow", "find_adapter", "forget_buffers", "held_buffers", "hold_buffers",
    "trainable_neighbours",
]  # fmt: skip

_HELD = "_keeplora_buffers"
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PeftLayer:
    """One layer of an adapter: PEFT's module, and the target its weight is."""

    target: Target
    module: Any
    adapter: str

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def a(self) -> nn.Parameter:
        """``[r, in]``."""
        weight: nn.Parameter = self.module.lora_A[self.adapter].weight
        return weight

    @property
    def b(self) -> nn.Parameter:
        """``[out, r]``."""
        weight: nn.Parameter = self.module.lora_B[self.adapter].weight
        return weight

    @property
    def base(self) -> nn.Linear:
        layer: nn.Linear = self.module.base_layer
        return layer

    @property
    def rank(self) -> int:
        return int(self.module.r[self.adapter])

    @property
    def alpha(self) -> float:
        return float(self.module.lora_alpha[self.adapter])

    @property
    def scaling(self) -> float:
        """c in ``y = x Wᵀ + c (x Aᵀ) Bᵀ``."""
        return float(self.module.scaling[self.adapter])

    def update(self, dtype: torch.dtype) -> Update:
        """What it adds to the weight, the scaling in B, on the CPU: as it is saved, and merged again bit for bit."""
        a, b = self.a.detach().to(dtype, copy=True), self.b.detach().to(dtype) * self.scaling
        return Update(a.cpu(), b.cpu())

    def set_alpha(self, alpha: float) -> None:
        rslora = self.module.use_rslora[self.adapter]
        self.module.lora_alpha[self.adapter] = alpha
        self.module.scaling[self.adapter] = alpha / (self.rank**0.5 if rslora else self.rank)

    @property
    def quantised(self) -> bool:
        """Whether its weight is, by a library that tells it in floating point."""
        return is_quantised(self.base.weight)

    def comparable_weight(self) -> Tensor:
        """The weight in floating point, the same whether bitsandbytes has repacked it for the CPU or not."""
        return dequantised(self.base, comparable=True) if self.quantised else self.base.weight


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter of a ``PeftModel`` whose every layer can be confined."""

    model: Any
    name: str
    layers: tuple[PeftLayer, ...]

    @property
    def config(self) -> Any:
        return self.model.peft_config[self.name]

    @property
    def base(self) -> nn.Module:
        base: nn.Module = self.model.get_base_model()
        return base

    def set_alphas(self, alphas: Mapping[str, float]) -> None:
        """Scale every layer, in the model and in the configuration that ``save_pretrained`` writes."""
        for layer in self.layers:
            layer.set_alpha(alphas[layer.name])
        config = self.config
        config.alpha_pattern = {f"^{name}": alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}

    def freeze(self, kept: Collection[str] = ()) -> None:
        """B of this adapter takes gradients; A, and the adapters ``kept`` active beside it, do not.

        From now on every forward reads B itself, in a loop that is all inside autocast, too.
        """
        for name, parameter in self.model.named_parameters():
            if any(f".{other}." in name for other in kept) and ".lora_" in name:
                parameter.requires_grad_(False)
        for layer in self.layers:
            layer.a.requires_grad_(False)
            layer.b.requires_grad_(True)
            reads_b = layer.module.lora_B[layer.adapter]
            if _drop_copies not in reads_b._forward_pre_hooks.values():
                reads_b.register_forward_pre_hook(_drop_copies)


def find_adapter(
    function: str,
    model: Any,
    name: str | None,
    *,
    targets: Sequence[Target] | None = None,
    kept: Collection[str] = (),
) -> PeftAdapter:
    """The adapter ``name`` of a ``PeftModel``, or its active one, with everything refused that would not be confined.

    bitsandbytes' 4-bit layers, adapted or not, are brought back into the layout that has a gradient.

    Args:
        function: For messages.
        targets: Tower and depth of the base model's weights; found if None.
        kept: Adapters of earlier tasks, which must be active beside it.

    Raises:
        TypeError: ``model`` is no PeftModel, or a layer is of a kind that cannot be looked into.
        ValueError: the configuration or a layer asks for more than plain LoRA.
        RuntimeError: adapters are disabled, merged, or active that should not be (or the reverse).
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if isinstance(model, nn.Module):
        require_whole(function, model)
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"{function}: model must be a PeftModel, got {type(model).__name__}. "
            "Make one with peft.get_peft_model(model, LoraConfig(...)), or use keeplora.KeepLora."
        )
    name = _adapter_name(function, model, name, kept)
    check_plain_lora(function, model.peft_config[name])
    base = model.get_base_model()
    modules = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
    }
    if not modules:
        raise ValueError(f"{function}: adapter {name!r} must have layers, got none in the model")
    for path, module in modules.items():
        _check_layer(function, path, module, name)
    _check_tied(function, base, modules)
    places = _places(base, modules) if targets is None else {target.module: target for target in targets}
    unknown = [path for path in modules if path not in places]
    if unknown:
        raise ValueError(
            f"{function}: target_modules must name layers that may be adapted in this kind of model, got "
            f"{len(unknown)} others (first: {unknown[0]}). Narrow target_modules, or pass "
            "targets=keeplora.lora.linear_targets(model before get_peft_model) if they are meant."
        )
    layers = (
        PeftLayer(replace(places[path], name=path, module=path, parameter="weight", rows=None), module, name)
        for path, module in modules.items()
    )
    keep_differentiable(function, model)
    return PeftAdapter(model, name, tuple(layers))


def find_layers(function: str, model: Any, name: str) -> dict[str, PeftLayer]:
    """The layers of one adapter by path, whichever adapters are active; their place in the model is not looked at."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = {p: m for p, m in base.named_modules() if name in getattr(m, "lora_A", ())}
    if not modules:
        raise ValueError(f"{function}: model must be the PeftModel with adapter {name!r}, got {type(model).__name__}")
    return {p: PeftLayer(Target(p, p, "weight", None, 0, "model"), m, name) for p, m in modules.items()}


def trainable_neighbours(adapter: PeftAdapter, kept: Collection[str], also_train: Iterable[str]) -> list[str]:
    """Names of parameters that would be trained beside the adapter and were not said to be."""
    allowed = [f".{name}." for name in also_train]
    own = {id(parameter) for layer in adapter.layers for parameter in (layer.a, layer.b)}
    return [
        name
        for name, parameter in adapter.model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in own
        and not (".lora_" in name and any(f".{other}." in name for other in kept))
        and not any(part in f".{name}." for part in allowed)
    ]


def held_buffers(adapter: PeftAdapter) -> Buffers | None:
    """What keeps the base model's buffers in the open task: a part of the model, so that a copy of it has its own."""
    held: Buffers | None = vars(adapter.base).get(_HELD)
    return held


def hold_buffers(function: str, adapter: PeftAdapter, buffers: Buffers) -> None:
    """Keep the base model's buffers as ``buffers`` found them, until ``forget_buffers``."""
    forget_buffers(adapter)
    buffers.settle(function)
    buffers.hold()
    setattr(adapter.base, _HELD, buffers)


def forget_buffers(adapter: PeftAdapter) -> None:
    """Let them move again."""
    held = held_buffers(adapter)
    if held is not None:
        held.release()
        delattr(adapter.base, _HELD)


@contextmanager
def borrow(adapter: PeftAdapter, masters: dict[str, Tensor] | None = None) -> Iterator[list[LoraSlot]]:
    """The adapter's base layers as targets of passes over data; PEFT's layers call them as ever.

    Args:
        masters: By target, weights before they were rounded: known to the slots, and brought up to date at the end.
    """
    hosts = [BorrowedLinear(layer.base, target=layer.target) for layer in adapter.layers]
    slots = [host.places()["weight"] for host in hosts]
    for slot in slots:
        slot.exact.keep_apart(slot.weight, (masters or {}).get(slot.name))
    try:
        for layer, host in zip(adapter.layers, hosts, strict=True):
            layer.module.base_layer = host
        yield slots
    finally:
        for layer, host in zip(adapter.layers, hosts, strict=True):
            layer.module.base_layer = host.base
        if masters is not None:
            masters |= {slot.name: slot.exact.master for slot in slots if slot.exact.master is not None}


def _drop_copies(module: nn.Module, _: Any) -> None:
    """Autocast keeps its copies of trained weights until its block ends, through any number of steps."""
    if not torch.compiler.is_compiling() and torch.is_autocast_enabled(module.weight.device.type):  # type: ignore[arg-type]
        torch.clear_autocast_cache()


def _adapter_name(function: str, model: Any, name: str | None, kept: Collection[str]) -> str:
    active = list(model.active_adapters)
    own = [other for other in active if other not in kept]
    if name is None:
        if len(own) != 1:
            raise RuntimeError(
                f"{function}: one adapter must be active, got {', '.join(own) or 'none'}. "
                "Pass adapter_name, and activate it with model.set_adapter."
            )
        name = own[0]
    if name not in model.peft_config:
        raise ValueError(f"{function}: adapter_name must be one of {', '.join(model.peft_config)}, got {name!r}")
    wanted = {*kept, name}
    if set(active) != wanted:
        raise RuntimeError(
            f"{function}: exactly {', '.join(sorted(wanted))} must be active, got {', '.join(active)}: what another "
            f"active adapter does is not protected. Call model.base_model.set_adapter({sorted(wanted)})."
        )
    return name


def _check_layer(function: str, path: str, module: Any, name: str) -> None:
    from peft.tuners.lora.layer import MultiheadAttention

    if isinstance(module, MultiheadAttention):
        raise TypeError(
            f"{function}: layers must not be PEFT's MultiheadAttention, got one at {path}: it applies the update of "
            "out_proj twice and changes the frozen weights by rounding in every forward. Use keeplora.KeepLora on the "
            "model itself, and export_peft."
        )
    base = module.base_layer
    if isinstance(base, LoraHost):
        raise RuntimeError(f"{function}: model must not be held by a keeper already, got a LoraLinear at {path}")
    if not isinstance(base, nn.Linear):
        raise TypeError(
            f"{function}: adapted layers must be nn.Linear, got {type(base).__name__} at {path}. "
            "Leave it out of target_modules."
        )
    if not is_quantised(base.weight):
        weight = base.weight
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in FLOATS or weight.is_meta:
            raise TypeError(
                f"{function}: weights must be floating point, of bitsandbytes or of torchao, got "
                f"{type(weight).__module__}.{type(weight).__name__} in {weight.dtype} on {weight.device} at {path}: "
                "what it multiplies with cannot be read."
            )
        if type(base).forward is not nn.Linear.forward:
            raise TypeError(
                f"{function}: adapted layers must compute x Wᵀ + b, got {type(base).__module__}."
                f"{type(base).__name__} with a forward of its own at {path}. Leave it out of target_modules."
            )
    if module.merged_adapters or module.disable_adapters:
        state = f"{', '.join(module.merged_adapters)} merged" if module.merged_adapters else "them disabled"
        raise RuntimeError(
            f"{function}: adapters must be neither merged nor disabled, got {state} [{path}]. "
            "Call model.unmerge_adapter() or model.enable_adapter_layers() first."
        )
    for factor in (module.lora_A[name].weight, module.lora_B[name].weight):
        if factor.dtype not in (torch.float32, torch.float64) or factor.is_meta:
            raise TypeError(
                f"{function}: adapters must be float32, got {factor.dtype} on {factor.device} [{path}]: in half "
                "precision A reaches back into what is protected (1e-3 of its length in bfloat16). "
                "Keep PEFT's autocast_adapter_dtype=True and low_cpu_mem_usage=False."
            )


def _check_tied(function: str, base: nn.Module, modules: Mapping[str, Any]) -> None:
    owners = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    for path, module in modules.items():
        if owners[id(module.base_layer.weight)] > 1:
            raise ValueError(
                f"{function}: an adapted weight must belong to one layer, got one that is shared (tied) [{path}]. "
                "Leave it out of target_modules, or untie it."
            )


def _places(base: nn.Module, modules: Mapping[str, Any]) -> dict[str, Target]:
    """Tower and depth by layer, found in the model as it is without PEFT's layers."""
    parents = {path: (base.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in modules}
    try:
        for path, module in modules.items():
            parent, leaf = parents[path]
            setattr(parent, leaf, module.base_layer)
        return {target.module: target for target in find_targets(base)}
    finally:
        for path, module in modules.items():
            parent, leaf = parents[path]
            setattr(parent, leaf, module)
