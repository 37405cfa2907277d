"""KeepLoRA and KeepLoRA++: adapters confined to the residual subspace (the class users hold)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from keeplora._version import __version__
from keeplora.distributed import processes
from keeplora.lora import (
    Confinement,
    LoraSlot,
    ProjectedAdamW,
    Target,
    confine,
    depth_factor,
    depth_positions,
    merge_ahead,
    unwrap,
    wrap,
)
from keeplora.math.precision import full_precision
from keeplora.methods.capacity import Capacity, layer_capacity
from keeplora.methods.method import LossFn, Method, freeze, require_loss_fn
from keeplora.methods.progress import for_all_layers
from keeplora.methods.state import State, StateError, read_state, write_state
from keeplora.methods.verify import added_by_task, check_state, fingerprint

from .adapters import Protected, adapter_tensors, attach, new_adapter, restore, warn_of_small_ranks
from .certificate import RetentionCertificate, merge_and_certify
from .choice import chosen_targets, warn_of_neighbours
from .config import KeepLoraConfig
from .directions import direction_finder
from .peft_exchange import PeftExchange
from .protected import extended_bases, weight_bases
from .trained_a import bases_of_a, restore_confinement

__all__ = ["KeepLora"]

T = TypeVar("T")


class KeepLora(PeftExchange, Method):
    r"""Continual learning by LoRA in the subspace that neither the pretrained weights nor earlier tasks use.

    For every adapted weight W ``[out, in]`` with protected orthonormal basis Q ``[in, k]``:

    .. math::
        Q_0 &= \text{top right singular vectors of } W, \text{ energy } \varepsilon_w \\
        A &= \text{top-}r \text{ right singular vectors of } G (I - Q Q^\top), \quad B = 0 \\
        y &= x W^\top + s\,\lambda_l\,(x A^\top) B^\top, \quad \lambda_l = \gamma + (1 - \gamma)\tfrac{l}{L-1} \\
        W &\leftarrow W + s\,\lambda_l B A, \quad Q \leftarrow [Q, \text{top of } C], \text{ energy } \varepsilon_f

    G is the task's mean gradient, C the second moment of the layer's inputs after the task. Since ``A Q = 0``,
    inputs in span(Q) are mapped as before, up to rounding; :meth:`after_task` returns the proof in numbers.

    Args:
        model: Any model with linear layers; towers, blocks and padding of open_clip's and transformers' are known. Its
            layers are replaced in place by ones that can hold adapters; it stays the same object.
        config: Settings; :class:`KeepLoraConfig` () is KeepLoRA++ as published, ``depth_scale=1.0`` KeepLoRA.
        targets: The weights to choose from, instead of what :func:`keeplora.families.find_targets` finds.
        progress: Whether passes over batches and layers draw bars on stderr; None: if that is a terminal.

    Raises:
        ValueError: ``target_modules`` matches nothing, or r is larger than a layer's width.

    Source: KeepLoRA, arXiv:2601.19659 (ICLR 2026); KeepLoRA++, arXiv:2606.16256. From the papers: the formulas. From
    their public code (MaolinLuo/KeepLoRA): the defaults, λ in the vision tower alone, one gradient pass and one feature
    pass per task. Here otherwise: the weight basis is on the input side, where the CLIP code takes output vectors
    (``weight_side="output"``); C is the second moment of all tokens, where that code averages inputs over batches
    (``feature_statistic="slot_mean"``), with its own default for ε_f; one rank rule, the fewest directions that reach
    the share; one statistic for all layers that read one tensor; gradients of the adapted weights alone.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> keeper = KeepLora(model, KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5))
        >>> keeper.before_task(data, loss_fn)
        >>> optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-3)
        >>> for batch in data:
        ...     loss_fn(keeper.model, batch).backward()
        ...     optimizer.step(); optimizer.zero_grad()
        >>> keeper.after_task(data).leak < 1e-6
        True
    """

    name: ClassVar[str] = "keeplora"
    config_type: ClassVar[type[KeepLoraConfig]] = KeepLoraConfig

    def __init__(
        self,
        model: nn.Module,
        config: KeepLoraConfig | None = None,
        *,
        targets: Sequence[Target] | None = None,
        progress: bool | None = None,
    ):
        self.model, self.progress = model, progress
        self.config = config or KeepLoraConfig()
        self.targets = chosen_targets(model, self.config, targets)
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.slots: list[LoraSlot] = wrap(model, self.targets)
        for slot in self.slots:
            slot.host.forward_mode = self.config.forward
        self._hooks = merge_ahead(model)
        positions = depth_positions(self.targets)
        self._scalings = [
            self.config.scaling * depth_factor(self.config.depth_scale_of(t.tower), *positions[t.name])
            for t in self.targets
        ]
        self._protected: list[Protected] | None = None
        self._loss_fn: LossFn | None = None
        self.tasks_learned = 0
        self.training_task = False
        self._closed = False

    # ------------------------------------------------------------------ the life of a task

    def before_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Find where the task wants to go in free space, and put an adapter there: A frozen, B trained.

        One pass over ``loader`` with gradients of the adapted weights only (two where they are sketched); before the
        first task also the bases of the pretrained weights. The model's function does not change. On an error nothing
        has changed.

        Args:
            loader: The task's training batches; can be iterated again later.
            loss_fn: ``loss_fn(model, batch) -> scalar``. Remembered for :meth:`after_task`.

        Raises:
            RuntimeError: a task is open already; the loss has no gradient to any adapted weight.
            ValueError: an empty loader, a loss or gradient that is not finite (batch or layer named).

        Warns:
            UserWarning: a layer has less than r free directions (what is left is used), or none (it is skipped).
        """
        with processes().together():
            self._require_open_model()
            if self.training_task:
                raise RuntimeError(
                    "before_task: the previous task must be closed first, got an open task. Call after_task(loader)."
                )
            require_loss_fn(loss_fn)
            self._require_same_weights("before_task")
            found = direction_finder(
                self.model, self.slots, loader, loss_fn, self.config, self.tasks_learned, self.progress
            )
            with full_precision(self.slots[0].weight.device):
                protected = self._protected_or_weights()
            bases = [p.basis for p in protected]
            directions = found.directions(bases)
            adapters = [
                new_adapter(*parts, self.config) for parts in zip(self.slots, directions, self._scalings, strict=True)
            ]
        warn_of_small_ranks(self.slots, bases, directions, self.config.r)
        attach(self.model, self.slots, adapters)
        self._protected, self._loss_fn, self.training_task = protected, loss_fn, True

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' B matrices, for the optimizer; with ``train_a`` A and B of every adapter.

        Raises:
            RuntimeError: no task is open.
        """
        self._require_task("trainable_parameters")
        adapters = [slot.adapter for slot in self.slots if slot.adapter is not None]
        return [p for adapter in adapters for p in ((adapter.A, adapter.B) if self.config.train_a else (adapter.B,))]

    def optimizer(self, **options: Any) -> ProjectedAdamW:
        """AdamW over :meth:`trainable_parameters` that keeps a trained A outside of what is protected.

        Args:
            options: Of :class:`keeplora.lora.ProjectedAdamW`: lr, betas, eps, weight_decay, capturable, fused.
        """
        return ProjectedAdamW(self.trainable_parameters(), bases=self._bases_to_keep("optimizer"), **options)

    def confine(self, optimizer: torch.optim.Optimizer) -> Confinement:
        """Let every step of an optimizer of one's own keep a trained A outside of what is protected.

        Returns a handle with ``remove()``; see :func:`keeplora.lora.confine`. Raises ``ValueError`` where the optimizer
        does not hold the adapters' A.
        """
        return confine(optimizer, self._bases_to_keep("confine"))

    def adopt(self, optimizer: torch.optim.Optimizer) -> Confinement | None:
        return self.confine(optimizer) if self.config.train_a else None

    @torch.no_grad()
    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> RetentionCertificate:
        r"""Merge the adapters, protect what the task's inputs look like, and prove what was retained.

        One pass over ``loader`` without gradients. The features are those of the learned model: they are collected
        before the merge, which does not change the function, so that an error leaves everything as it was.

        Args:
            loader: The task's training batches.
            loss_fn: Runs the model on a batch; by default the one :meth:`before_task` was given.

        Returns:
            The retention certificate: leak, orthogonality, captured energy and room, per layer and the worst.

        Raises:
            RuntimeError: no task is open, or no ``loss_fn`` is known (after :meth:`load`).
            ValueError: an empty loader, features or trained adapters that are not finite (batch and layer named).

        Warns:
            UserWarning: a trained A had left its free space (the optimizer did not keep it there); it is projected
                back before anything else. Or parameters besides the adapters' were left to train.
        """
        with processes().together():
            self._require_task("after_task")
            forward = loss_fn or self._loss_fn
            if forward is None:
                raise RuntimeError("after_task: loss_fn must be given after loading a state, got None")
            assert self._protected is not None
            old = self._protected
            for slot in self.slots:
                slot.check_finite("after_task")
            self._require_same_weights("after_task")
            warn_of_neighbours("after_task", self.model, self.trainable_parameters())
            restore_confinement("after_task", self.slots, [p.basis for p in old])
            new = extended_bases(
                self.model, self.slots, loader, forward, self.config, [p.basis for p in old], shown=self.progress
            )
        with full_precision(self.slots[0].weight.device):
            layers = self._for_all_layers(
                lambda group: [merge_and_certify(self.slots[i], old[i].basis, new[i]) for i in group], "merge"
            )
        self._protected = [Protected(n.q, (*o.added, n.added)) for o, n in zip(old, new, strict=True)]
        result = RetentionCertificate(self.tasks_learned, tuple(layers))
        self.tasks_learned += 1
        self.training_task = False
        return result

    # ------------------------------------------------------------------ what a user asks in between

    def capacity(self) -> Capacity:
        """What is protected, free and was added in every adapted weight, and for how many more tasks that is enough.

        A sequence of :class:`keeplora.LayerCapacity` that prints as a table. What ``weight_energy`` protects is known
        once :meth:`before_task` ran; until then everything counts as free.
        """
        protected = self._protected or [Protected(slot.weight.new_zeros(0, 0)) for slot in self.slots]
        layers = (
            layer_capacity(slot.target, slot.weight.shape[1], p.basis.shape[1], p.added, self.config.r)
            for slot, p in zip(self.slots, protected, strict=True)
        )
        return Capacity(tuple(layers), self.tasks_learned)

    def basis(self, name: str) -> Tensor:
        """The protected basis Q ``[in, k]`` of a target, float32: a copy."""
        for i, slot in enumerate(self.slots):
            if slot.name == name:
                if self._protected is None:
                    return slot.weight.new_zeros(slot.weight.shape[1], 0, dtype=torch.float32)
                return self._protected[i].basis.clone()
        raise ValueError(f"basis: name must be one of the targets, got {name!r}. See keeper.capacity().")

    def merge(self) -> nn.Module:
        """Give the model back with its ordinary layers, every learned task merged in; returns ``model``.

        The keeper cannot be used afterwards; save it first if more tasks are to come. Gradient flags are as they
        were before the keeper was made.

        Raises:
            RuntimeError: a task is open.
        """
        self._require_open_model()
        if self.training_task:
            raise RuntimeError("merge: the open task must be closed first. Call after_task(loader).")
        self._release()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        self._closed = True
        return self.model

    # ------------------------------------------------------------------ state

    def state(self) -> State:
        """Merged weights, bases and open adapters, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for i, slot in enumerate(self.slots):
            tensors[f"{slot.name}.weight"] = slot.exact_weight
            if self._protected is not None:
                tensors[f"{slot.name}.basis"] = self._protected[i].basis
            tensors |= adapter_tensors(slot)
        meta = {
            "method": self.name,
            "config": self.config.to_dict(),
            "targets": [slot.name for slot in self.slots],
            "tasks_learned": self.tasks_learned,
            "training_task": self.training_task,
            "added": [p.added[-1] if p.added else 0 for p in self._protected] if self._protected else None,
            "added_by_task": [list(p.added) for p in self._protected] if self._protected else None,
            "frozen": fingerprint(self.model, self.slots),
            "versions": {"keeplora": __version__, "torch": str(torch.__version__)},
        }
        return State({k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, meta)

    def load_state(self, state: State) -> None:
        """Continue from ``state``. Everything is checked before anything changes.

        Raises:
            StateError: the state belongs to another method, another model or other targets, or is incomplete.
        """
        self._require_open_model()
        check_state(state, self.name, self.model, self.slots)
        added = added_by_task(state)
        protected = []
        for i, slot in enumerate(self.slots):
            device = slot.weight.device
            slot.host.set_exact_weight(slot.slot, state.tensors[f"{slot.name}.weight"].to(device))
            if added is not None:
                protected.append(Protected(state.tensors[f"{slot.name}.basis"].to(device), added[i]))
            restore(slot, state.tensors, self._scalings[i], self.config)
        self._protected = protected or None
        self.tasks_learned, self.training_task = state.meta["tasks_learned"], state.meta["training_task"]
        if self.training_task:
            freeze(self.model)
            for parameter in self.trainable_parameters():
                parameter.requires_grad_(True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a folder: safetensors and JSON, atomically, without pickle."""
        write_state(path, self.state())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        targets: Sequence[Target] | None = None,
        progress: bool | None = None,
    ) -> KeepLora:
        """A keeper that continues from :meth:`save`, around the pretrained ``model`` it was made with.

        Raises:
            StateError: nothing there, damaged, of a newer version, or made with another model.
        """
        state = read_state(path)
        if state.meta.get("method") != cls.name:
            raise StateError(
                f"load: {os.fspath(path)} must hold a state of method {cls.name!r}, got {state.meta.get('method')!r}"
            )
        keeper = cls(model, cls.config_type(**state.meta["config"]), targets=targets, progress=progress)
        try:
            check_state(state, cls.name, model, keeper.slots)
        except StateError:
            keeper._release()
            raise
        keeper.load_state(state)
        return keeper

    # ------------------------------------------------------------------ parts

    def _for_all_layers(self, compute: Callable[[list[int]], Iterable[T]], what: str) -> list[T]:
        return for_all_layers(self.slots, compute, what, shown=self.progress)

    def _protected_or_weights(self) -> list[Protected]:
        """What is protected; before the first task what the pretrained weights know."""
        return self._protected or [Protected(q) for q in weight_bases(self.slots, self.config, shown=self.progress)]

    def _require_same_weights(self, function: str) -> None:
        """All processes must learn one task with one model."""
        peers = processes()
        if peers.size == 1:
            return
        held = {slot.name: slot.weight.detach() for slot in self.slots}
        for slot in self.slots:
            if slot.adapter is not None:
                held |= {f"{slot.name}.{name}": p.detach() for name, p in slot.adapter.named_parameters()}
        peers.require_same(function, held)

    def _release(self) -> None:
        unwrap(self.model)
        for hook in self._hooks:
            hook.remove()

    def _bases_to_keep(self, function: str) -> dict[nn.Parameter, Tensor]:
        """The basis of every A that is trained."""
        self._require_task(function)
        assert self._protected is not None
        return bases_of_a(self.slots, [p.basis for p in self._protected]) if self.config.train_a else {}

    def _require_task(self, function: str) -> None:
        self._require_open_model()
        if not self.training_task:
            raise RuntimeError(f"{function}: a task must be open, got none. Call before_task(loader, loss_fn) first.")

    def _require_open_model(self) -> None:
        if self._closed:
            raise RuntimeError("KeepLora: the keeper has given its model back by merge(). Make a new one.")
