"""Methods by name, for configurations and the command line. Adding a method is one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

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
from .sdlora import SdLora, SdLoraConfig
from .zero_shot import NoConfig, ZeroShot

__all__ = ["METHODS", "Registered", "configure", "create"]


@dataclass(frozen=True)
class Registered:
    """How a method is made: its class, its settings' class, and settings that differ from that class's defaults."""

    build: Callable[..., Method]
    config: type
    defaults: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


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
    "lines": Registered(Lines, LinesConfig, summary="another method, its changes scaled by depth (arXiv:2410.17146)"),
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
}
"""Every method that :func:`create` knows, by name; more may be added."""


def configure(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The configuration of the method ``name``: what can be said about settings before there is a model.

    Raises:
        ValueError: no method of that name, or it does not have a setting (the nearest names are offered), or a value is
            out of range.
        TypeError: a value is of another type.

    Example:
        >>> configure("keeplora", {"r": 2}).depth_scale
        1.0
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.3) or sorted(METHODS)
        raise ValueError(f"create: name must be a method, got {name!r}. Nearest names: {', '.join(near)}.")
    entry = METHODS[name]
    known = [f.name for f in fields(entry.config)]
    for setting in settings or {}:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=3, cutoff=0.4) or known
            raise ValueError(
                f"create: settings of method {name!r} do not include {setting!r}. "
                f"Nearest names: {', '.join(near) or 'it has no settings'}."
            )
    return entry.config(**{**entry.defaults, **(settings or {})})


def create(name: str, model: nn.Module, settings: Mapping[str, Any] | None = None) -> Method:
    """Make the method ``name`` around ``model``.

    Raises:
        ValueError: as :func:`configure`, or the settings do not suit the model (a rank that no layer can hold).
        TypeError: the model is not of a kind the method can handle.

    Example:
        >>> create("keeplora", nn.Sequential(nn.Linear(8, 8)), {"r": 2, "target_modules": "all-linear"}).config.r
        2
    """
    config = configure(name, settings)
    return METHODS[name].build(model, config)
