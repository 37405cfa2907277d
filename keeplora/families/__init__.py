"""Model families: each turns a model into one flat list of targets. Optional libraries are imported inside.

A family is one file of this package that has what :class:`~keeplora.families.family.Family` asks for; it is found.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from keeplora.lora import Target, TokenMask, linear_targets

from .coverage import Targets, WeightKind
from .family import Family

__all__ = ["FAMILIES", "Family", "Targets", "WeightKind", "find_targets", "token_mask"]


_PARTS = ("owns", "find_targets", "token_mask")


def _files() -> list[Family]:
    """The modules of this package that are families, by name."""
    names = sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [module for module in modules if all(hasattr(module, part) for part in _PARTS)]


FAMILIES: list[Family] = _files()
"""The families that are known, asked in this order: those of the package by name; more may be appended."""


def find_targets(model: nn.Module, towers: Sequence[str] | None = None) -> list[Target]:
    """All weights of ``model`` that can be adapted, with tower and depth where its family is known.

    A known model may stand inside another module (DistributedDataParallel, a wrapper of one's own); what stands
    beside it there is not adapted. A model of no known family gives all of its linear layers as tower ``model``.

    Args:
        towers: Of which towers; by default both of a two-tower model, the language model alone of a vision-language
            model: vision tower and projector stay frozen unless asked for.

    Raises:
        ValueError: the model has no such tower, or holds several known models; or its family has no weights that can
            be adapted in the blocks of a tower.
    """
    path, family, known = _inner(model)
    if family is None:
        targets = linear_targets(model)
    else:
        prefix = f"{path}." if path else ""
        targets = [
            replace(t, name=prefix + t.name, module=prefix + t.module) for t in family.find_targets(known, towers)
        ]
    if towers is None:
        return targets
    for tower in towers:
        if tower not in {target.tower for target in targets}:
            there = sorted({target.tower for target in find_targets(model)})
            raise ValueError(
                f"find_targets: towers must be towers of the model, got {tower!r}. It has {', '.join(there)}."
            )
    return [target for target in targets if target.tower in towers]


@contextmanager
def token_mask(model: nn.Module, own: TokenMask | None = None) -> Iterator[TokenMask | None]:
    """Which tokens of the model's inputs count as features; None where the family is unknown: all do.

    Args:
        own: The user's, instead of what the family tells.

    Warns:
        UserWarning: the family cannot tell the tokens of a layer; all of them count.
    """
    _, family, known = _inner(model) if own is None else ("", None, model)
    if family is None:
        yield own
        return
    with family.token_mask(known) as mask:
        yield mask


def _inner(model: nn.Module) -> tuple[str, Family | None, nn.Module]:
    """The outermost model of a known family inside ``model``: its path, its family and itself."""
    models: list[tuple[str, Family, nn.Module]] = []
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer, *_ in models):
            continue
        models += [(path, family, module) for family in FAMILIES if family.owns(module)][:1]
    if len(models) > 1:
        raise ValueError(
            f"find_targets: model must hold one model of a known family, got {len(models)} "
            f"({', '.join(path for path, *_ in models)}). Make a keeper around one of them, or pass targets."
        )
    return models[0] if models else ("", None, model)
