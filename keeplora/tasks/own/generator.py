"""A vision-language model of transformers that answers, with its processor, from an id or a folder."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from keeplora._hub import hub_fault
from keeplora._messages import listed
from keeplora.methods.settings import ConfigError
from keeplora.tasks._quiet import quiet_loading
from keeplora.tasks.own.config import OwnTasks

__all__ = ["Generator", "load_generator"]


@dataclass(frozen=True)
class Generator:
    """What is known of the model before its weights are read."""

    name: str
    processor: Any
    config: Any
    ends: tuple[int, ...]
    """Tokens at which generation stops."""
    dtype: torch.dtype
    max_new_tokens: int

    @property
    def context(self) -> int | None:
        """The most tokens a text may have; None where the model does not say."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) else None

    @property
    def media_tokens(self) -> list[int]:
        """The tokens that stand for images and videos."""
        names = [f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index")]
        return [token for name in names if isinstance(token := getattr(self.config, name, None), int)]

    def settings(self) -> str:
        """What else of the processor decides numbers, as text."""
        parts = [getattr(self.processor, f"{kind}_processor", None) for kind in ("image", "video")]
        return "\n".join(part.to_json_string() for part in parts if part is not None)

    @cached_property
    def tokens(self) -> str:
        """Hash of what makes tokens of texts."""
        tokenizer = self.processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        text = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
        return hashlib.sha256(text.encode()).hexdigest()

    def model(self) -> nn.Module:
        """The pretrained model, which generates greedily and stops where an answer ends.

        Raises:
            ConfigError: transformers cannot load it, or its file lacks weights.
        """
        transformers: Any = importlib.import_module("transformers")  # optional

        with quiet_loading(), torch.random.fork_rng():  # what transformers draws for weights before it reads them
            torch.manual_seed(0)
            try:
                loaded, report = transformers.AutoModelForImageTextToText.from_pretrained(
                    self.name, dtype=self.dtype, output_loading_info=True, trust_remote_code=False
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(_refused(self.name, "a model", error)) from error
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"load_workload: the weights of {self.name} must be there, got none for {len(missing)} of "
                f"{type(loaded).__name__}: {listed(missing)}"
            )
        loaded.generation_config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.ends),
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        model: nn.Module = loaded.eval()
        return model


def load_generator(own: OwnTasks) -> Generator:
    """The processor and the settings of ``own.model.transformers``: an id, or a folder as the settings file names it.

    Raises:
        ConfigError: there is none that takes images and texts.
    """
    transformers: Any = importlib.import_module("transformers")  # optional

    name = own.model_folder()
    if (fault := hub_fault(name)) is not None:
        raise ConfigError(f"load_workload: transformers must name a model, got {name!r}: {fault}")
    try:
        with quiet_loading():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(_refused(name, "a model and a processor", error)) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"load_workload: the processor of {name} must take images and texts, got {type(processor).__name__}"
        )
    if any(getattr(one, "is_encoder_decoder", False) for one in (config, config.get_text_config())):
        raise ConfigError(
            f"load_workload: the model at {name} must answer by writing on, as LLaVA and Qwen-VL do, got "
            f"{config.model_type}, an encoder with a decoder"
        )
    tokenizer = processor.tokenizer
    try:
        generation = transformers.GenerationConfig.from_pretrained(name)
    except OSError:  # there is no such file; what is in the model's configuration counts
        generation = transformers.GenerationConfig.from_model_config(config)
    ends = {*_ids(generation.eos_token_id), *_ids(tokenizer.eos_token_id)}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"load_workload: the tokenizer of {name} must have a pad_token or an eos_token, got none")
    return Generator(name, processor, config, tuple(sorted(ends)), getattr(torch, own.model.dtype), own.new_tokens)


def _ids(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else [int(token) for token in value]


def _refused(name: str, wanted: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"load_workload: transformers must find {wanted} that takes images and texts at {name!r}, got: {reason}"
