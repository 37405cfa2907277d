"""The comparison of all methods: which of them run, at which settings, within which budget."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from keeplora._calls import named
from keeplora._messages import suggest
from keeplora._untrusted import parse_toml
from keeplora.compare.runs import check_settings, check_splits, is_finished, refusal
from keeplora.methods import METHODS
from keeplora.methods.settings import ConfigError
from keeplora.tasks.workload import Workload
from keeplora.train.config import ZERO_SHOT, MethodConfig, RunConfig, override, parse_config, read_toml
from keeplora.train.config_checks import BOTH
from keeplora.train.plugins import join_plugins, load_plugins
from keeplora.train.workload import configured_workload

BUDGETS = ("small", "full")
ALL = "all"


@dataclass(frozen=True)
class Comparison:
    """A configuration of all runs, the workload they share, and what has to be said about it.

    ``workload`` is None where every run is finished, with the same data and model: nothing is loaded then.
    ``left_out`` tells of methods that "all" means but that cannot handle this model, by name: why.
    ``untuned`` are methods without settings of their own for this benchmark. ``fronts`` are the labels of every
    method's learning rates, lowest first, where each runs at several.
    """

    config: RunConfig
    workload: Workload | None
    left_out: Mapping[str, str] = field(default_factory=dict)
    untuned: tuple[str, ...] = ()
    fronts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a reader of the table should know, one sentence each."""
        lines = [f"left out: {name} ({why})" for name, why in self.left_out.items()]
        if self.untuned:
            lines.append(f"with default settings: {', '.join(self.untuned)}")
        return lines


def shipped_comparisons() -> list[str]:
    """Benchmarks with settings for every method inside the package."""
    folder = resources.files(__package__) / "settings"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


@named
def comparison(
    benchmark: str | os.PathLike[str] = "embedded",
    *,
    budget: str = "full",
    methods: Sequence[str] = (ALL,),
    seeds: int | None = None,
    out: str | None = None,
    workers: int | None = None,
    plugins: Sequence[str] = (),
    fronts: Sequence[float] | None = None,
    reference: str = "",
) -> Comparison:
    """Settle a comparison: the runs, each method with its settings for this benchmark.

    Args:
        benchmark: ``embedded``, ``minilm``, ``clip-b16``, or a TOML file of one's own like those in
            ``keeplora/compare/settings``: what [`load_config`][] takes without ``methods``,
            plus ``[budget.small]`` and ``[budget.full]`` with what differs between them, ``[groups]`` with lists of
            names, and ``like = "name"`` in a ``[method.…]`` for one that shares its settings, and its method, with
            another.
        budget: ``small`` or ``full``.
        methods: Registered methods, labels of the file's ``[method.…]``, its groups, or ``all`` registered methods.
        seeds: Their number, 0 to seeds − 1; the budget's if None.
        out: Folder of the results; ``runs/compare-<benchmark>-<budget>`` if None.
        workers: Runs at the same time.
        plugins: Modules to import first, besides those of the file, for the methods they register.
        fronts: Run every method at each of these multiples of its learning rate, as ``METHOD@RATE``, evaluated on both
            splits; for ``report_fronts``.
        reference: With ``fronts``, the method that the others are to be tested against; checked here.

    Raises:
        ConfigError: a name nobody knows (the nearest are offered), a setting its method does not have, or a method
            named by itself that cannot handle the benchmark's model.
    """
    values, where = _read(benchmark)
    if budget not in BUDGETS:
        raise ConfigError(
            f"comparison: budget must be one of {', '.join(BUDGETS)}, got {budget!r}{suggest(budget, BUDGETS)}"
        )
    values["plugins"] = join_plugins(values.get("plugins", ()), plugins)
    load_plugins(values["plugins"])
    groups = values.pop("groups", {})
    budgets = values.pop("budget", {})
    sections = values["method"] = _resolved(values.get("method", {}), where)
    named, grouped = _labels(methods, groups, sections)
    values = {**values, **budgets.get(budget, {}), "methods": [*named, *(g for g in grouped if g not in named)]}
    default_out = f"runs/{'compare' if fronts is None else 'fronts'}-{Path(where).stem}-{budget}"
    config = override(
        parse_config({"out": default_out, **values}, where=where, base=str(Path(where).absolute().parent)),
        out=out,
        workers=workers,
        seeds=None if seeds is None else tuple(range(seeds)),
    )
    check_settings(config)  # a misspelled name is a mistake in a group, too; only the model's refusals are left out
    chosen, labels = (config, {}) if fronts is None else at_rates(config, fronts)
    workload, left_out = None, {}
    if not is_finished(chosen):
        workload = configured_workload(config, "cpu" if config.workers else config.device)
        left_out = {label: why for label in grouped if label not in named and (why := refusal(config, workload, label))}
        chosen = override(config, methods=tuple(label for label in config.methods if label not in left_out))
        if fronts is not None:
            chosen, labels = at_rates(chosen, fronts)
        check_splits(chosen, workload)
    untuned = tuple(
        label
        for label in config.methods
        if label not in (*sections, *left_out) and METHODS[label].config is not _NO_CONFIG
    )
    if reference and reference not in labels:
        known = ", ".join(labels) or "none without fronts"
        raise ConfigError(
            f"comparison: reference must be one of {known}, got {reference!r}{suggest(reference, labels)}"
        )
    return Comparison(chosen, workload, left_out, untuned, labels)


