"""Methods by name, for configurations and the command line. Adding a method is one file and one line here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from torch import nn

from keeplora._calls import named, public
from keeplora._messages import nearest
from keeplora._names import unknown_name
from keeplora.distributed import Group, processes
from keeplora.lora import Target, TokenMask, require_module, require_whole
from keeplora.lora.shares import is_shared_out

from .dac.method import Dac, DacConfig
from .duallora.method import DualLora, DualLoraConfig
from .full import FullFineTuning, JointTraining
from .gpm import Gpm, GpmConfig
from .hdsd import Hdsd, HdsdConfig
from .inflora import InfLora, InfLoraConfig
from .keeplora.config import KeepLoraConfig
from .keeplora.method import KeepLora
from .keeplora_cls.method import KeepLoraCls, KeepLoraClsConfig
from .lines import Lines, LinesConfig
from .loda import LoDa, LoDaConfig
from .lora import LoraConfig, SequentialLora
from .method import Method
from .olora import OLora, OLoraConfig
from .peers.corda import Corda, CordaConfig
from .peers.eva import Eva, EvaConfig
from .peers.lora_ga import LoraGa, LoraGaConfig
from .peers.mica import Mica, MicaConfig
from .peers.osf import Osf, OsfConfig
from .saved import made, resumed
from .sdlora import SdLora, SdLoraConfig
from .settings import check_kind
from .state import StateError, read_state
from .zero_shot import NoConfig, ZeroShot

__all__ = ["METHODS", "Registered", "configure", "create", "load"]


@dataclass(frozen=True)
class Registered:
    """How a method is made: its class, its settings' class, and settings that differ from that class's defaults."""

    build: Callable[..., Method]
    config: type
    defaults: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


@named
def _lines(
    model: nn.Module,
    config: LinesConfig | None = None,
    *,
    targets: Sequence[Target] | None = None,
    progress: bool | None = None,
) -> Lines:
    """LiNeS on top of the method that its settings name."""
    require_module(Lines.__name__, model)
    check_kind(Lines.__name__, config, LinesConfig)
    config = LinesConfig() if config is None else config
    name = config.base
    if name not in METHODS or name == Lines.name:
        near = nearest(name, set(METHODS) - {Lines.name}, cutoff=0.3)
        raise ValueError(f"LinesConfig: base must be another method, got {name!r}. Nearest names: {', '.join(near)}.")
    entry = METHODS[name]
    if not getattr(entry.build, "trains", True) or not getattr(entry.build, "merges", True):
        raise ValueError(
            f"LinesConfig: base must be a method that puts what it learns into the model's weights, got {name!r}"
        )
    seeded = {"seed": config.seed} if any(f.name == "seed" for f in fields(entry.config)) else {}
    return Lines(create(name, model, {**seeded, **config.settings}, targets=targets, progress=progress), config)


METHODS: dict[str, Registered] = {
    "zero-shot": Registered(ZeroShot, NoConfig, summary="the pretrained model, never trained"),
    "full": Registered(FullFineTuning, NoConfig, summary="full fine-tuning, task after task"),
    "joint": Registered(JointTraining, NoConfig, summary="upper bound: all tasks so far at once"),
    "lora": Registered(SequentialLora, LoraConfig, summary="plain LoRA, task after task"),
    "gpm": Registered(Gpm, GpmConfig, summary="full weights, gradients outside earlier tasks' features (ICLR 2021)"),
    "inflora": Registered(InfLora, InfLoraConfig, summary="A along new inputs, outside old ones (arXiv:2404.00228)"),
    "o-lora": Registered(OLora, OLoraConfig, summary="A pulled away from earlier tasks' A (arXiv:2310.14152)"),
    "sd-lora": Registered(SdLora, SdLoraConfig, summary="old directions with new magnitudes (arXiv:2501.13198)"),
    "loda": Registered(LoDa, LoDaConfig, summary="shared and isolated directions of inputs (arXiv:2603.00191)"),
    "lines": Registered(_lines, LinesConfig, summary="another method, its changes scaled by depth (arXiv:2410.17146)"),
    "keeplora": Registered(
        KeepLora, KeepLoraConfig, {"depth_scale": 1.0}, "LoRA in the residual subspace (arXiv:2601.19659)"
    ),
    "keeplora++": Registered(KeepLora, KeepLoraConfig, {}, "KeepLoRA with depth-scaled updates (arXiv:2606.16256)"),
    "keeplora++cls": Registered(
        KeepLoraCls, KeepLoraClsConfig, {}, "KeepLoRA++ with a classifier on image features per task"
    ),
    "dac": Registered(Dac, DacConfig, {}, "a pool of rank-1 experts, routed by class tokens (arXiv:2601.22828)"),
    "duallora": Registered(
        DualLora, DualLoraConfig, {}, "orthogonal and residual adapters, a dynamic memory (arXiv:2411.00623)"
    ),
    "hdsd": Registered(Hdsd, HdsdConfig, {}, "updates scaled by subspace and relative change (after arXiv:2605.07512)"),
    "mica": Registered(Mica, MicaConfig, {}, "B frozen at minor directions of the weight, by PEFT (arXiv:2604.01694)"),
    "osf": Registered(Osf, OsfConfig, {}, "whole weights outside their leading directions, by PEFT (arXiv:2504.07097)"),
    "corda": Registered(Corda, CordaConfig, {}, "started where inputs so far matter least, by PEFT (arXiv:2406.05223)"),
    "lora-ga": Registered(LoraGa, LoraGaConfig, {}, "started along the task's gradient, by PEFT (arXiv:2407.05000)"),
    "eva": Registered(Eva, EvaConfig, {}, "started along the task's inputs, by PEFT (arXiv:2410.07170)"),
}
"""Every method that [`create`][] knows, by name; more may be added."""


@named
def configure(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The configuration of the method ``name``: what can be said about settings before there is a model.

    Where its class has presets, ``preset`` names one; what a method fixes, and the other settings, go before it.

    Raises:
        ValueError: no method of that name, or it does not have a setting (the nearest names are offered), or a value is
            out of range.
        TypeError: a value is of another type.

    Examples:
        >>> configure("keeplora", {"r": 2}).depth_scale
        1.0
        >>> configure("keeplora++", {"preset": "mtil"}).depth_scale["vision"]
        0.2
    """
    entry = _registered("create", name)
    known = [f.name for f in fields(entry.config)]
    if settings is not None and not isinstance(settings, Mapping):
        raise TypeError(
            f"create: settings must be names with values, got {type(settings).__name__}. Example: {{'seed': 1}}."
        )
    given = dict(settings or {})
    made: Callable[..., Any] = entry.config
    if "preset" in given and hasattr(entry.config, "preset"):
        made = partial(entry.config.preset, given.pop("preset"))
    for setting in given:
        if setting not in known:
            raise ValueError(
                f"create: settings of method {name!r} do not include {setting!r}. {unknown_name(setting, known)}"
            )
    return made(**{**entry.defaults, **given})


