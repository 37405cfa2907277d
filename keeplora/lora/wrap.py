"""Put adapters' homes into a model and take them out again: nn.Linear ↔ LoraLinear, attention ↔ LoraAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .adapter import LoraAdapter, LoraHost
from .attention import LoraAttention
from .linear import LoraLinear
from .targets import Target

__all__ = ["LoraSlot", "unwrap", "wrap"]


@dataclass(frozen=True)
class LoraSlot:
    """A target in a wrapped model: the layer that holds its adapter, and the slot's name there."""

    target: Target
    host: LoraHost
    slot: str

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def weight(self) -> Tensor:
        """The frozen weight ``[out, in]``, a view in the layer's dtype."""
        return self.host.slot_weight(self.slot)

    @property
    def exact_weight(self) -> Tensor:
        """The weight before it was rounded to the layer's dtype (float32)."""
        return self.host.exact_weight(self.slot)

    @property
    def adapter(self) -> LoraAdapter | None:
        adapter = self.host.adapters[self.slot] if self.slot in self.host.adapters else None  # noqa: SIM401
        assert adapter is None or isinstance(adapter, LoraAdapter)
        return adapter

    def attach(self, adapter: LoraAdapter) -> None:
        self.host.attach(self.slot, adapter)

    def detach(self) -> None:
        self.host.detach_adapter(self.slot)

    def merge(self) -> None:
        self.host.merge(self.slot)


def wrap(model: nn.Module, targets: Sequence[Target]) -> list[LoraSlot]:
    """Replace the layers that own ``targets`` by layers that can hold adapters; one slot per target, in order.

    Nothing is computed differently until an adapter is attached. Parameters stay the same objects under the
    same state-dict names. Either all layers are replaced or, on an error, none.

    Raises:
        ValueError: a target names no layer of the model, names come twice, a layer is shared by two places, or
            two adapted layers share one weight (tied weights: one update would change both).
        TypeError: a target's layer is of another kind, or already replaced by another library's layer.
        RuntimeError: the model is wrapped already, or a layer carries forward hooks (they would be lost).

    Example:
        >>> from keeplora.lora import linear_targets, unwrap, wrap
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [slot.name for slot in wrap(model, linear_targets(model))]
        ['0', '2']
        >>> unwrap(model)[0]
        Linear(in_features=4, out_features=8, bias=True)
    """
    replacements = _plan(model, targets)
    hosts: dict[str, LoraHost] = {}
    for path, kind in replacements.items():
        hosts[path] = kind(model.get_submodule(path))  # type: ignore[arg-type]
        if kind is LoraAttention:
            out = getattr(hosts[path], "out_proj")  # noqa: B009
            assert isinstance(out, LoraLinear)
            hosts[f"{path}.out_proj"] = out
    slots = []
    for target in targets:
        host = hosts[target.module]
        slot = target.name.rsplit(".", 1)[-1] if target.rows or isinstance(host, LoraAttention) else "weight"
        host.add_slot(slot, target.parameter, target.rows)
        slots.append(LoraSlot(target, host, slot))
    for path in replacements:
        _replace(model, path, hosts[path])
    return slots


def _plan(model: nn.Module, targets: Sequence[Target]) -> dict[str, type[LoraLinear] | type[LoraAttention]]:
    """Which module is to be replaced by what; raises before anything changes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    for path, module in modules.items():
        places.setdefault(id(module), []).append(path)
    plan: dict[str, type[LoraLinear] | type[LoraAttention]] = {}
    owners: dict[int, str] = {}
    names: set[str] = set()
    for target in targets:
        if target.name in names:
            raise ValueError(f"wrap: targets must have unique names, got {target.name!r} twice")
        names.add(target.name)
        path = target.module
        if path not in modules:
            raise ValueError(f"wrap: targets must name modules of the model, got {path!r} [{target.name}]")
        parent, _, leaf = path.rpartition(".")
        if leaf == "out_proj" and isinstance(modules.get(parent), nn.MultiheadAttention):
            path = parent  # MultiheadAttention reads out_proj's weight without calling it
        module = modules[path]
        if isinstance(module, LoraHost):
            raise RuntimeError(
                f"wrap: model must not be wrapped already, got {type(module).__name__} at {path!r}. "
                "Call unwrap(model), or keep using the object that wrapped it."
            )
        if len(places[id(module)]) > 1:
            raise ValueError(
                f"wrap: a layer must have one place in the model, got {' and '.join(places[id(module)])} "
                "sharing one. Adapt neither, or untie them."
            )
        if isinstance(module, nn.MultiheadAttention):
            plan[path] = LoraAttention
        elif isinstance(module, nn.Linear):
            plan[path] = LoraLinear
        else:
            raise TypeError(
                f"wrap: targets must name nn.Linear or nn.MultiheadAttention modules, got "
                f"{type(module).__module__}.{type(module).__name__} at {path!r} [{target.name}]"
            )
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise RuntimeError(
                f"wrap: layers must not carry hooks when they are replaced, got some at {path!r}. "
                "Register hooks after wrapping."
            )
        weight = getattr(modules[target.module], target.parameter)
        owner = owners.setdefault(id(weight), target.module)
        if owner != target.module:
            raise ValueError(
                f"wrap: adapted layers must not share a weight, got one weight in {owner!r} and "
                f"{target.module!r} (tied). Adapt one of them only after untying."
            )
    return plan


def unwrap(model: nn.Module) -> nn.Module:
    """Put plain ``nn.Linear`` and ``nn.MultiheadAttention`` back, in place; returns ``model``.

    Raises:
        RuntimeError: an adapter is still attached: merge or detach it first, nothing is dropped silently.
    """
    hosts = {path: module for path, module in model.named_modules() if isinstance(module, LoraHost)}
    busy = [path for path, host in hosts.items() if len(host.adapters)]
    if busy:
        raise RuntimeError(
            f"unwrap: adapters must be merged or detached first, got {len(busy)} attached (first: {busy[0]!r})"
        )
    for path, host in hosts.items():
        parent, _, leaf = path.rpartition(".")
        if leaf == "out_proj" and parent in hosts:
            continue  # goes with its attention
        assert isinstance(host, LoraLinear | LoraAttention)
        _replace(model, path, host.plain())
    return model


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
