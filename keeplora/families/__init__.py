"""Model families: each turns a model into one flat list of targets. Optional libraries are imported inside.

A family is one file of this package that has what ``Family`` asks for; it is found.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from keeplora._calls import named
from keeplora.lora import LoraSlot, Target, TokenMask, linear_targets, require_module

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


@named
def find_targets(model: nn.Module, towers: Sequence[str] | None = None) -> list[Target]:
    """All weights of ``model`` that can be adapted, with tower and depth where its family is known.

    Known models may stand inside another module (DistributedDataParallel, a wrapper of one's own); what stands beside
    them there is not adapted. Of several, each is a tower or has towers that no other has: an image encoder beside a
    text encoder, whose tower is then called ``text``. A model of no known family gives all of its linear layers as
    tower ``model``.

    Args:
        towers: Of which towers; by default both of a two-tower model, the language model alone of a vision-language
            model: vision tower and projector stay frozen unless asked for.

    Raises:
        TypeError: no model.
        ValueError: the model has no such tower, or holds several known models with the same tower; or a family has no
            weights that can be adapted in the blocks of a tower.
    """
    require_module("find_targets", model)
    towers = (towers,) if isinstance(towers, str) else towers
    known = _known_models(model)
    if not known:
        targets = linear_targets(model)
    elif len(known) == 1:
        [(path, family, inner)] = known
        targets = _inside(path, family.find_targets(inner, towers))
    else:
        targets = _of_several(known)
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

    Where the model holds several of known families, each tells about its own layers.

    Args:
        own: The user's, instead of what the family tells.

    Warns:
        UserWarning: the family cannot tell the tokens of a layer; all of them count.
    """
    known = _known_models(model) if own is None else []
    if not known:
        yield own
        return
    with ExitStack() as stack:
        masks = [stack.enter_context(family.token_mask(inner)) for _, family, inner in known]
        mask_of = {id(part): mask for (*_, inner), mask in zip(known, masks, strict=True) for part in inner.modules()}

        def mask(slot: LoraSlot, x: Tensor) -> Tensor | None:
            own = mask_of.get(id(slot.host))
            return None if own is None else own(slot, x)

        yield masks[0] if len(known) == 1 else mask


_Known = tuple[str, Family, nn.Module]


def _known_models(model: nn.Module) -> list[_Known]:
    """The outermost models of known families inside ``model``: path, family and module of each."""
    models: list[_Known] = []
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer, *_ in models):
            continue
        models += [(path, family, module) for family in FAMILIES if family.owns(module)][:1]
    return models


def _inside(path: str, targets: list[Target]) -> list[Target]:
    """Targets of a model that stands at ``path`` of another."""
    prefix = f"{path}." if path else ""
    return [replace(t, name=prefix + t.name, module=prefix + t.module) for t in targets]


def _of_several(known: Sequence[_Known]) -> list[Target]:
    """The targets of all, if no two of the models have a tower of one name: depths would be mixed up."""
    targets: list[Target] = []
    path_of: dict[str, str] = {}
    for path, family, inner in known:
        own = [replace(t, tower="text") if t.tower == "model" else t for t in family.find_targets(inner)]
        for tower in {t.tower for t in own}:
            other = path_of.setdefault(tower, path)
            if other != path:
                raise ValueError(
                    f"find_targets: model must hold each tower once, got {tower!r} twice ({other}, {path}). Make a "
                    "keeper around one of the models, or pass targets."
                )
        targets += _inside(path, own)
    return targets
