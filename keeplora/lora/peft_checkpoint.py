"""Stock PEFT checkpoints: updates of keeplora's targets as the layers PEFT would have, and back."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from keeplora._files import flush, one_writer, staged
from keeplora._messages import warn
from keeplora._untrusted import MOST_JSON, check_tensor_file, fault, parse_json, read_bytes

from .base_model import BaseModel
from .host import LoraHost
from .peft_config import check_plain_lora, check_settings
from .slot import LoraSlot
from .update import Update

__all__ = ["ExpertWeight", "layers_of", "read", "read_note", "require_peft", "split", "write"]

ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
NOTE = "keeplora.json"
FORMAT = "keeplora-adapter"
PREFIX = "base_model.model."
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertWeight:
    """The updates of all experts of a weight of three dimensions, as PEFT's ``target_parameters`` has them.

    Attributes:
        name, layer: Of the weight, and of PEFT's layer around it. rank: r, of every expert's update, of scale 1.
        a, b: ``[experts · r, in]``, expert after expert, and ``[out, r · experts]``, direction after direction.
    """

    name: str
    layer: str
    rank: int
    a: Tensor
    b: Tensor


def layers_of(model: nn.Module, slots: Sequence[LoraSlot], updates: Mapping[str, Update]) -> dict[str, Update]:
    """Updates by PEFT's layer names: row ranges of one weight become one layer of block-structured B.

    q, k and v of an ``nn.MultiheadAttention`` share PEFT's one A ``[3 r, in]``, and out_proj has the same rank there.

    Raises:
        TypeError: a weight that PEFT has no layer for.
    """
    layers: dict[str, Update] = {}
    for path, mine in _by_module(slots).items():
        weight: Tensor = mine[0].whole
        if not isinstance(mine[0].host, nn.Linear) and mine[0].target.parameter != "in_proj_weight":
            raise TypeError(
                f"export_peft: weights must be of nn.Linear or a fused in_proj_weight, got {mine[0].target.parameter} "
                f"[{path}]: stock PEFT has no layer for it."
            )
        if not isinstance(mine[0].host, nn.Linear | nn.MultiheadAttention):
            raise TypeError(
                f"export_peft: layers must be nn.Linear or nn.MultiheadAttention, got {type(mine[0].host).__name__} "
                f"at {path}: stock PEFT has no layer for it. Save with keeper.save, or merge()."
            )
        parts = [(updates[slot.name], slot.target.rows) for slot in mine if slot.name in updates]
        if parts:
            layers[path] = _stacked(parts, weight.shape[0])
    for path in _attentions(model, slots):
        out = f"{path}.out_proj"
        pair = {path: layers.pop(path, None), f"{path}.base_layer.out_proj": layers.pop(out, None)}
        rank = max((update.rank for update in pair.values() if update is not None), default=0)
        if rank:
            attention = model.get_submodule(path)
            assert isinstance(attention, nn.MultiheadAttention)
            width = attention.embed_dim
            for (name, update), rows in zip(pair.items(), (3 * width, width), strict=True):
                nothing = Update(torch.zeros(0, width), torch.zeros(rows, 0))
                layers[name] = (update or nothing).of_rank(rank)
    return layers


def require_peft(function: str) -> None:
    """Refuse to go on without PEFT, which the files belong to."""
    if find_spec("peft") is None:
        raise ImportError(
            f"{function}: peft must be installed, got none. Run pip install 'keeplora[peft]'.", name="peft"
        )


def checkpoint(
    model: nn.Module, layers: Mapping[str, Update], base: BaseModel, experts: Sequence[ExpertWeight] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a stock checkpoint; scalings go into ``alpha_pattern``.

    Raises:
        ValueError: there is no update.
    """
    from peft import LoraConfig

    layers = {name: update for name, update in layers.items() if update.rank}
    if not layers and not experts:
        raise ValueError("export_peft: there must be an update, got none: no task is open and none was learned")
    tensors = {}
    for name, update in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = update.a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = update.b.detach().cpu().contiguous()
    for weight in experts:
        tensors[f"{PREFIX}{weight.layer}.lora_A.weight"] = weight.a.contiguous()
        tensors[f"{PREFIX}{weight.layer}.lora_B.weight"] = weight.b.contiguous()
    # PEFT finds r and alpha of an attention's out_proj under the attention's own name.
    named = {name: update for name, update in layers.items() if not name.endswith(".base_layer.out_proj")}
    of_experts = {weight.name: weight.rank for weight in experts}  # one for all, which is their alpha, too
    ranks = {name: update.rank for name, update in named.items()}
    alphas = {name: update.scaling * update.rank for name, update in named.items()}
    r, alpha = (_most_common((of_experts or values).values()) for values in (ranks, alphas))
    config: Any = LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{name}": value for name, value in alphas.items() if value != alpha},
        target_modules=_names(model, sorted(named)),
        target_parameters=sorted(of_experts) or None,
        inference_mode=True,
        base_model_name_or_path=base.name,
        revision=base.revision,
        task_type=base.task_type,
        auto_mapping=base.auto_mapping,
    )
    return tensors, {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


def write(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: Mapping[str, Update],
    base: BaseModel | None = None,
    *,
    experts: Sequence[ExpertWeight] = (),
    note: Mapping[str, Any] | None = None,
) -> None:
    """Write a stock checkpoint; a reader meets the old one, the new one, or none, never a mix of two.

    Args:
        base: What its configuration tells of the pretrained model.
        note: What ``keeplora.json`` tells of it, beside a hash of the tensors. PEFT does not read that file.

    Raises:
        OSError: it cannot be written. What was there before is as it was.
    """
    tensors, config = checkpoint(model, layers, base or BaseModel(), experts)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    folder = Path(path)
    with (
        one_writer(folder),
        staged(folder / ADAPTER_TENSORS) as new_tensors,
        staged(folder / NOTE) as new_note,
        staged(folder / ADAPTER_CONFIG) as new_config,
    ):
        save_file(tensors, new_tensors)
        new_config.write_text(text, encoding="utf-8")
        new_note.write_text(_noted(note or {}, new_tensors), encoding="utf-8")
        for file in (new_tensors, new_note, new_config):
            flush(file)
        (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
        flush(folder)
        for file in (new_tensors, new_note, new_config):
            os.replace(file, folder / file.name)
            flush(folder)


def _noted(note: Mapping[str, Any], tensors: Path) -> str:
    with tensors.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    return json.dumps({"format": FORMAT, **note, "adapter_sha256": digest}, indent=1, allow_nan=False) + "\n"


def read_note(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``write`` noted of the checkpoint in a folder; None where it was made by others.

    Raises:
        ValueError: ``keeplora.json`` cannot be read.

    Warns:
        UserWarning: it was written for another adapter than the one that is there now.
    """
    file, tensors = Path(path) / NOTE, Path(path) / ADAPTER_TENSORS
    if not os.path.lexists(file):
        return None
    with _readable(file):
        note = parse_json(read_bytes(file, most=MOST_JSON))
    if not isinstance(note, dict) or note.get("format") != FORMAT:
        raise ValueError(f'import_peft: {file} must have "format": "{FORMAT}". Delete it: it tells of the base alone.')
    with _readable(tensors):
        held = read_bytes(tensors, size=check_tensor_file(tensors))
    if note.get("adapter_sha256") != hashlib.sha256(held).hexdigest():
        warn(
            f"import_peft: {file} must be of the adapter beside it, got one of another: what base the adapter belongs "
            "to is not checked."
        )
        return None
    return note


def read(path: str | os.PathLike[str]) -> dict[str, Update]:
    """The layers of a stock checkpoint in a local folder.

    Raises:
        ValueError: ``adapter_config.json`` or ``adapter_model.safetensors`` is not there or cannot be read; it is more
            than plain LoRA on unchanged base weights, or is incomplete.
    """
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key

    folder = Path(path)
    config_file, tensor_file = folder / ADAPTER_CONFIG, folder / ADAPTER_TENSORS
    with _readable(config_file):
        settings = parse_json(read_bytes(config_file, most=MOST_JSON))
    with _readable(tensor_file):
        size = check_tensor_file(tensor_file)
    check_settings(settings)
    config: Any = PeftConfig.from_pretrained(os.fspath(folder))
    check_plain_lora("import_peft", config)
    if config.modules_to_save:
        raise ValueError(
            f"import_peft: the checkpoint must hold an adapter alone, got modules_to_save="
            f"{sorted(config.modules_to_save)}. Load those into the model yourself and save the adapter without them."
        )
    with _readable(tensor_file):
        tensors = load(read_bytes(tensor_file, size=size))
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if match is None:
            raise ValueError(f"import_peft: tensors must be lora_A and lora_B of linear layers, got {key}")
        if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"import_peft: tensors must be finite floating-point numbers, got {tensor.dtype} or NaN or Inf [{key}]"
            )
        factors.setdefault(match[1], {})[match[2]] = tensor
    layers = {}
    for name, pair in factors.items():
        a, b = pair.get("lora_A"), pair.get("lora_B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            shapes = {key: list(tensor.shape) for key, tensor in pair.items()}
            raise ValueError(f"import_peft: A [r, in] and B [out, r] must belong together, got {shapes} [{name}]")
        place = name.removesuffix(".base_layer.out_proj")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, place), config.lora_alpha)
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, place), config.r)
        if rank != a.shape[0]:
            raise ValueError(f"import_peft: A must have the configuration's {rank} rows, got {a.shape[0]} [{name}]")
        layers[name] = Update(a, b, alpha / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0]))
    return layers


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        remedy = "Save the adapter again with PEFT."
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            remedy = (
                "Pass a local folder; adapters in another format than safetensors are not read: load them with PEFT "
                "and save them again."
            )
        raise ValueError(f"import_peft: {file} must {fault(error)}. {remedy}") from error


def split(slots: Sequence[LoraSlot], layers: Mapping[str, Update]) -> dict[str, Update]:
    """A checkpoint's layers as updates of targets, by name: the reverse of ``layers_of``.

    Directions of a fused weight that do nothing in a target's rows are left out there.

    Raises:
        ValueError: a layer of the checkpoint is no target, or has another shape.
    """
    left = {name.replace(".base_layer.out_proj", ".out_proj"): update for name, update in layers.items()}
    parts_of = {}
    for path, mine in _by_module(slots).items():
        update = left.pop(path, None)
        if update is None:
            continue
        weight: Tensor = mine[0].whole
        if (update.b.shape[0], update.a.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"import_peft: the checkpoint's layers must fit the model's, got {update.b.shape[0]} x "
                f"{update.a.shape[1]} for {list(weight.shape)} [{path}]"
            )
        covered = torch.zeros(weight.shape[0], dtype=torch.bool)
        for slot in mine:
            rows = slice(*slot.target.rows) if slot.target.rows else slice(None)
            covered[rows] = True
            part = update.b[rows]
            useful = part.any(0) if slot.target.rows else torch.ones(update.rank, dtype=torch.bool)
            if bool(useful.any()):
                parts_of[slot.name] = Update(update.a[useful], part[:, useful], update.scaling)
        if bool(update.b[~covered].any()):
            raise ValueError(
                f"import_peft: target_modules must cover what the checkpoint changes, got rows of {path} that are no "
                "target. Adapt all of it."
            )
    left = {name: update for name, update in left.items() if bool(update.b.any())}
    if left:
        raise ValueError(
            f"import_peft: target_modules must cover the checkpoint's layers, got {len(left)} that are no target "
            f"(first: {min(left)}). Make the keeper with targets that include them."
        )
    return parts_of


def _by_module(slots: Sequence[LoraSlot]) -> dict[str, list[LoraSlot]]:
    members: dict[str, list[LoraSlot]] = {}
    for slot in slots:
        members.setdefault(slot.target.module, []).append(slot)
    return members


def _attentions(model: nn.Module, slots: Sequence[LoraSlot]) -> list[str]:
    """Paths of the attention layers that own a target, or whose out_proj is one."""
    paths = {slot.target.module.removesuffix(".out_proj") for slot in slots}
    modules = dict(model.named_modules())
    return sorted(
        path
        for path in paths
        if isinstance(modules.get(path), LoraHost) and isinstance(modules[path], nn.MultiheadAttention)
    )


def _stacked(parts: Sequence[tuple[Update, tuple[int, int] | None]], out: int) -> Update:
    """One update of the whole weight from updates of its rows."""
    if len(parts) == 1 and parts[0][1] is None:
        return parts[0][0]
    a = torch.cat([update.a for update, _ in parts])
    b = a.new_zeros(out, a.shape[0])
    begin = 0
    for update, rows in parts:
        end = begin + update.rank
        b[slice(*rows) if rows else slice(None), begin:end] = update.b * update.scaling
        begin = end
    return Update(a, b)


def _names(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """``target_modules`` that match these layers and no other: their names, or a pattern where names are ambiguous."""
    others = [path for path, _ in model.named_modules() if path not in names]
    if any(path.endswith(f".{name}") for path in others for name in names):
        return "|".join(re.escape(name) for name in names)
    return list(names)


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
