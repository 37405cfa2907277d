"""Methods that adapt chosen weights: their slots, the adapters in them, and both as state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from keeplora._calls import public
from keeplora.distributed import processes
from keeplora.families import find_targets
from keeplora.families.coverage import Targets, coverage, warn_of_left_out
from keeplora.lora import (
    LoraAdapter,
    LoraSlot,
    Target,
    TokenMask,
    merge_adapters,
    merge_ahead,
    require_whole,
    select_targets,
    unwrap,
    wrap,
)
from keeplora.lora.kept import Kept
from keeplora.lora.quantised import QuantisedSlot, quantised_layers, to_ordinary
from keeplora.lora.shares import shared_over
from keeplora.math.batch import within
from keeplora.statistics import FeatureStatistic
from keeplora.statistics.budget import budget_of

from .arguments import require_function, require_targets
from .capacity import Capacity, layer_capacity
from .feature_passes import feature_passes
from .flags import freeze
from .method import LossFn
from .progress import for_all_layers
from .published import Published
from .ranks import warn_of_ranks, warn_of_unreached
from .refusals import check_kept, check_ranks, refuse_peft
from .shares import UNKNOWN, Shares
from .size import update_size, warn_of_size

__all__ = ["ON_SHARES", "LoraMethod"]

T = TypeVar("T")

ON_SHARES = frozenset({"made", "before_task", "after_task", "merge", "save", "load", "load_state", "export_peft"})
"""The calls that work on rows of weights in every method whose adapters are merged: its ``on_shares``, or part of it.
"""


class LoraMethod(Published):
    """A method that adapts the weights its config names in ``target_modules``.

    A subclass gives ``open_task`` and ``close_task``; if its adapters are not made by its config's ``scaling``
    alone, [`adapter_of`][]; and if it remembers anything between tasks but the merged weights, ``memory_state``,
    ``recall`` and ``remember``. All of them are called only when a task may be opened, closed or dropped.

    Args:
        model: Any model with linear layers. Those that are adapted are replaced in place by ones that can hold
            adapters, until ``merge``; it stays the same object.
        config: Settings, ``target_modules`` among them.
        targets: The weights to choose from, instead of what [`find_targets`][] finds.
        token_mask: Which inputs count as features, instead of what ``keeplora.families.token_mask`` tells.
        progress: Whether passes over batches and layers draw bars on stderr; None: if that is a terminal.

    Raises:
        ValueError: ``target_modules`` matches nothing; r is larger than a layer's width; a weight is shared by two
            layers.
    """

    keeps_beside: ClassVar[bool] = False
    """Whether updates may be kept beside weights: nothing reads a weight but as ``slot.exact_weight``, and nothing is
    written but by [`merge_adapters`][]."""

    train_a: bool = False
    """Whether A is trained along with B, of adapters that [`adapter_of`][] makes."""

    @public
    def __init__(
        self,
        model: nn.Module,
        config: Any = None,
        *,
        targets: Sequence[Target] | None = None,
        token_mask: TokenMask | None = None,
        progress: bool | None = None,
    ):
        super().__init__(model, config, progress=progress)
        refuse_peft(type(self).__name__, model)
        require_targets(type(self).__name__, targets)
        require_function(type(self).__name__, "token_mask", token_mask)
        self.token_mask = token_mask
        self.certificates = []
        self.targets = self.choose_targets(targets)
        check_ranks(model, self.targets, getattr(self.config, "r", 0), type(self).__name__)
        check_kept(self)
        self.slots: list[LoraSlot] = wrap(model, self.targets, shares=self.shared_out, quantised=self.keeps_beside)
        for slot in () if getattr(self.config, "merge", True) else self.slots:
            if not slot.keeps:
                slot.keep_beside()
        for slot in self.slots:
            slot.exact.on_device = getattr(self.config, "exact_weights", "host") == "device"
            slot.exact.first = slot.local.first if self.shared_out else None
        self._hooks = [] if self.shared_out else merge_ahead(model)

    # ------------------------------------------------------------------ what a method is

    def choose_targets(self, targets: Sequence[Target] | None) -> Targets:
        """What the config adapts of ``targets``, or of what the model's family has; refuses what cannot be.

        Warns:
            UserWarning: ``"all-linear"`` does not reach all weights of the blocks, or other names pass over blocks; a
                stack of blocks belongs to no known tower.
        """
        among, names = self.targets_among(targets), self.config.target_modules
        try:
            selected = select_targets(among, names)
        except ValueError:
            require_whole(type(self).__name__, self.model, _meant(self.model, names), shares=self.shared_out)
            raise
        chosen = coverage(self.model, selected, among)
        if targets is None:
            towers = getattr(self.config, "towers", None)
            warn_of_left_out(type(self).__name__, self.model, chosen, among, names, towers)
        return chosen

    def targets_among(self, targets: Sequence[Target] | None) -> Sequence[Target]:
        """What ``target_modules`` chooses of."""
        return find_targets(self.model) if targets is None else targets

    def scaling_of(self, i: int) -> float:
        """c of slot i's adapter."""
        scaling: float = self.config.scaling
        return scaling

    def adapter_of(self, i: int, tensors: Mapping[str, Tensor]) -> LoraAdapter:
        """The adapter of slot i with these tensors, as a task starts with it and as a saved one comes back.

        Args:
            tensors: What ``keeplora.lora.LoraAdapter.tensors`` gives: A, B, and whatever else its kind has.

        Raises:
            KeyError, ValueError: one is missing, or of another shape.
        """
        return LoraAdapter(
            tensors["A"], tensors["B"], self.scaling_of(i), train_a=self.train_a,
            dropout=getattr(self.config, "dropout", 0.0), origin=tensors.get("origin"),
        )  # fmt: skip

    def adapter_along(self, i: int, a: Tensor) -> LoraAdapter | None:
        """An adapter of slot i along the rows of ``a [rank, in]``, with B at zero; None where there are none."""
        return self.adapter_of(i, {"A": a, "B": a.new_zeros(len(self.slots[i].weight), len(a))}) if len(a) else None

    def drop_task(self) -> None:
        for slot in self.slots:
            slot.detach()

    @public
    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> Any:
        """As [`Method.after_task`][].

        Warns:
            UserWarning: also where what was merged is next to nothing, or about as large as the weights
                (``size``); not of methods that train whole weights, which keep no update.
        """
        for slot in self.slots:
            slot.exact.fresh.clear()
        self._require("after_task", task=True)
        with processes(self.group).together():
            base = self.known_base()
            if self.shared_out:
                self.pretrained_hashes()
        report = super().after_task(loader, loss_fn)
        self.base_hashes = base
        worst = getattr(report, "worst", None)
        self.certificates.append(None if worst is None else worst())
        kept = [slot.exact.fresh if slot.learned is not None else [] for slot in self.slots]
        merged = [[(update.a, update.b * update.scaling) for update in updates] for updates in kept]
        for slot in self.slots:
            slot.exact.fresh.clear()
        everywhere = processes(self.group).sum_of if self.shared_out else float
        warn_of_size("after_task", update_size(merged, (_rows(slot) for slot in self.slots), everywhere))
        return report

    def merge(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """As [`Method.merge`][]; what was kept beside weights is merged into them now.

        Args:
            dtype: Of a model with quantised layers: all of them, adapted or not, become ``nn.Linear`` in this dtype,
                or None for that of the model's other weights. Their weights are the dequantised ones and the updates,
                rounded once.

        Raises:
            ValueError: ``dtype`` is no floating-point one, or no layer is quantised.
        """
        self._require("merge", task=False)
        packed = self.merges and bool(quantised_layers(self.model))
        if dtype is not None and not (packed and dtype.is_floating_point):
            what = dtype if packed else f"{dtype} for a model without quantised layers"
            raise ValueError(f"merge: dtype must be a floating-point one, of a quantised model alone, got {what}")
        if self.merges:
            for slot in self.slots:
                if isinstance(slot.exact, Kept) and not isinstance(slot, QuantisedSlot):
                    slot.exact.fold()
        if packed and any(slot.keeps for slot in self.slots):
            to_ordinary(self.model, self.slots, dtype)
        return super().merge()

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """The open adapters' parameters that take gradients, by target."""
        adapters = [(slot.name, slot.adapter) for slot in self.slots if slot.adapter is not None]
        return [(name, p) for name, adapter in adapters for p in adapter.parameters() if p.requires_grad]

    def _require_same_weights(self, function: str) -> None:
        if self.shared_out and (over := shared_over(self.model)) != processes().size:
            raise ValueError(
                f"{function}: group must be the {over} processes that fully_shard shared the model out to, got "
                f"{processes().size}. Give before_task the group of its mesh."
            )
        super()._require_same_weights(function)

    def shared_tensors(self) -> Mapping[str, Tensor]:
        held: dict[str, Tensor] = {}
        if not self.shared_out:  # of which every process has other rows
            held = {slot.name: slot.part(slot.stored).detach() for slot in self.slots}
        for slot in self.slots:
            if slot.adapter is not None:
                held |= {f"{slot.name}.{name}": p.detach() for name, p in slot.adapter.named_parameters()}
        return held

    def release(self) -> None:
        unwrap(self.model)
        for hook in self._hooks:
            hook.remove()

    # ------------------------------------------------------------------ parts a method is made of

    whole_spectra: ClassVar[bool] = False
    """Whether [`from_features`][] is asked for eigendecompositions of whole moments, however wide."""

    def from_features(
        self,
        loader: Iterable[Any],
        forward: LossFn,
        compute: Callable[[list[int], Mapping[int, FeatureStatistic]], Iterable[T]],
        phase: str,
        *inputs: Sequence[Any],
    ) -> tuple[list[T], list[str]]:
        """Of every slot what ``compute`` makes of the second moment of its inputs; padding does not count where it is
        known.

        Moments that do not fit the config's ``memory_budget`` together are gathered in several passes over ``loader``.
        Layers that no token came to are named in a warning; their statistic is zero.

        Args:
            compute: Given the positions of several slots, and statistics by position, the results of these slots.
            phase: What its progress bar says.
            inputs: What else a result follows from, of every slot. Of slots with one statistic whose entries are the
                same objects, as q, k and v, the first stands for all.

        Returns:
            The results, and the names of layers that no token came to.
        """
        function = "after_task" if self.training_task else "before_task"
        budget: int | None = self.config.memory_budget
        results: dict[int, T] = {}
        reached = [False] * len(self.slots)
        passes = feature_passes(
            function, self.model, self.slots, loader, forward, memory_budget=budget, own_mask=self.token_mask,
            shown=self.progress, whole_spectra=self.whole_spectra,
        )  # fmt: skip
        for group, statistics in passes:
            mine = dict(zip(group, statistics, strict=True))
            del statistics
            for i, statistic in mine.items():
                reached[i] = statistic.tokens > 0
            with within(budget_of(budget, self.slots)):
                results |= self._of_each(group, mine, compute, phase, inputs)
            del mine
        return [results[i] for i in range(len(self.slots))], self.warn_of_unreached(reached)

    def _of_each(
        self,
        group: Sequence[int],
        statistics: Mapping[int, FeatureStatistic],
        compute: Callable[[list[int], Mapping[int, FeatureStatistic]], Iterable[T]],
        phase: str,
        inputs: Sequence[Sequence[Any]],
    ) -> dict[int, T]:
        """The results of some slots, by position; of those that follow from one thing computed once."""
        known: dict[tuple[int, ...], T] = {}

        def results(members: list[int]) -> list[T]:
            keys = {group[j]: (id(statistics[group[j]]), *(id(column[group[j]]) for column in inputs)) for j in members}
            first = {key: i for i, key in reversed(keys.items()) if key not in known}
            if first:
                known.update(zip(first, compute([*first.values()], statistics), strict=True))
            return [known[key] for key in keys.values()]

        found = for_all_layers([self.slots[i] for i in group], results, phase, shown=self.progress)
        return dict(zip(group, found, strict=True))

    def generator(self) -> torch.Generator:
        """Of the numbers a task draws: they follow from the config's seed and the number of tasks learned."""
        return torch.Generator().manual_seed(int(self.config.seed) * 1009 + self.tasks_learned)

    def attach(self, adapters: Sequence[LoraAdapter | None]) -> None:
        """Freeze the model and put an adapter into every slot that gets one."""
        freeze(self.model)
        for slot, adapter in zip(self.slots, adapters, strict=True):
            if adapter is not None:
                slot.attach(adapter)
        self.average_gradients()

    def merge_adapters(self) -> None:
        """Add every open adapter to its weight."""
        merge_adapters(self.slots)

    def warn_of_unreached(self, reached: Sequence[bool]) -> list[str]:
        """Name the layers that a pass did not reach: all, or when a task closes those that may have learned something.

        Returns:
            Their names.
        """
        closing = self.training_task
        names = [
            slot.name
            for slot, yes in zip(self.slots, reached, strict=True)
            if not yes and (_is_trained(slot) or not closing)
        ]
        warn_of_unreached(
            "after_task" if closing else "before_task", names, len(reached), closing=closing,
            experts={slot.name for slot in self.slots if slot.target.expert is not None},
        )  # fmt: skip
        return names

    def warn_of_ranks(self, ranks: Sequence[int], *, none: str, **causes: Any) -> None:
        """Name the layers whose adapters are smaller than r, or missing: ``ranks.warn_of_ranks``."""
        names = [slot.name for slot in self.slots]
        warn_of_ranks(type(self).__name__, names, ranks, [self.config.r] * len(names), none=none, **causes)

    def capacity_of(
        self,
        protected: Sequence[int],
        added: Sequence[tuple[int, ...]],
        r: int,
        shares: Sequence[Shares] | None = None,
    ) -> Capacity:
        """The table of ``capacity``, from every slot's protected directions and those each task added.

        Args:
            shares: Of every slot what lay in free space, where it is known.
        """
        shares = [UNKNOWN] * len(self.slots) if shares is None else shares
        layers = (
            layer_capacity(slot.target, slot.weight.shape[1], count, by_task, r, of_slot.last)
            for slot, count, by_task, of_slot in zip(self.slots, protected, added, shares, strict=True)
        )
        return Capacity(tuple(layers), self.tasks_learned)


def _meant(model: nn.Module, names: Sequence[str] | str) -> list[str]:
    """The modules that ``target_modules`` names, of whatever kind."""
    paths = [path for path, _ in model.named_modules()]
    wanted = [names] if isinstance(names, str) else list(names)
    return paths if wanted == ["all-linear"] else [p for p in paths if any(f".{n}." in f".{p}." for n in wanted)]


def _is_trained(slot: LoraSlot) -> bool:
    adapter = [] if slot.adapter is None else list(slot.adapter.parameters())
    return any(parameter.requires_grad for parameter in (slot.stored, *adapter))


def _rows(slot: LoraSlot) -> Tensor:
    """The weight, as far as it is in this process, in numbers that can be read."""
    return slot.part(slot.readable()) if slot.keeps else slot.local.rows
