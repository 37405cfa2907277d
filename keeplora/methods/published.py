"""What leaves the house: adapters of stock PEFT with a model card, on a disk or on the Hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from keeplora._calls import public
from keeplora._files import folder_named
from keeplora._messages import warn
from keeplora.distributed import processes
from keeplora.lora import LoraSlot, Target, TokenMask, peft_checkpoint
from keeplora.lora.base_model import BaseModel
from keeplora.lora.peft_experts import expert_weights
from keeplora.lora.quantised import QuantisedSlot
from keeplora.lora.update import Update

from .base_weights import Hashes, SlotWeights, hash_weights, inner_of_updates, inner_product
from .card import Story, model_card, write_card
from .settings import plain
from .slot_states import SlotStates

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelCardData

__all__ = ["Published", "base_note"]

STATE_FILES = ("state.json", "tensors-*.safetensors")


class Published(SlotStates):
    """A method whose updates can be handed to others."""

    @public
    def export_peft(
        self,
        path: str | os.PathLike[str],
        *,
        open_task_only: bool = False,
        base_model: str | None = None,
        revision: str | None = None,
        task_type: str | None = None,
        training: Mapping[str, Any] | None = None,
        card: ModelCardData | None = None,
    ) -> None:
        r"""Write what was learned as an adapter that stock ``PeftModel.from_pretrained(pretrained_model, path)`` reads.

        $$
        \Delta W = \sum_{\text{tasks}} c\, B A \quad\text{of rank } \Sigma r
        \text{ (at most } \min(\text{out}, \text{in})\text{)}
        $$

        of all tasks and the open one, relative to the weights the method was made with; exact, nothing is truncated. An
        open task alone keeps its A, B and ``alpha_pattern``, so PEFT can go on training its B. q, k and v of an
        ``nn.MultiheadAttention`` become PEFT's one layer of rank 3r with a block-structured B; experts its
        ``target_parameters``, with the largest rank any of a layer's has.

        For transformers' models ``AutoPeftModelForCausalLM.from_pretrained(path)``, or ``AutoPeftModel`` for others,
        loads base model and adapter. Beside the adapter lie a model card (``README.md``) and ``keeplora.json``, which
        tells `KeepLora.import_peft` what weights it belongs to. PEFT reads neither.

        Args:
            path: A folder; an adapter and a card of keeplora's in it are replaced, other files stay.
            open_task_only: Leave out what was merged: for a model that holds it already.
            base_model: Id on the Hub or folder of the base model, instead of the ``name_or_path`` of its config.
            revision: Of the base model on the Hub, instead of the commit that its config knows.
            task_type: One of PEFT's, such as ``"CAUSAL_LM"``, instead of what the model's class tells.
            training: For the card: what else is to be known of the training, such as data, learning rate and steps.
            card: Metadata of your own for the card: license, language, datasets, eval_results … It is not changed.

        Where FSDP2 has shared the model out all of its processes call this, and the first one writes.

        Raises:
            ValueError: nothing was learned and no task is open; ``task_type`` is none of PEFT's; ``open_task_only``
                without weights that hold the other tasks.
            TypeError: an adapted layer has no counterpart in PEFT (open_clip's own attention block, separate
                ``q_proj_weight``).
            RuntimeError: what was learned is no sum of adapters, or not all of them are known.
            ImportError: PEFT is not installed.

        Warns:
            UserWarning: there are updates of ``nn.MultiheadAttention``, where stock PEFT up to 0.21 is wrong; a model
                of transformers has no name; a ``README.md`` that is not keeplora's was left as it is.
        """
        folder = folder_named("export_peft", path)
        peft_checkpoint.require_peft("export_peft")
        self._require("export_peft", task=None)
        if not self.merges:
            raise RuntimeError(
                f"export_peft: what {self.name!r} learned must be updates of weights, and is more than that. "
                "Save it with method.save(path)."
            )
        if open_task_only and any(slot.keeps and slot.exact.merged_into for slot in self.slots):
            raise ValueError(
                f"export_peft: open_task_only must be False where updates are kept beside weights, got True after "
                f"{self.tasks_learned} tasks: no weights hold what those learned. Export all of it."
            )
        updates, merged = {}, []
        for slot in self.slots:
            learned = [] if open_task_only else _learned(slot)
            merged.append(Update.total(learned, *slot.weight.shape))
            updates[slot.name] = Update.total([*learned, *_open(slot)], *slot.weight.shape)
        experts = [slot for slot in self.slots if slot.target.expert is not None]
        others = [slot for slot in self.slots if slot.target.expert is None]
        layers = peft_checkpoint.layers_of(self.model, others, updates)
        if any(name.endswith(".base_layer.out_proj") and bool(update.b.any()) for name, update in layers.items()):
            warn(
                "export_peft: stock PEFT up to 0.21 applies the update of nn.MultiheadAttention's out_proj twice "
                "(huggingface/peft#3774), so its outputs will differ from this model's. Load with import_peft, or with "
                "a PEFT that has the fix."
            )
        base = BaseModel.of(self.model, name=base_model, revision=revision, task_type=task_type)
        known = hash_weights(SlotWeights(self.slots)) if open_task_only else self.known_base()
        changed = [slot for slot in self.slots if updates[slot.name].rank]
        held = self.tasks_learned if open_task_only else 0
        peers = processes(self.group)
        here = [replace(updates[slot.name], b=slot.local.of(updates[slot.name].b)) for slot in self.slots]
        inner = inner_product((slot.exact_weight for slot in self.slots), here)
        inner = (peers.sum_of(inner) if self.shared_out else inner) - sum(
            inner_of_updates(part, updates[slot.name]) for part, slot in zip(merged, self.slots, strict=True)
        )
        note = base_note(
            base, None if known is None else {name: known[name] for name in SlotWeights(changed)}, held, inner
        )
        story = Story(
            self.name, plain(self.config), self.tasks_learned + self.training_task - held, base,
            certificates=() if held else tuple(self.certificates), capacity=self.capacity(), in_base=held,
            quantised=sum(isinstance(slot, QuantisedSlot) for slot in self.slots), training=training or {},
        )  # fmt: skip
        with peers.together() if self.shared_out else nullcontext():
            if self.shared_out and peers.rank:
                return  # one writes
            peft_checkpoint.write(folder, self.model, layers, base, experts=expert_weights(experts, updates), note=note)
            write_card(folder, model_card(story, card))

    def known_base(self) -> Hashes | None:
        """Hashes of the weights as they were before the first task, which as long as none is closed are those of now.

        Of methods that train whole weights they mean nothing, and nothing reads them: those have no export.
        """
        return self.base_hashes if self.tasks_learned else hash_weights(SlotWeights(self.slots))

    # ------------------------------------------------------------------ in the ecosystem's sense

    @public
    def save_pretrained(self, path: str | os.PathLike[str], *, state: bool = True, **export: Any) -> None:
        """Write the adapter with its card, and what keeplora needs to go on, into one folder.

        [`export_peft`][] and ``save`` in this order: ``PeftModel.from_pretrained`` reads the folder, and so does
        [`from_pretrained`][].

        Args:
            path: A folder.
            state: Whether the state is saved too.
            export: Of [`export_peft`][].

        Raises:
            ValueError, TypeError, RuntimeError: as [`export_peft`][]; nothing was written then.
        """
        self.export_peft(path, **export)
        if state:
            self.save(path)

    @classmethod
    @public
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        targets: Sequence[Target] | None = None,
        token_mask: TokenMask | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Go on from what [`save_pretrained`][] wrote, or [`push_to_hub`][] with ``state=True``.

        Args:
            path: A local folder, or the id of a repository on the Hub.
            model: The pretrained model the method was made with.
            revision: Branch, tag or commit on the Hub.
            token: Of the Hub.
            targets: As of [`load`][].
            token_mask: As of [`load`][].
            progress: As of [`load`][].

        Raises:
            StateError: no state is there, or it does not fit the model.
            TypeError: no model was given: unlike classes of transformers this one cannot load it.
            huggingface_hub.errors.HfHubHTTPError: the Hub's own errors.
        """
        if not isinstance(model, nn.Module):
            got = "none" if model is None else type(model).__name__
            raise TypeError(
                "from_pretrained: model must be the pretrained model that the method was made with, got "
                f"{got}. Load it first: {cls.__name__}.from_pretrained(path, model)."
            )
        folder: str | os.PathLike[str] = folder_named("from_pretrained", path)
        if not os.path.isdir(folder):
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                os.fspath(path), revision=revision, token=token, allow_patterns=list(STATE_FILES)
            )
        return cls.load(folder, model, targets=targets, token_mask=token_mask, progress=progress)

    @public
    def push_to_hub(
        self,
        repo_id: str,
        *,
        state: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        commit_message: str = "Upload adapter",
        create_pr: bool = False,
        **export: Any,
    ) -> CommitInfo:
        """Upload what [`save_pretrained`][] writes to a repository of the Hub, which is made where there is none.

        Args:
            repo_id: ``"name"`` or ``"organisation/name"``.
            state: Whether the state goes, too. It holds the adapted weights of the base model themselves, and
                directions of the features of your data: think of the base model's licence and of your data.
            private: Whether a repository that is made is private.
            token: Of the Hub.
            branch: Where to; it is made where there is none.
            commit_message: Of the commit.
            create_pr: Whether to open a pull request instead.
            export: Of [`export_peft`][]. ``base_model`` must be an id on the Hub for others to load the adapter.

        Returns:
            What ``huggingface_hub.HfApi.upload_folder`` returns.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub's own errors, as they are.
            ValueError, TypeError, RuntimeError: as [`export_peft`][]; nothing was uploaded then.

        Warns:
            UserWarning: the base model has no id on the Hub.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, state=state, **export)
            written = json.loads((Path(folder) / peft_checkpoint.ADAPTER_CONFIG).read_text(encoding="utf-8"))
            base = BaseModel(written["base_model_name_or_path"])
            if not base.on_hub:
                warn(
                    f"push_to_hub: base_model should be an id on the Hub, got {base.name!r}: nobody else can load the "
                    "adapter by itself. Pass base_model=."
                )
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch is not None:
                api.create_branch(repo, branch=branch, exist_ok=True)
            return api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=commit_message, revision=branch, create_pr=create_pr,
                ignore_patterns=[".*"],
            )  # fmt: skip


def base_note(base: BaseModel, known: Hashes | None, held: int, inner: float) -> dict[str, Any]:
    """What ``keeplora.json`` tells of the base model.

    Args:
        known: Hashes of the weights the adapter belongs on.
        held: Tasks that those weights hold already.
        inner: ``inner_product`` of these weights with the adapter's updates.
    """
    return {
        "base_model": base.name,
        "revision": base.revision,
        "tasks_in_base": held,
        "inner_product": inner,
        "weights": known or {},
    }


def _open(slot: LoraSlot) -> list[Update]:
    if slot.adapter is None:
        return []
    adapter = slot.adapter.plain()
    return [Update(adapter.A.detach().cpu(), adapter.update().detach().cpu(), adapter.scaling)]


def _learned(slot: LoraSlot) -> list[Update]:
    if slot.learned is None:
        raise RuntimeError(
            "export_peft: the updates of every task must be known adapters, got weights that LiNeS has scaled or that "
            f"were trained as a whole [{slot.name}]. Export the open task with open_task_only=True, or save the merged "
            "model."
        )
    return [*slot.learned]
