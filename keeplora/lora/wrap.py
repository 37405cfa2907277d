"""Put adapters' homes into a model and take them out again: nn.Linear ↔ LoraLinear, experts ↔ LoraExperts …"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .attention import LoraAttention
from .device_map import hand_over, own_forward
from .engines import require_whole
from .experts import LoraExperts
from .four_bit import keep_differentiable
from .host import LoraHost
from .linear import LoraLinear
from .mixture import expert_layout
from .quantised import LoraQuantised, is_quantised
from .shares import is_shared_out, is_wrapped
from .slot import LoraSlot
from .targets import Target

__all__ = ["register_host", "unwrap", "wrap"]

_Kind = type[LoraHost]


def wrap(
    model: nn.Module, targets: Sequence[Target], *, shares: bool = False, quantised: bool = False
) -> list[LoraSlot]:
    """Replace the layers that own ``targets`` by layers that can hold adapters; one slot per target, in order.

    Nothing is computed differently until an adapter is attached. Parameters stay the same objects under the
    same state-dict names. A layer that stands in several places of the model is one layer, with one adapter, in all of
    them; targets name one of the places. Either all layers are replaced or, on an error, none. Frozen 4-bit layers of
    bitsandbytes keep the layout that has a gradient (``keep_differentiable``).

    Args:
        shares: Whether FSDP2 may have left each process some rows of frozen weights. Then layers stay the same objects
            and change their class, and compute factored: a merged weight would be whole on every process.
        quantised: Whether ``nn.Linear`` layers of bitsandbytes and torchao may be among them. They stay the same
            objects, too, and what is learned is kept beside their weights (``keeplora.lora.quantised``).

    Raises:
        ValueError: a target names no layer of the model, names come twice, a layer is named by two of its places, or
            an adapted weight is shared with another layer (tied weights: one update would change both).
        TypeError: a target's layer is of another kind, or has a forward or a parametrization of its own, or its weight
            is sharded, offloaded or quantised (``keeplora.lora.engines``).
        RuntimeError: the model is wrapped already, a layer carries hooks or a forward set on it (they would be lost),
            or torch's encoder layers would bypass the adapters in inference. What accelerate's ``device_map`` set on a
            layer to bring inputs to its device goes over to its replacement.

    Examples:
        >>> from keeplora.lora import linear_targets, unwrap, wrap
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [slot.name for slot in wrap(model, linear_targets(model))]
        ['0', '2']
        >>> unwrap(model)[0]
        Linear(in_features=4, out_features=8, bias=True)
    """
    replacements = _plan(model, targets, shares, quantised)
    in_place = is_shared_out(model)
    keep_differentiable("wrap", model)  # frozen 4-bit layers, behind which gradients are wanted
    places = _places(model)
    everywhere = {path: places[id(model.get_submodule(path))] for path in replacements}
    hosts: dict[str, LoraHost] = {}
    for path, kind in replacements.items():
        layer = model.get_submodule(path)
        hosts[path] = _made(kind, layer, in_place)
        hosts |= {
            f"{path}.{name}": child for name, child in hosts[path].named_children() if isinstance(child, LoraHost)
        }
    slots = []
    for target in targets:
        host = hosts[target.module]
        slot = target.name.rsplit(".", 1)[-1] if target.rows or isinstance(host, LoraAttention) else "weight"
        slot = slot if target.expert is None else f"{target.parameter}_{target.expert}"
        slots.append(host.add_slot(slot, target.parameter, target.rows, target))
    if in_place:
        return slots
    hosts = {path: host for path, host in hosts.items() if host.taken_over is None}
    for path, host in hosts.items():
        hand_over(model.get_submodule(path), host)
    for path in sorted(hosts.keys() & replacements.keys(), key=len):  # an attention before what stands in it
        for place in everywhere[path]:
            _replace(model, place, hosts[path])
    return slots


def _made(kind: _Kind, layer: nn.Module, in_place: bool) -> LoraHost:
    if issubclass(kind, LoraQuantised):
        assert isinstance(layer, nn.Linear)
        return kind.of(layer)
    if in_place and isinstance(layer, nn.Linear):
        return LoraLinear.in_place(layer)
    make: Callable[[nn.Module], LoraHost] = kind
    return make(layer)


_KINDS: dict[type[nn.Module], _Kind] = {nn.MultiheadAttention: LoraAttention, nn.Linear: LoraLinear}
_READ_BY: dict[str, type[nn.Module]] = {"out_proj": nn.MultiheadAttention}


def register_host(plain: type[nn.Module], host: type[LoraHost], *, reads: str | None = None) -> None:
    """Let [`wrap`][] replace modules of type ``plain`` by ``host(module)``, and ``unwrap`` by its ``plain()``.

    Args:
        reads: The name of a child whose weight ``plain`` reads without calling it: to adapt the child, ``plain`` is
            replaced, by a host with a child of that name that is a host too.
    """
    _KINDS[plain] = host
    if reads is not None:
        _READ_BY[reads] = plain


def _plan(model: nn.Module, targets: Sequence[Target], shares: bool, quantised: bool) -> dict[str, _Kind]:
    """Which module is to be replaced by what; raises before anything changes."""
    adapted = {target.module for target in targets}
    require_whole("wrap", model, adapted, structure=True, shares=shares, quantised=quantised)
    shared_out = is_shared_out(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    plan: dict[str, _Kind] = {}
    place_of: dict[int, str] = {}
    names: set[str] = set()
    for target in targets:
        if target.name in names:
            raise ValueError(f"wrap: targets must have unique names, got {target.name!r} twice")
        names.add(target.name)
        path = target.module
        if path not in modules:
            raise ValueError(f"wrap: targets must name modules of the model, got {path!r} [{target.name}]")
        if not path:
            raise ValueError(
                f"wrap: model must hold the layers that are adapted, got {type(model).__name__}, which is one of them. "
                "Put it into a module first: nn.Sequential(layer)."
            )
        parent, _, leaf = path.rpartition(".")
        if leaf in _READ_BY and isinstance(modules.get(parent), _READ_BY[leaf]):
            path = parent  # it reads the weight without calling the layer
        if place_of.setdefault(id(modules[path]), path) != path:
            raise ValueError(
                f"wrap: a layer that stands in several places must be named by one of them, got "
                f"{place_of[id(modules[path])]} and {path}, which are one layer. Leave one name out of the targets."
            )
        if shared_out:
            _check_shared_out(modules[path], path, target)
        plan[path] = _kind(modules[path], path, target)
        shared = owners.get(id(getattr(modules[target.module], target.parameter)), [])
        if len(shared) > 1:
            raise ValueError(
                f"wrap: an adapted weight must belong to one layer, got one shared by {' and '.join(shared)} (tied): "
                "learning in one would change the other. Leave it out of the targets, or untie it."
            )
    _check_fast_path(modules, plan)
    return plan


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Every path of every module: a layer may stand in several places."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return places


def _kind(module: nn.Module, path: str, target: Target) -> _Kind:
    """What replaces ``module``: only layers whose computation is known can be."""
    if isinstance(module, LoraHost):
        raise RuntimeError(
            f"wrap: model must not be wrapped already, got {type(module).__name__} at {path!r}. "
            "Call unwrap(model), or keep using the object that wrapped it."
        )
    forward = own_forward(module)
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        raise RuntimeError(
            f"wrap: layers must run the forward of their class, got one set on the layer itself at {path!r}. Take it "
            "off first: del layer.forward."
        )
    own_kinds = _KINDS.items()
    kinds = [k for plain, k in own_kinds if isinstance(module, plain) and type(module).forward is plain.forward]
    if expert_layout(module) is not None and target.expert is not None:
        LoraExperts.check(module)
        kinds = [LoraExperts]
    if isinstance(module, nn.Linear) and is_quantised(module._parameters.get("weight")):
        kinds = [LoraQuantised]
    own = module if target.module == path else module.get_submodule(target.module.rpartition(".")[2])
    if not kinds or target.parameter not in own._parameters:
        raise TypeError(
            f"wrap: targets must name plain nn.Linear or nn.MultiheadAttention modules, or experts, got "
            f"{type(module).__module__}.{type(module).__name__} at {path!r} [{target.name}]. Leave it out of the "
            "targets; layers with a forward or a parametrization of their own cannot be replaced."
        )
    if _hooked(module):
        raise RuntimeError(
            f"wrap: layers must not carry hooks when they are replaced, got some at {path!r}. "
            "Register hooks after wrapping."
        )
    return kinds[0]


def _check_shared_out(module: nn.Module, path: str, target: Target) -> None:
    """Of layers whose rows lie in several processes only whole linear ones can be adapted."""
    got = ""
    if not isinstance(module, nn.Linear):
        got = type(module).__name__
    elif is_wrapped(module):
        got = "a layer that fully_shard was called with"
    elif target.rows is not None:
        got = f"rows {target.rows[0]} to {target.rows[1]} of a fused weight"
    if got:
        raise TypeError(
            f"wrap: what FSDP2 shares out can be adapted in nn.Linear layers, as whole weights, inside of the blocks "
            f"that fully_shard is called with, got {got} at {path!r} [{target.name}]. Leave it out of the targets, or "
            "call fully_shard with its block."
        )


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _check_fast_path(modules: dict[str, nn.Module], plan: dict[str, _Kind]) -> None:
    """torch's encoder layer has an inference path that reads weights without calling the layers that own them."""
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        inside = isinstance(module, nn.TransformerEncoderLayer) and any(p.startswith(prefix) for p in plan)
        if inside and torch.backends.mha.get_fastpath_enabled():
            raise RuntimeError(
                f"wrap: nn.TransformerEncoderLayer must not use its inference fast path, which would leave adapters "
                f"out, got it enabled [{path}]. Call torch.backends.mha.set_fastpath_enabled(False) first."
            )


