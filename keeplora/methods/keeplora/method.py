"""KeepLoRA and KeepLoRA++: adapters confined to the residual subspace (the class users hold)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora._calls import public
from keeplora._files import folder_named
from keeplora.families import find_targets
from keeplora.families.coverage import Targets
from keeplora.lora import (
    Confinement,
    LoraAdapter,
    ProjectedAdamW,
    Target,
    TokenMask,
    confine,
    depth_factor,
    depth_positions,
)
from keeplora.lora.peft_checkpoint import require_peft
from keeplora.math.lowrank import TopDirections
from keeplora.methods.capacity import Capacity
from keeplora.methods.lora_method import ON_SHARES, LoraMethod
from keeplora.methods.method import LossFn
from keeplora.methods.reading import is_counts, stored_parts
from keeplora.methods.shares import recalled_shares
from keeplora.methods.state import State, StateError
from keeplora.statistics.budget import budget_of

from .certificate import RetentionCertificate, certified
from .config import KeepLoraConfig
from .directions import direction_finder
from .import_peft import imported_adapters
from .protected import Protected, bases_of, extended_bases, weight_bases
from .trained_a import confined_again, leak_of_rows

__all__ = ["KeepLora"]

MOST_LEAK = 1e-4
"""Of a row of a frozen A inside the basis: a hundred times what rounding leaves there."""


class KeepLora(LoraMethod):
    r"""Continual learning by LoRA in the subspace that neither the pretrained weights nor earlier tasks use.

    For every adapted weight W ``[out, in]`` with protected orthonormal basis Q ``[in, k]``:

    $$
    \begin{aligned}
    Q_0 &= \text{top right singular vectors of } W, \text{ energy } \varepsilon_w \\
    A &= \text{top-}r \text{ right singular vectors of } G (I - Q Q^\top), \quad B = 0 \\
    y &= x W^\top + s\,\lambda_l\,(x A^\top) B^\top, \quad \lambda_l = \gamma + (1 - \gamma)\tfrac{l}{L-1} \\
    W &\leftarrow W + s\,\lambda_l B A, \quad Q \leftarrow [Q, \text{top of } C], \text{ energy } \varepsilon_f
    \end{aligned}
    $$

    G is the task's mean gradient, C the second moment of the layer's inputs after the task. Since ``A Q = 0``,
    inputs in span(Q) are mapped as before, up to rounding; ``after_task`` returns the proof in numbers.

    Args:
        model: Any model with linear layers; towers, blocks and padding of open_clip's and transformers' are known. Its
            layers are replaced in place by ones that can hold adapters; it stays the same object. Weights of
            bitsandbytes and torchao stay as they are: what tasks learn is kept beside them, as with ``merge=False``.
        config: Settings; ``KeepLoraConfig()`` is KeepLoRA++ as published, ``depth_scale=1.0`` KeepLoRA.
        targets: The weights to choose from, instead of what [`find_targets`][] finds.
        token_mask: Which inputs count as features, instead of what ``keeplora.families.token_mask`` tells:
            ``mask(slot, x)`` gives ``bool [x.shape[:-1]]``, True where a token counts, or None where all do.
        progress: Whether passes over batches and layers draw bars on stderr; None: if that is a terminal.

    Raises:
        ValueError: ``target_modules`` matches nothing, or r is larger than a layer's width.

    Source: KeepLoRA, arXiv:2601.19659 (ICLR 2026); KeepLoRA++, arXiv:2606.16256. From the papers: the formulas. From
    their public code (MaolinLuo/KeepLoRA): the defaults, λ in the vision tower alone, one gradient pass and one feature
    pass per task. Here otherwise: the weight basis is on the input side, where the CLIP code takes output vectors
    (``weight_side="output"``); C is the second moment of all tokens, where that code averages inputs over batches
    (``feature_statistic="slot_mean"``), with its own default for ε_f; one rank rule, the fewest directions that reach
    the share; one statistic for all layers that read one tensor; gradients of the adapted weights alone.

    Examples:
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
    config_type: ClassVar[type] = KeepLoraConfig
    keeps_beside: ClassVar[bool] = True
    on_shares: ClassVar[frozenset[str]] = ON_SHARES | {"optimizer", "confine"}
    config: KeepLoraConfig

    @public
    def __init__(
        self,
        model: nn.Module,
        config: KeepLoraConfig | None = None,
        *,
        targets: Sequence[Target] | None = None,
        token_mask: TokenMask | None = None,
        progress: bool | None = None,
    ):
        super().__init__(model, config, targets=targets, token_mask=token_mask, progress=progress)
        self.train_a = self.config.train_a
        for slot in [] if self.shared_out else self.slots:
            slot.host.forward_mode = self.config.forward
        positions = depth_positions(self.targets)
        self._scalings = [
            self.config.scaling * depth_factor(self.config.depth_scale_of(t.tower), *positions[t.name])
            for t in self.targets
        ]
        self._protected: list[Protected] | None = None

    def targets_among(self, targets: Sequence[Target] | None) -> Sequence[Target]:
        towers = self.config.towers
        if targets is None:
            return find_targets(self.model, towers)
        return targets if towers is None else [target for target in targets if target.tower in towers]

    def choose_targets(self, targets: Sequence[Target] | None) -> Targets:
        chosen = super().choose_targets(targets)
        self.config.check_towers({target.tower for target in chosen})
        if self.shared_out and self.config.forward == "merged":
            raise ValueError(
                f'{type(self).__name__}: forward must be "auto" or "factored" where FSDP2 shares weights out, got '
                '"merged": a merged weight would be whole on every process. Set forward="auto".'
            )
        experts = [target.name for target in chosen if target.expert is not None]
        if experts and self.config.feature_statistic == "slot_mean":
            raise ValueError(
                f'{type(self).__name__}: feature_statistic must be "second_moment" or "sketch" for experts, got '
                f'"slot_mean" [{experts[0]}]: an expert\'s tokens have no positions that a mean could be taken at. '
                "Set one of the two, or leave experts out of target_modules."
            )
        return chosen

    def scaling_of(self, i: int) -> float:
        return self._scalings[i]

    # ------------------------------------------------------------------ the life of a task

    def open_task(self, loader: Iterable[Any], loss_fn: LossFn) -> None:
        """Find where the task wants to go in free space, and put an adapter there: A frozen, B trained.

        One pass over ``loader`` with gradients of the adapted weights only (two where they are sketched); before the
        first task also the bases of the pretrained weights.

        Raises:
            RuntimeError: the loss has no gradient to any adapted weight.
            ValueError: an empty loader, a loss or gradient that is not finite (batch or layer named).

        Warns:
            UserWarning: a layer has less than r free directions (what is left is used), or none (it is skipped).
        """
        gradients = direction_finder(
            self.model, self.slots, loader, loss_fn, self.config, self.tasks_learned, self.progress, self._batch_size,
            self.token_mask,
        )  # fmt: skip
        protected = self._protected_or_weights()
        bases = bases_of(self.slots, protected)
        directions = gradients.directions(bases)
        adapters = [self._new_adapter(i, top) for i, top in enumerate(directions)]
        unreached = self.warn_of_unreached(gradients.reached)
        self.warn_of_ranks(
            [len(top.a) for top in directions],
            none="gradient in free space",
            full=[slot.name for slot, p in zip(self.slots, protected, strict=True) if p.count == slot.weight.shape[1]],
            silent=gradients.silent,
            unreached=unreached,
            remedy="Lower weight_energy or feature_energy for more room.",
        )
        self.attach(adapters)
        self._protected = [
            replace(p, shares=p.shares.opened(share)) for p, share in zip(protected, gradients.free_shares, strict=True)
        ]

    def _new_adapter(self, i: int, top: TopDirections) -> LoraAdapter | None:
        """An adapter along the leading directions; None where there are none."""
        if self.config.init_b == "zero" or not len(top.a):
            return self.adapter_along(i, top.a)
        b = top.b * top.s
        return self.adapter_of(i, {"A": top.a, "B": b, "origin": b})

    def drop_task(self) -> None:
        super().drop_task()
        assert self._protected is not None
        self._protected = (
            [replace(p, shares=p.shares.dropped()) for p in self._protected] if self.tasks_learned else None
        )

    def optimizer(self, **options: Any) -> ProjectedAdamW:
        """AdamW over ``trainable_parameters`` that keeps a trained A outside of what is protected.

        Args:
            options: Of [`ProjectedAdamW`][]: lr, betas, eps, weight_decay, capturable, fused.
        """
        return ProjectedAdamW(self._trained("optimizer"), bases=self._bases_to_keep("optimizer"), **options)

    def confine(self, optimizer: torch.optim.Optimizer) -> Confinement:
        """Let every step of an optimizer of one's own keep a trained A outside of what is protected.

        Returns a handle with ``remove()``; see ``keeplora.lora.confine``. Raises ``ValueError`` where the optimizer
        does not hold the adapters' A.
        """
        return confine(optimizer, self._bases_to_keep("confine"))

    def adopt(self, optimizer: torch.optim.Optimizer) -> Confinement | None:
        """[`confine`][] where A is trained."""
        return self.confine(optimizer) if self.config.train_a else None

    def close_task(self, loader: Iterable[Any], loss_fn: LossFn) -> RetentionCertificate:
        """Merge the adapters, protect what the task's inputs look like, and prove what was retained.

        One pass over ``loader`` without gradients. The features are those of the learned model: they are collected
        before the merge, which does not change the function, so that an error leaves everything as it was.

        Returns:
            The retention certificate: leak, orthogonality, captured energy and room, per layer and the worst.

        Raises:
            ValueError: an empty loader, features that are not finite (batch and layer named).

        Warns:
            UserWarning: a trained A had left its free space (the optimizer did not keep it there); it is projected
                back before anything else. A basis holds less of the features than ``feature_energy`` asks for.
        """
        assert self._protected is not None
        old, bases = self._protected, bases_of(self.slots, self._protected)
        held = [(slot, partial(bases.__getitem__, i)) for i, slot in enumerate(self.slots)]
        with confined_again(
            "after_task",
            {slot.name: (slot.adapter.A, basis) for slot, basis in held if slot.adapter is not None},
            "Train with keeper.optimizer(...), or call keeper.confine(optimizer) before training.",
        ):
            new, reached = extended_bases(
                self.model, self.slots, loader, loss_fn, self.config, bases,
                own_mask=self.token_mask, shown=self.progress,
            )  # fmt: skip
            self.warn_of_unreached(reached)
        budget = budget_of(self.config.memory_budget, self.slots)
        layers = certified(self.slots, bases, new, merge=True, budget=budget, shown=self.progress)
        self._protected = [Protected((*o.parts, n.q), o.shares.closed()) for o, n in zip(old, new, strict=True)]
        return RetentionCertificate(self.tasks_learned, tuple(layers), tuple(self._moved_buffers()))

    # ------------------------------------------------------------------ what a user asks in between

    def capacity(self) -> Capacity:
        """What is protected, free and was added in every adapted weight, and for how many more tasks that is enough.

        A sequence of [`LayerCapacity`][] that prints as a table. What ``weight_energy`` protects is known
        once ``before_task`` ran; until then everything counts as free.
        """
        protected = self._protected or [Protected(()) for _ in self.slots]
        return self.capacity_of(
            [p.count for p in protected], [p.added for p in protected], self.config.r,
            [p.shares for p in protected],
        )  # fmt: skip

    def basis(self, name: str) -> Tensor:
        """The protected basis Q ``[in, k]`` of a target, float32: a copy."""
        for i, slot in enumerate(self.slots):
            if slot.name == name:
                if self._protected is None:
                    return slot.zeros(slot.weight.shape[1], 0, dtype=torch.float32)
                return bases_of(self.slots, self._protected)[i].clone()
        raise ValueError(f"basis: name must be one of the targets, got {name!r}. See keeper.capacity().")

    # ------------------------------------------------------------------ state

    def memory_state(self) -> State:
        """The protected bases."""
        if self._protected is None:
            return State({}, {"added_by_task": None})
        pairs = list(zip(self.slots, self._protected, strict=True))
        added, shares = [list(p.added) for _, p in pairs], [list(p.shares) for _, p in pairs]
        of_weights = [p.parts[0].shape[1] for _, p in pairs]
        parts = {f"{slot.name}.basis.{i}": part for slot, p in pairs for i, part in enumerate(p.parts)}
        meta = {"added_by_task": added, "of_weights": of_weights, "free_shares": shares}
        return State(parts, meta, frozenset(parts))

    def recall(self, state: State) -> list[Protected] | None:
        added, tasks = state.meta.get("added_by_task"), state.meta["tasks_learned"]
        if added is None and not tasks and not state.meta["training_task"]:
            return None
        if not is_counts(added, len(self.slots), tasks):
            raise StateError(
                f"load_state: added_by_task must have a row of {tasks} numbers for each of {len(self.slots)} targets, "
                f"got {added!r}"
            )
        of_weights = state.meta.get("of_weights")
        if not isinstance(of_weights, list) or not is_counts([of_weights], 1, len(self.slots)):
            raise StateError(f"load_state: of_weights must be {len(self.slots)} numbers, got {of_weights!r}")
        shares = recalled_shares(state, len(self.slots))
        protected = []
        for slot, row, first, pair in zip(self.slots, added, of_weights, shares, strict=True):
            parts, basis = stored_parts(
                state, f"{slot.name}.basis", slot.weight.shape[1], [first, *row], narrow=slot.coarse
            )
            a = state.tensors.get(f"{slot.name}.adapter.A")
            leak = 0.0 if a is None or self.config.train_a else leak_of_rows(a, basis)
            if leak > MOST_LEAK:
                raise StateError(
                    f"load_state: an adapter's A must keep out of the basis, got {leak:.1e} of a row inside it "
                    f"[{slot.name}]"
                )
            own = parts if self.config.bases == "host" else [part.to(slot.weight.device) for part in parts]
            protected.append(Protected(tuple(own), pair))
        return protected

    def remember(self, memory: list[Protected] | None) -> None:
        self._protected = memory

    # ------------------------------------------------------------------ from PEFT

    @public
    def import_peft(self, path: str | os.PathLike[str], *, project: bool = False, other_base: bool = False) -> None:
        """Open a task with the adapter of a stock PEFT checkpoint, instead of ``before_task``.

        Train it further or not, then close the task with ``after_task(loader, loss_fn)``. Weights it does not name get
        no adapter. On an error nothing has changed.

        Args:
            path: A local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            project: Take what is protected out of the adapter, ``A ← A (I − Q Qᵀ)``. Otherwise an adapter that
                reaches into it is refused, as one trained without KeepLoRA does.
            other_base: Take an adapter that ``export_peft`` wrote for other weights than this model has now or had
                before its first task. Adapters of others do not say what they were made for.

        Raises:
            StateError: one of the two files is not there, damaged, or no file at all; it is more than plain LoRA on
                unchanged base weights (DoRA, biases, PiSSA and its like, saved modules), has layers that are no
                targets, or reaches into what is protected; the model holds its updates already, or it was made for
                other weights.
            RuntimeError: a task is open.
            ImportError: PEFT is not installed.
        """
        folder = folder_named("import_peft", path)
        require_peft("import_peft")
        self._require("import_peft", task=False)
        protected = self._protected_or_weights()
        parts = imported_adapters(
            folder, self.slots, bases_of(self.slots, protected), self._scalings, project=project,
            original=self.base_hashes, other_base=other_base,
        )  # fmt: skip
        adapters = [None if part is None else self.adapter_of(i, part) for i, part in enumerate(parts)]
        with self._opening(None):
            self.attach(adapters)
            self._protected = protected

    # ------------------------------------------------------------------ parts

    def _protected_or_weights(self) -> list[Protected]:
        """What is protected; before the first task what the pretrained weights know."""
        if self._protected is not None:
            return self._protected
        return [Protected((q,)) for q in weight_bases(self.slots, self.config, shown=self.progress)]

    def _bases_to_keep(self, function: str) -> dict[nn.Parameter, Tensor]:
        """The basis of every A that is trained."""
        self._require(function, task=True)
        assert self._protected is not None
        if not self.config.train_a:
            return {}
        pairs = zip(self.slots, bases_of(self.slots, self._protected), strict=True)
        return {slot.adapter.A: q.to(slot.adapter.A) for slot, q in pairs if slot.adapter is not None}
