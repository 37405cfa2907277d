"""Methods that adapt chosen weights: their slots, the adapters in them, and both as state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from keeplora._messages import warn
from keeplora.distributed import processes
from keeplora.families import find_targets, token_mask
from keeplora.families.coverage import Targets, coverage, warn_of_left_out
from keeplora.lora import (
    LoraAdapter,
    LoraSlot,
    Target,
    TokenMask,
    merge_adapters,
    merge_ahead,
    peft_checkpoint,
    select_targets,
    unwrap,
    wrap,
)
from keeplora.lora.peft_checkpoint import Update
from keeplora.statistics import FeatureStatistic, feature_statistics

from .capacity import Capacity, layer_capacity
from .method import LossFn, freeze
from .progress import for_all_layers, progress
from .ranks import warn_of_ranks, warn_of_unreached
from .shares import UNKNOWN, Shares
from .size import update_size, warn_of_size
from .slot_states import SlotStates

__all__ = ["LoraMethod"]

T = TypeVar("T")


class LoraMethod(SlotStates):
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

    train_a: bool = False
    """Whether A is trained along with B, of adapters that [`adapter_of`][] makes."""

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
        self.token_mask = token_mask
        self.targets = self.choose_targets(targets)
        check_ranks(model, self.targets, getattr(self.config, "r", 0), type(self).__name__)
        self.slots: list[LoraSlot] = wrap(model, self.targets)
        self._hooks = merge_ahead(model)

    # ------------------------------------------------------------------ what a method is

    def choose_targets(self, targets: Sequence[Target] | None) -> Targets:
        """What the config adapts of ``targets``, or of what the model's family has; refuses what cannot be.

        Warns:
            UserWarning: ``"all-linear"`` does not reach all weights of the blocks, or other names pass over blocks; a
                stack of blocks belongs to no known tower.
        """
        among, names = self.targets_among(targets), self.config.target_modules
        chosen = coverage(self.model, select_targets(among, names), among)
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

    def after_task(self, loader: Iterable[Any], loss_fn: LossFn | None = None) -> Any:
        """As [`Method.after_task`][].

        Warns:
            UserWarning: also where what was merged is next to nothing, or about as large as the weights
                (``size``); not of methods that train whole weights, which keep no update.
        """
        before = [len(slot.learned or ()) for slot in self.slots]
        report = super().after_task(loader, loss_fn)
        merged = [(slot.learned or [])[count:] for slot, count in zip(self.slots, before, strict=True)]
        warn_of_size("after_task", update_size(merged, [slot.weight for slot in self.slots]))
        return report

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """The open adapters' parameters that take gradients, by target."""
        adapters = [(slot.name, slot.adapter) for slot in self.slots if slot.adapter is not None]
        return [(name, p) for name, adapter in adapters for p in adapter.parameters() if p.requires_grad]

    def shared_tensors(self) -> Mapping[str, Tensor]:
        held: dict[str, Tensor] = {slot.name: slot.weight.detach() for slot in self.slots}
        for slot in self.slots:
            if slot.adapter is not None:
                held |= {f"{slot.name}.{name}": p.detach() for name, p in slot.adapter.named_parameters()}
        return held

    def release(self) -> None:
        unwrap(self.model)
        for hook in self._hooks:
            hook.remove()

    # ------------------------------------------------------------------ parts a method is made of

    def features(self, loader: Iterable[Any], forward: LossFn) -> list[FeatureStatistic]:
        """The second moment of every slot's inputs, over one pass; padding does not count where it is known.

        Layers that no token came to are named in a warning; their statistic is zero.
        """
        with (
            token_mask(self.model, self.token_mask) as mask,
            progress(loader, "features", "batch", shown=self.progress) as batches,
        ):
            statistics = feature_statistics(
                self.model, self.slots, batches, forward, token_mask=mask, peers=processes()
            )
        self.warn_of_unreached([statistic.tokens > 0 for statistic in statistics])
        return statistics

    def each_layer(self, compute: Callable[[list[int]], Iterable[T]], phase: str, *inputs: Sequence[Any]) -> list[T]:
        """``compute`` for every slot: given the positions of several, their results.

        Of slots whose entries of all ``inputs`` are the same objects the first stands for all: slots that read one
        tensor, as q, k and v do, share its statistic.
        """
        known: dict[tuple[int, ...], T] = {}

        def results(group: list[int]) -> list[T]:
            keys = {i: tuple(id(column[i]) for column in inputs) or (i,) for i in group}
            first = {keys[i]: i for i in reversed(group) if keys[i] not in known}
            if first:
                known.update(zip(first, compute([*first.values()]), strict=True))
            return [known[keys[i]] for i in group]

        return for_all_layers(self.slots, results, phase, shown=self.progress)

    def generator(self) -> torch.Generator:
        """Of the numbers a task draws: they follow from the config's seed and the number of tasks learned."""
        return torch.Generator().manual_seed(int(self.config.seed) * 1009 + self.tasks_learned)

    def attach(self, adapters: Sequence[LoraAdapter | None]) -> None:
        """Freeze the model and put an adapter into every slot that gets one."""
        freeze(self.model)
        for slot, adapter in zip(self.slots, adapters, strict=True):
            if adapter is not None:
                slot.attach(adapter)

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
        warn_of_unreached("after_task" if closing else "before_task", names, len(reached), closing=closing)
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

    # ------------------------------------------------------------------ to PEFT

    def export_peft(self, path: str | os.PathLike[str], *, open_task_only: bool = False) -> None:
        r"""Write what was learned as an adapter that stock ``PeftModel.from_pretrained(pretrained_model, path)`` reads.

        $$
        \Delta W = \sum_{\text{tasks}} c\, B A \quad\text{of rank } \Sigma r
        \text{ (at most } \min(\text{out}, \text{in})\text{)}
        $$

        of all tasks and the open one, relative to the weights the method was made with; exact, nothing is truncated. An
        open task alone keeps its A, B and ``alpha_pattern``, so PEFT can go on training its B. q, k and v of an
        ``nn.MultiheadAttention`` become PEFT's one layer of rank 3r with a block-structured B.

        Args:
            path: A folder; an adapter in it is replaced, other files stay.
            open_task_only: Leave out what was merged: for a model that holds it already.

        Raises:
            ValueError: nothing was learned and no task is open.
            TypeError: an adapted layer has no counterpart in PEFT (open_clip's own attention block, separate
                ``q_proj_weight``).
            RuntimeError: what was learned is no sum of adapters, or not all of them are known.

        Warns:
            UserWarning: there are updates of ``nn.MultiheadAttention``, where stock PEFT up to 0.21 is wrong.
        """
        self._require("export_peft", task=None)
        if not self.merges:
            raise RuntimeError(
                f"export_peft: what {self.name!r} learned must be updates of weights, and is more than that. "
                "Save it with method.save(path)."
            )
        updates = {}
        for slot in self.slots:
            parts = [] if open_task_only else _learned(slot)
            if slot.adapter is not None:
                open_one = slot.adapter.plain()
                parts.append(Update(open_one.A.detach().cpu(), open_one.update().detach().cpu(), open_one.scaling))
            updates[slot.name] = Update.total(parts, *slot.weight.shape)
        layers = peft_checkpoint.layers_of(self.model, self.slots, updates)
        if any(name.endswith(".base_layer.out_proj") and bool(update.b.any()) for name, update in layers.items()):
            warn(
                "export_peft: stock PEFT up to 0.21 applies the update of nn.MultiheadAttention's out_proj twice "
                "(huggingface/peft#3774), so its outputs will differ from this model's. Load with import_peft, or with "
                "a PEFT that has the fix."
            )
        peft_checkpoint.write(path, self.model, layers)


def check_ranks(model: nn.Module, targets: Sequence[Target], r: int, method: str) -> None:
    """Refuse a rank that is larger than a layer's width."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target in targets:
        weight = parameters.get(f"{target.module}.{target.parameter}".lstrip("."))
        width = r if weight is None else weight.shape[1]  # wrap says what is wrong with a missing one
        if r > width:
            raise ValueError(
                f"{method}: r must be at most the layer's width, got {r} for {width} [{target.name}]. Lower r."
            )


def _is_trained(slot: LoraSlot) -> bool:
    adapter = [] if slot.adapter is None else list(slot.adapter.parameters())
    return any(parameter.requires_grad for parameter in (slot.whole, *adapter))


def _learned(slot: LoraSlot) -> list[Update]:
    if slot.learned is None:
        raise RuntimeError(
            "export_peft: the updates of every task must be known adapters, got weights that LiNeS has scaled or that "
            f"were trained as a whole [{slot.name}]. Export the open task with open_task_only=True, or save the merged "
            "model."
        )
    return [Update(a, b) for a, b in slot.learned]
