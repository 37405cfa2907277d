"""What a model remembers in buffers, and what keeps it as it is while a task is learned, whatever ``train()`` does."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.hooks import RemovableHandle

from keeplora._messages import listed, warn
from keeplora.families.class_head import ClassHead
from keeplora.lora import LoraSlot
from keeplora.math.digest import sums

__all__ = ["Buffers", "model_buffers", "set_buffers"]


class Buffers:
    """The buffers of a model as they were when this was made, and how to keep them so in training.

    Running statistics and power iterations move in ``train()`` alone: ``hold`` keeps the modules that have them in
    ``eval()``, where they compute as the frozen model does; ``model.train()`` still reaches everything else. Of other
    modules nobody can tell what their forward does to their buffers (averages of weights, codebooks, queues, counters):
    in ``train()`` they run on copies, which are thrown away, until a first forward has moved none. What is written to
    from elsewhere, or inside a compiled graph, ``put_back`` puts back and names.

    Buffers that are no part of the model's ``state_dict`` are caches, such as tables of positions that grow with the
    longest text: they are compared, and left as they are. So are frozen parameters that somebody moves, as momentum
    encoders are moved by hand: no copy is kept of them, but a hash of all values, and ``settle`` says which have
    others. (Of what was written past torch's counter of versions, through ``.data``, the same values in another order
    are not seen.)

    Args:
        free: Names of modules whose buffers may move.
        frozen: False lets all of them move: then this only remembers.
    """

    def __init__(self, model: nn.Module, free: Collection[str] = (), *, frozen: bool = True):
        self.model, self.free, self.frozen = model, tuple(free), frozen
        self._all = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not is_lazy(buffer)]
        values = {id(buffer): value for buffer, value in self._all}
        self.values = {place.name: values[id(place.buffer)] for place in _places(model)}
        """By name: of the model's own, without those of adapters and of what a method put into it."""
        self._held: list[tuple[nn.Module, bool | None]] = []
        self._hooks: list[RemovableHandle] = []
        self._frozen: dict[str, _Seen] = {}

    def hold(self) -> None:
        """Keep every buffer as it is, until ``release``."""
        self.release()
        self._frozen = self._frozen or self._glance()
        if not self.frozen:
            return
        kept: dict[nn.Module, list[str]] = {}
        for place in _places(self.model, self.free):
            if place.saved:
                kept.setdefault(place.module, []).append(place.key)
        for module, keys in kept.items():
            if not _moves_in_train_alone(module):
                self._hooks += _OnCopies(keys).hooks(module)
            elif "train" not in module.__dict__:
                own = None if module.training == self.model.training else module.training
                self._held.append((module, own))
                module.train = partial(_stay, module)  # type: ignore[method-assign]
                module.training = False

    def release(self) -> None:
        """Let them move again."""
        for handle in self._hooks:
            handle.remove()
        for module, own in self._held:
            del module.train
            module.training = self.model.training if own is None else own
        self._hooks, self._held = [], []

    def moved(self) -> list[str]:
        """Names of the buffers that are not what they were, those that may move among them."""
        now = {place.name: place.buffer for place in _places(self.model)}
        return [name for name, value in self.values.items() if name not in now or not _same(now[name], value)]

    @torch.no_grad()
    def put_back(self) -> list[str]:
        """Make every buffer of the ``state_dict`` what it was; the names of those that had moved."""
        moved = set(self.moved())
        places = [place for place in _places(self.model, self.free) if place.saved and place.name in moved]
        for module, key, name, buffer, _ in places:
            value = self.values[name]
            if buffer.shape == value.shape and not buffer.requires_grad:
                buffer.copy_(value)
            else:
                module._buffers[key] = value.to(buffer.device, copy=True)
        return [place.name for place in places]

    def settle(self, function: str) -> None:
        """Put back what has moved all the same, and say so; and of frozen parameters."""
        now = self._glance() if self._frozen else {}
        changed = [name for name, seen in self._frozen.items() if name in now and now[name].differs(seen)]
        if changed:
            self._frozen = now
            warn(
                f"{function}: frozen parameters must stay as they are while a task is learned, got {len(changed)} that "
                f"were written to: {listed(changed)}. Nothing protects what that does, and no certificate speaks of "
                "it: let no forward, hook or optimizer move them."
            )
        moved = self.put_back() if self.frozen else []
        if moved:
            warn(
                f"{function}: buffers must stay as they are while a task is learned, got {len(moved)} that had moved: "
                f"{listed(moved)}. They were put back, but what was trained had seen them move. Keep their modules "
                "from writing to them, or let them move with frozen_buffers=False in the settings."
            )

    def tell_of_moves(self, function: str) -> bool:
        """Between tasks nothing holds them; whether some have moved, which is said: they are no part of a state."""
        own, moved = model_buffers(self.model, self.free), self.moved()
        names = [name for name in moved if name in own]
        if names:
            warn(
                f"{function}: buffers must be those of the last task, got {len(names)} that have moved since: "
                f"{listed(names)}. They are not in the state, which fits only a model that has the same. Evaluate in "
                "eval(), or let them move with frozen_buffers=False in the settings."
            )
        return bool(names)

    def _glance(self) -> dict[str, _Seen]:
        """Every frozen parameter's hash."""
        seen = {}
        for name, p in self.model.named_parameters():
            plain = type(p) is nn.Parameter and not (p.requires_grad or p.is_meta or is_lazy(p))
            if plain and ".lora_" not in name and not any(f".{part}." in f".{name}." for part in self.free):
                seen[name] = _Seen(p.dtype, sums(p, remembered=True))
        return seen

    @contextmanager
    def closing(self) -> Iterator[None]:
        """The end of what they were held for; on an error they are held on."""
        self.release()
        try:
            yield
        except BaseException:
            if self.frozen:
                self.put_back()
            self.hold()
            raise
        if self.frozen:
            self.put_back()  # what a pass in eval() has moved

    @torch.no_grad()
    def restore(self) -> None:
        """Make everything what it was, caches too: as if there had been no training."""
        self.release()
        self.put_back()
        for buffer, value in self._all:
            buffer.copy_(value)