def unwrap(model: nn.Module) -> nn.Module:
    """Put plain ``nn.Linear``, ``nn.MultiheadAttention`` and experts back, in place; returns ``model``.

    Raises:
        RuntimeError: an adapter is still attached, or a layer carries hooks: nothing is dropped silently.
    """
    hosts = {path: module for path, module in model.named_modules() if isinstance(module, LoraHost)}
    busy = [path for path, host in hosts.items() if host.adapters]
    if busy:
        raise RuntimeError(
            f"unwrap: adapters must be merged or detached first, got {len(busy)} attached (first: {busy[0]!r})"
        )
    hooked = [path for path, host in hosts.items() if _hooked(host)]
    if hooked:
        raise RuntimeError(f"unwrap: layers must not carry hooks, got some at {hooked[0]!r}. Remove them first.")
    places = _places(model)
    for path, host in hosts.items():
        if host.taken_over is not None:
            host.plain()
            continue
        if path.rpartition(".")[0] in hosts:
            continue  # goes with its attention
        plain = host.plain()
        hand_over(host, plain)
        for name, child in host.named_children():
            if path and f"{path}.{name}" in hosts:
                hand_over(child, plain.get_submodule(name))
        for place in places[id(host)]:
            _replace(model, place, plain)
    return model


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
