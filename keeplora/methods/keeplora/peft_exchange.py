"""KeepLora's updates as stock PEFT checkpoints, and stock checkpoints as KeepLora's open task."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod

from torch import nn

from keeplora.lora import LoraAdapter, LoraSlot, peft_checkpoint
from keeplora.lora.peft_checkpoint import Update
from keeplora.math.precision import full_precision
from keeplora.ops.project_rows import project_rows

from .adapters import Protected, attach
from .config import KeepLoraConfig
from .trained_a import LEAK, leak_of_rows

__all__ = ["PeftExchange"]


class PeftExchange(ABC):
    """The part of :class:`keeplora.KeepLora` that reads and writes PEFT's format."""

    model: nn.Module
    slots: list[LoraSlot]
    config: KeepLoraConfig
    training_task: bool
    _protected: list[Protected] | None
    _scalings: list[float]

    def export_peft(self, path: str | os.PathLike[str], *, open_task_only: bool = False) -> None:
        r"""Write what was learned as an adapter that stock ``PeftModel.from_pretrained(pretrained_model, path)`` reads.

        .. math:: \Delta W = \sum_{\text{tasks}} c\, B A \quad\text{of rank } \Sigma r
                  \text{ (at most } \min(\text{out}, \text{in})\text{)}

        of all tasks and the open one, relative to the weights the keeper was made with; exact, nothing is truncated. An
        open task alone keeps its A, B and ``alpha_pattern``, so PEFT can go on training its B. q, k and v of an
        ``nn.MultiheadAttention`` become PEFT's one layer of rank 3r with a block-structured B.

        Args:
            path: A folder; an adapter in it is replaced, other files stay.
            open_task_only: Leave out what was merged: for a model that holds it already.

        Raises:
            ValueError: nothing was learned and no task is open.
            TypeError: an adapted layer has no counterpart in PEFT (open_clip's own attention block, separate
                ``q_proj_weight``).
            RuntimeError: the keeper was loaded from a state that did not keep the updates.

        Warns:
            UserWarning: there are updates of ``nn.MultiheadAttention``, where stock PEFT up to 0.21 is wrong.
        """
        self._require_open_model()
        updates = {}
        for slot in self.slots:
            parts = [] if open_task_only else _learned(slot)
            if slot.adapter is not None:
                adapter = slot.adapter
                parts.append(Update(adapter.A.detach().cpu(), adapter.update().detach().cpu(), adapter.scaling))
            updates[slot.name] = Update.total(parts, *slot.weight.shape)
        layers = peft_checkpoint.layers_of(self.model, self.slots, updates)
        if any(name.endswith(".base_layer.out_proj") and bool(update.b.any()) for name, update in layers.items()):
            warnings.warn(
                "export_peft: stock PEFT up to 0.21 applies the update of nn.MultiheadAttention's out_proj twice "
                "(huggingface/peft#3774), so its outputs will differ from this model's. Load with import_peft, or with "
                "a PEFT that has the fix.",
                UserWarning,
                stacklevel=2,
            )
        peft_checkpoint.write(path, self.model, layers)

    def import_peft(self, path: str | os.PathLike[str], *, project: bool = False) -> None:
        """Open a task with the adapter of a stock PEFT checkpoint, instead of :meth:`before_task`.

        Train it further or not, then close the task with ``after_task(loader, loss_fn)``. Weights it does not name get
        no adapter. On an error nothing has changed.

        Args:
            path: A local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            project: Take what is protected out of the adapter, ``A ← A (I − Q Qᵀ)``. Otherwise an adapter that
                reaches into it is refused, as one trained without KeepLoRA does.

        Raises:
            FileNotFoundError: one of the two files is not there.
            ValueError: it is more than plain LoRA on unchanged base weights (DoRA, biases, PiSSA and its like, saved
                modules), has layers that are no targets, or reaches into what is protected.
            RuntimeError: a task is open.
        """
        self._require_open_model()
        if self.training_task:
            raise RuntimeError("import_peft: the open task must be closed first. Call after_task(loader).")
        updates = peft_checkpoint.split(self.slots, peft_checkpoint.read(path))
        if not updates:
            raise ValueError(f"import_peft: {os.fspath(path)} must hold an update of the targets, got B = 0 everywhere")
        with full_precision(self.slots[0].weight.device):
            protected = self._protected_or_weights()
            adapters = [
                self._imported(slot, updates[slot.name], p, scaling, project=project) if slot.name in updates else None
                for slot, p, scaling in zip(self.slots, protected, self._scalings, strict=True)
            ]
        attach(self.model, self.slots, adapters)
        self._protected, self.training_task = protected, True

    def _imported(
        self, slot: LoraSlot, update: Update, protected: Protected, scaling: float, *, project: bool
    ) -> LoraAdapter:
        q = protected.basis
        a, b = update.a.to(q), update.b.to(q)
        if scaling == 0:
            raise ValueError(f"import_peft: depth_scale must not be 0 where the adapter has an update [{slot.name}]")
        leak = float(leak_of_rows(a.double(), q.double()))
        if leak > LEAK and not project:
            raise ValueError(
                f"import_peft: the adapter must keep out of what is protected, got {leak:.1e} of a row of A inside it "
                f"[{slot.name}]. Pass project=True to drop that part of it; or, before the first task, merge it with "
                "PEFT (merge_and_unload) and make the keeper of the result, so that it is protected too."
            )
        if leak > LEAK:
            (a, *_), _ = project_rows([a], [q])
        b = b if update.scaling == scaling else b * (update.scaling / scaling)
        return LoraAdapter(a, b, scaling, train_a=self.config.train_a, dropout=self.config.dropout)

    @abstractmethod
    def _require_open_model(self) -> None:
        """Raise once the model was given back."""

    @abstractmethod
    def _protected_or_weights(self) -> list[Protected]:
        """What is protected; before the first task what the pretrained weights know."""


def _learned(slot: LoraSlot) -> list[Update]:
    learned = slot.host.learned.get(slot.slot, [])
    if learned is None:
        raise RuntimeError(
            "export_peft: the updates of every task must be known, got a state from before they were kept, or "
            "updates that LiNeS has scaled. Export the open task with open_task_only=True, or save the merged model."
        )
    return [Update(a, b) for a, b in learned]