class _Seen(NamedTuple):
    """A frozen parameter's hash."""

    dtype: torch.dtype
    sums: bytes

    def differs(self, other: _Seen) -> bool:
        """Whether the values do; what was converted cannot be compared."""
        return self.dtype == other.dtype and self.sums != other.sums


class _Place(NamedTuple):
    module: nn.Module
    key: str
    name: str
    buffer: Tensor
    saved: bool
    """Whether it is part of the ``state_dict``."""


def _places(model: nn.Module, free: Collection[str] = ()) -> Iterator[_Place]:
    """The model's own buffers: without those of adapters and of what a method put into it."""
    ours = {id(m) for part in model.modules() if isinstance(part, LoraSlot | ClassHead) for m in part.modules()}
    for path, module in model.named_modules():
        if id(module) in ours or any(f".{name}." in f".{path}." for name in free):
            continue
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and not is_lazy(buffer):
                saved = key not in module._non_persistent_buffers_set
                yield _Place(module, key, f"{path}.{key}".lstrip("."), buffer, saved)


def model_buffers(model: nn.Module, free: Collection[str] = ()) -> dict[str, Tensor]:
    """The model's own buffers that are part of its ``state_dict``, by name."""
    return {place.name: place.buffer for place in _places(model, free) if place.saved}


@torch.no_grad()
def set_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the model's own buffers these values."""
    own = model_buffers(model)
    for name, value in values.items():
        own[name].copy_(value)


def _moves_in_train_alone(module: nn.Module) -> bool:
    """Whether its buffers are statistics or power iterations that eval() uses and does not change."""
    return (
        isinstance(module, _NormBase | _SpectralNorm)
        or bool({"running_mean", "running_var"} & set(module._buffers))  # of normalisation layers that are not torch's
        or any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    )


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """``module.train(mode)`` of a module that stays in eval()."""
    for child in module.children():
        child.train(mode)
    return module


class _OnCopies:
    """Lets a module run on copies of its buffers in train(), and goes away once they are seen to stay as they are."""

    def __init__(self, keys: list[str]):
        self.keys = keys
        self.own: dict[int, list[dict[str, Tensor] | None]] = {}  # by module: one may call itself
        self.handles: list[RemovableHandle] = []

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        self.handles = [
            module.register_forward_pre_hook(self.begin),
            module.register_forward_hook(self.end, always_call=True),
        ]
        return self.handles

    def begin(self, module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        own: dict[str, Tensor] | None = None
        if module.training:
            own = {key: buffer for key in self.keys if (buffer := module._buffers.get(key)) is not None}
            module._buffers.update({key: buffer.clone() for key, buffer in own.items()})
        self.own.setdefault(id(module), []).append(own)

    def end(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if torch.compiler.is_compiling() or not self.own.get(id(module)):
            return
        own = self.own[id(module)].pop()
        if own is None:
            return
        used = {key: module._buffers.get(key) for key in own}
        module._buffers.update(own)
        if all(now is not None and _same(now, own[key]) for key, now in used.items()):
            for handle in self.handles:
                handle.remove()


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether they are equal bit for bit, NaN too, wherever and however exact they are held by now."""
    if now.shape != then.shape:
        return False
    now, then = now.detach(), then.to(now.device, now.dtype)
    if torch.equal(now, then):
        return True
    both = torch.isnan(now) & torch.isnan(then) if now.is_floating_point() else torch.zeros_like(now, dtype=torch.bool)
    return bool((both | (now == then)).all())
