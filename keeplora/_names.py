"""Names that are not known: which one was meant, of ours, of PEFT's, of training loops'."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

__all__ = ["nearest", "suggest", "unknown_argument", "unknown_name"]

_HERE = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "target_parameters": "target_modules",
    "lr": "learning_rate", "wd": "weight_decay", "seed": "seeds", "output_dir": "out", "num_workers": "workers",
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs"), "epochs"), "max_steps": "steps",
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "evaluation_batch_size"),
    "warmup_ratio": "warmup", "lr_scheduler_type": "schedule", "report_to": "trackers",
    **dict.fromkeys(("bf16", "fp16", "amp"), "precision"), "dataloader": "loader", "peft_model": "model",
}  # fmt: skip
_TARGETS = "Choose weights by targets=, for example some of keeplora.find_targets(model)."
_LOOP = "It belongs to the loop: to the optimizer, or to a settings file beside the method's settings."
_ELSEWHERE = {
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"), _TARGETS),
    **dict.fromkeys(("learning_rate", "lr", "weight_decay", "epochs", "batch_size"), _LOOP),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), "export_peft takes it."),
    "modules_to_save": "Adapters alone are trained here; keeplora.initialize has also_train=.",
    **dict.fromkeys(
        ("bias", "use_dora", "init_lora_weights", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "inference_mode"),
        "There is nothing like it here: leave it out.",
    ),
}
"""What PEFT and training loops call settings, and where keeplora has them."""


def unknown_name(name: object, known: Sequence[str]) -> str:
    """What to do about a setting or an argument that is none of ``known``: one sentence.

    Examples:
        >>> unknown_name("lora_alpha", ["r", "alpha"])
        "It is called 'alpha' here."
        >>> unknown_name("lora_alpha", ["method", "learning_rate", "settings"])
        "A method's own settings go into settings={'alpha': …}."
    """
    here = _HERE.get(str(name), str(name))
    if here in known:
        return f"It is called {here!r} here."
    if not difflib.get_close_matches(str(name), known, cutoff=0.75):
        if {"method", "methods"} <= set(known):  # of a whole run
            entry = "learning_rate=…" if here == "learning_rate" else f"settings={{{here!r}: …}}"
            return f"What one method has goes into method={{'lora': MethodConfig('lora', {entry})}}."
        if "settings" in known:
            return f"A method's own settings go into settings={{{here!r}: …}}."
    if str(name) in _ELSEWHERE:
        return _ELSEWHERE[str(name)]
    return f"Nearest names: {', '.join(nearest(str(name), known))}." if known else "It has no settings."


def unknown_argument(function: Callable[..., Any], call: str, given: Mapping[str, Any], owner: object = None) -> str:
    """What is wrong with the named arguments of a call; empty where ``function`` takes all of them.

    ``owner`` is what is made by the call, if it makes something: its ``config_type`` says what goes into its config.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return ""
    known = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    strangers = [name for name in given if name not in known]
    if not strangers:
        return ""
    name, value = strangers[0], given[strangers[0]]
    got = repr(value) if value is None or isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
    config, here = getattr(owner, "config_type", None), _HERE.get(name, name)
    remedy = unknown_name(name, [one for one in known if one != "self"])
    if config is not None and here in {field.name for field in fields(config)}:
        remedy = f"It goes into config={config.__name__}({here}=…)."
    return f"{call}: arguments do not include {name!r}, got {name}={got}. {remedy}"


def nearest(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.4) -> list[str]:
    """The known names that look most like ``name``; of names that look like none, the first few.

    >>> nearest("keplora", ["lora", "keeplora", "gpm"], cutoff=0.6)
    ['keeplora', 'lora']
    """
    choices = list(known)
    return difflib.get_close_matches(name, choices, n=most, cutoff=cutoff) or choices[:most]


def suggest(name: str, known: Iterable[str], *, listing: bool = False) -> str:
    """What to end a message with that refuses ``name``: the known names that look like it, then all of them if asked.

    >>> suggest("minlm", ["embedded", "minilm"])
    ". Did you mean 'minilm'?"
    >>> suggest("xyz", ["embedded", "minilm"], listing=True)
    '. Known: embedded, minilm'
    """
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=2, cutoff=0.5)
    meant = f". Did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
    if not listing:
        return meant
    return f"{meant or '.'} Known: {', '.join(choices)}"
