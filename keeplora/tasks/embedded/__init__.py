"""The embedded benchmark: a small pretrained open_clip CLIP and seven tasks plus a witness, shipped in the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from keeplora._files import write_atomic
from keeplora._messages import suggest
from keeplora.tasks.classification import Task

from .shipped import read_names, read_task
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from open_clip.model import CLIP

DATA = Path(__file__).parent / "data"

__all__ = ["build_model", "load_model", "load_tasks", "load_tokenizer", "save_model", "task_names"]


def build_model(config: dict[str, Any]) -> CLIP:
    """An untrained `open_clip.model.CLIP` from its configuration (embed_dim, vision_cfg, text_cfg)."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # optional, and slow to import

    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    return CLIP(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text)


def save_model(model: CLIP, config: dict[str, Any], tokenizer: Tokenizer, directory: Path) -> None:
    """Write weights (half precision), configuration and vocabulary into a directory."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    write_atomic(directory / "model.safetensors", lambda temporary: save_file(weights, temporary))
    text = json.dumps(config, indent=1) + "\n"
    write_atomic(directory / "config.json", lambda temporary: temporary.write_text(text, encoding="utf8"))
    tokenizer.save(directory / "vocab.json")


def load_model(directory: Path | None = None) -> CLIP:
    """The pretrained model in float32 and evaluation mode: 32 x 32 images, six vision and four text blocks, width 128.

    Args:
        directory: where model.safetensors, config.json and vocab.json are; None for the shipped ones.

    Examples:
        >>> import torch
        >>> load_model().encode_image(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """
    folder = DATA if directory is None else directory
    model = build_model(json.loads((folder / "config.json").read_text(encoding="utf8")))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def load_tokenizer(directory: Path | None = None) -> Tokenizer:
    """The tokenizer of the shipped model, or of the one in `directory`."""
    return Tokenizer.load((DATA if directory is None else directory) / "vocab.json")


def task_names() -> tuple[str, ...]:
    """Names of the tasks in order of the sequence; the witness, never trained, comes last."""
    return read_names(DATA)


def load_tasks(names: Sequence[str] | None = None) -> tuple[list[Task], Task]:
    """The tasks in the given order (default: all seven, in the benchmark's order) and the witness task.

    Images are drawn from the shipped glyphs with fixed seeds: the same on every call.

    Raises:
        ValueError: a name is unknown, repeated or the witness's; the message tells the nearest names.

    Examples:
        >>> tasks, witness = load_tasks(["digits"])
        >>> tasks[0].classes[3], tasks[0].train.images.shape[1:]
        ('three', torch.Size([3, 32, 32]))
    """
    *known, witness = task_names()
    if isinstance(names, str):
        raise TypeError(f"load_tasks: names must be a sequence of task names, got the string {names!r}.")
    asked = list(known) if names is None else list(names)
    for name in asked:
        if name not in known:
            raise ValueError(f"load_tasks: names must be among {', '.join(known)}, got {name!r}{suggest(name, known)}")
    if len(set(asked)) != len(asked):
        raise ValueError(f"load_tasks: names must be distinct, got {asked}.")
    tokenizer = load_tokenizer()
    return [read_task(DATA, name, tokenizer) for name in asked], read_task(DATA, witness, tokenizer)