RATES = (0.3, 1.0, 3.0)
"""Multiples of a method's learning rate, about three times apart."""


def at_rates(config: RunConfig, factors: Sequence[float]) -> tuple[RunConfig, dict[str, tuple[str, ...]]]:
    """Every method at several learning rates, as ``METHOD@RATE``; and the labels of each method, lowest rate first.

    A rate is ``factor`` times the method's own, to two digits. What does not train keeps its label.
    """
    if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ConfigError(f"comparison: fronts must be multiples of a learning rate, above 0, got {list(factors)}")
    sections: dict[str, MethodConfig] = {}
    labels: dict[str, tuple[str, ...]] = {}
    for label in config.methods:
        entry = config.of(label)
        if entry.method == ZERO_SHOT:
            continue
        rates = sorted({float(f"{factor * entry.learning_rate:.2g}") for factor in factors})
        entries = {f"{label}@{rate:g}": replace(entry, learning_rate=rate) for rate in rates}
        if not getattr(METHODS[entry.method].build, "trains", True):
            entries = {label: entry}
        sections |= entries
        labels[label] = tuple(entries)
    if not labels:
        raise ConfigError(f"comparison: methods must hold one that learns, got {', '.join(config.labels())}")
    return replace(config, methods=tuple(sections), method=sections, evaluate_on=BOTH), labels


_NO_CONFIG = METHODS["zero-shot"].config


def _read(benchmark: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    if not isinstance(benchmark, str | os.PathLike):
        raise TypeError(f"comparison: benchmark must be a name or a TOML file, got {benchmark!r}.")
    shipped = shipped_comparisons()
    if str(benchmark) in shipped:
        file = resources.files(__package__) / "settings" / f"{benchmark}.toml"
        return parse_toml(file.read_bytes()), str(benchmark)
    if os.path.lexists(benchmark):
        return read_toml("comparison", benchmark), str(benchmark)
    raise ConfigError(
        f"comparison: benchmark must be one of {', '.join(shipped)} or a TOML file, got {str(benchmark)!r}"
        f"{suggest(str(benchmark), shipped)}"
    )


def _resolved(sections: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """Every section with what ``like`` brings written out."""
    written = {}
    for label, section in sections.items():
        other = section.get("like")
        if other is None:
            written[label] = dict(section)
            continue
        if other not in sections or "like" in sections[other]:
            plain = [name for name, entry in sections.items() if "like" not in entry]
            raise ConfigError(
                f"comparison: like must name a [method.…] of its own, got {other!r} in [method.{label}] of {where}"
                f"{suggest(str(other), plain)}"
            )
        own = {name: value for name, value in section.items() if name != "like"}
        written[label] = {"method": other, **sections[other], **own}
    return written


def _labels(
    asked: Sequence[str], groups: Mapping[str, Sequence[str]], sections: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Labels that were asked for by name, and those that a group brings."""
    known = [ALL, *groups, *METHODS, *(label for label in sections if label not in METHODS)]
    named: list[str] = []
    grouped: list[str] = []
    for name in asked:
        if name not in known:
            raise ConfigError(f"comparison: methods must be known, got {name!r}{suggest(name, known, listing=True)}")
        members = list(METHODS) if name == ALL else groups.get(name)
        if members is None:
            named.append(name)
        else:
            grouped += members
    return list(dict.fromkeys(named)), list(dict.fromkeys(grouped))