@public
def create(
    name: str,
    model: nn.Module,
    settings: Mapping[str, Any] | None = None,
    *,
    targets: Sequence[Target] | None = None,
    token_mask: TokenMask | None = None,
    progress: bool | None = None,
) -> Method:
    """Make the method ``name`` around ``model``.

    Args:
        settings: Of the method's configuration; its defaults where they say nothing.
        targets: The weights to choose from, instead of what [`find_targets`][] finds.
        token_mask: Which inputs count as features, instead of what ``keeplora.families.token_mask`` tells.
        progress: Whether passes over batches and layers draw bars on stderr; None: if that is a terminal.

    Raises:
        ValueError: as [`configure`][], or the settings do not suit the model (a rank that no layer can hold), or the
            method adapts no chosen weights and was given ``targets``.
        TypeError: the model is not of a kind the method can handle.

    Examples:
        >>> create("keeplora", nn.Sequential(nn.Linear(8, 8)), {"r": 2, "target_modules": "all-linear"}).config.r
        2
    """
    _registered("create", name)
    require_module("create", model)
    config = configure(name, settings)
    method = METHODS[name].build(model, config, targets=targets, progress=progress)
    method.token_mask = token_mask
    return method


@public
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    targets: Sequence[Target] | None = None,
    token_mask: TokenMask | None = None,
    progress: bool | None = None,
    group: Group | None = None,
) -> Method:
    """The method that ``method.save(path)`` wrote, whichever it is, around the pretrained ``model`` it was made with.

    Args:
        group: The processes that share its tasks, as of ``before_task``. All of them call this where FSDP2 has shared
            the model out to them.

    Raises:
        StateError: nothing there, damaged, of another version, of a method that is not registered, or made with
            another model.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> def make():
        ...     _ = torch.manual_seed(0)  # stands for loading the checkpoint
        ...     return nn.Sequential(nn.Linear(8, 8, bias=False)).requires_grad_(False)
        >>> method = create("lora", make(), {"r": 2, "target_modules": "all-linear"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     method.save(folder)
        ...     load(folder, make()).config.r
        2
    """
    require_whole("load", model, shares=True)  # what methods need is theirs to say
    with processes(group).together() if is_shared_out(model) else nullcontext():
        state = read_state(path)
        name = state.meta.get("method")
        if not isinstance(name, str) or name not in METHODS:
            raise StateError(f"load: {os.fspath(path)} must be of a registered method, got {name!r}")
        entry = METHODS[name]
        method = resumed(made(entry.build, entry.config, state, path, model, targets=targets, progress=progress), state)
    method.token_mask, method.group = token_mask, group
    return method


def _registered(function: str, name: str) -> Registered:
    if not isinstance(name, str):
        raise TypeError(f"{function}: name must be a method's, got {type(name).__name__}. Known: {', '.join(METHODS)}.")
    if name not in METHODS:
        near = nearest(name, sorted(METHODS), cutoff=0.3)
        raise ValueError(f"{function}: name must be a method, got {name!r}. Nearest names: {', '.join(near)}.")
    return METHODS[name]
