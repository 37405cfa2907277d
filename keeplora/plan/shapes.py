"""The shapes of a model's weights, from a transformers config on the meta device: no weights, no memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keeplora._hub import hub_fault
from keeplora._messages import suggest
from keeplora._untrusted import MOST_JSON, fault, parse_json, read_bytes
from keeplora.families import find_targets
from keeplora.lora import Target, select_targets, target_shape
from keeplora.methods.settings import ConfigError

__all__ = ["MODELS", "Matrix", "Shapes", "shapes_of", "shapes_of_model"]

_FOLDER = Path(__file__).parent / "models"
MODELS = sorted(file.stem for file in _FOLDER.glob("*.json"))
"""Configs that come with the package; each file names its source."""


@dataclass(frozen=True)
class Matrix:
    """An adapted weight. Those with the same ``reads`` read one tensor, and share its statistic."""

    name: str
    rows: int
    width: int
    reads: str

    @property
    def numel(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Shapes:
    """A model as far as its memory goes.

    Attributes:
        name: As it was asked for. parameters: All of the model's. adapted: The weights that get adapters.
        active: Parameters that a token meets, less than all in a mixture of experts.
        blocks: Of the language model, or the deepest tower. config: transformers' own, or None.
    """

    name: str
    parameters: int
    active: int
    adapted: tuple[Matrix, ...]
    blocks: int
    config: Any = None

    def inputs(self) -> list[int]:
        """The width of every distinct input of an adapted weight."""
        return list({matrix.reads: matrix.width for matrix in self.adapted}.values())


_TOGETHER = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "w3": "w1"}
"""Weights that read what another one beside them reads."""


def shapes_of_model(name: str, model: nn.Module, targets: Sequence[Target], config: Any = None) -> Shapes:
    """The shapes of a model that is there, on whatever device."""
    adapted = []
    for target in targets:
        shape = target_shape(model, target)
        assert shape is not None, target
        parent, _, leaf = target.name.rpartition(".")
        adapted.append(Matrix(target.name, *shape, f"{parent}.{_TOGETHER.get(leaf, leaf)}"))
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    text = getattr(config, "text_config", config)
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    each = getattr(text, "num_experts_per_tok", None)
    active = total - experts + (experts * each // count if count and each else experts)
    return Shapes(name, total, active, tuple(adapted), len({(t.tower, t.depth) for t in targets}), config)


def shapes_of(name: str | os.PathLike[str], targets: Sequence[str] | str = "all-linear") -> Shapes:
    """The shapes of a shipped config, a ``config.json``, a folder with one, or a model id that transformers can read.

    Raises:
        ConfigError: none of these, or a model that transformers or keeplora does not know; ``targets`` match nothing.

    Examples:
        >>> llava = shapes_of("llava-1.5-7b")
        >>> llava.parameters, len(llava.adapted)
        (7063427072, 224)
    """
    import transformers

    text = os.fspath(name)
    config = _config(text)
    classes: tuple[Any, ...] = (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
        transformers.AutoModel,
    )
    kind = next((c for c in classes if type(config) in c._model_mapping), None)
    if kind is None:
        raise ConfigError(f"plan: model must be one that transformers has a class for, got {type(config).__name__}")
    with torch.device("meta"):
        model = kind.from_config(config)
    try:
        chosen = select_targets(find_targets(model), targets)
    except ValueError as error:
        raise ConfigError(f"plan: {error}") from error
    return shapes_of_model(text, model, chosen, config)


def _config(text: str) -> Any:
    import transformers

    path = _FOLDER / f"{text.lower()}.json" if text.lower() in MODELS else Path(text)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            read = parse_json(read_bytes(path, most=MOST_JSON), finite=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"plan: {path} must {fault(error)}") from error
        if not isinstance(read, dict) or "model_type" not in read:
            raise ConfigError(f"plan: {path} must be a transformers config with a model_type, got none")
        values = {key: value for key, value in read.items() if not key.startswith("_")}
        try:
            return transformers.AutoConfig.for_model(**values)
        except ValueError as error:
            raise ConfigError(f"plan: {path} must be of a model type that transformers knows: {error}") from error
    fault_there = hub_fault(text)
    try:
        if fault_there is None:
            return transformers.AutoConfig.from_pretrained(text)
    except (OSError, ValueError) as error:
        fault_there = " ".join(str(error).split())[:300]
    raise ConfigError(
        f"plan: model must be a shipped config, a config.json, a folder with one, or a model id that can be reached, "
        f"got {text!r}: {fault_there}{suggest(text, MODELS, listing=True)}"
    )
