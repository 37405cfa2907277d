"""All methods and seeds of a configuration: what is checked before they run, and where their records are."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from keeplora._files import one_writer
from keeplora._messages import listed, suggest
from keeplora.methods import METHODS, configure, create
from keeplora.methods.settings import ConfigError
from keeplora.tasks.workload import ItemWorkload, Workload
from keeplora.train.config import BOTH, RunConfig
from keeplora.train.events import Event, Listener
from keeplora.train.loop import run_one
from keeplora.train.plugins import load_plugins
from keeplora.train.record import RunRecord, claim_folder, load_result, run_folder
from keeplora.train.workload import configured_workload

from .console import Console
from .pool import Pool

__all__ = ["check_methods", "check_settings", "check_splits", "read_records", "refusal", "run_benchmark", "unfinished"]


def run_benchmark(
    config: RunConfig,
    *,
    console: Listener | None = None,
    workload: Workload | None = None,
    accept_versions: bool = False,
) -> list[RunRecord]:
    """Run every (method, seed) of ``config`` and return their records in the order of ``config.pairs()``.

    Results land in ``config.out`` (see ``keeplora.train.record``). Finished pairs are read back, pairs
    that were interrupted continue. With ``config.workers = 0`` everything runs in this process. A ``workload`` that is
    loaded already need not be loaded again. A folder that was begun with another keeplora or torch is gone on with if
    ``accept_versions``.

    Raises ``ConfigError`` for unknown methods or settings, or a folder with other settings; ``OSError`` for a folder
    that another process runs in, or that cannot be written to; ``WorkerError`` when a run fails; ``KeyboardInterrupt``
    after Ctrl-C, when the workers have stopped and the folder can be resumed.
    """
    if workload is None:
        workload = configured_workload(config, "cpu" if config.workers else config.device)
    check_methods(config, workload)
    with one_writer(config.out, patience=0):
        claim_folder(config, workload.fingerprint(), accept_versions=accept_versions)
        _run_all(config, workload, console)
    return read_records(config)


def _run_all(config: RunConfig, workload: Workload, console: Listener | None) -> None:
    shown = Console(len(workload.tasks) * len(config.pairs())) if console is None else None
    listener: Listener = console if console is not None else shown  # type: ignore[assignment]
    try:
        waiting = unfinished(config)
        tasks = len(workload.tasks)
        for label, seed in config.pairs():
            if (label, seed) not in waiting:
                listener(Event("done", label, seed, tasks, tasks, text="already finished"))
        if config.workers == 0:
            for label, seed in waiting:
                run_one(config, workload, label, seed, folder=run_folder(config.out, label, seed), listener=listener)
        elif waiting:
            Pool(config, waiting, listener).run()
    finally:
        if shown is not None:
            shown.close()


def read_records(config: RunConfig) -> list[RunRecord]:
    """The finished runs of ``config`` in its folder; raises ``ConfigError`` when one is missing."""
    records = []
    for label, seed in config.pairs():
        record = load_result(run_folder(config.out, label, seed), config.identity(label, seed))
        if record is None:
            raise ConfigError(f"read_records: {config.out} must hold {label}, seed {seed}. Run the same command again")
        records.append(record)
    return records


def check_settings(config: RunConfig) -> None:
    """Raise ``ConfigError`` for a method that is not registered, or for settings that it does not have.

    Plugins are loaded first.
    """
    load_plugins(config.plugins)
    for label, entry in config.method.items():
        if entry.method not in METHODS:
            known = (*config.methods, *METHODS)
            raise ConfigError(
                f'check_methods: [method.{label}] must name a method of this run or set method = "…" to one of '
                f"{', '.join(METHODS)}, got {entry.method!r}{suggest(entry.method, known)}"
            )
    for label in config.labels():
        entry = config.of(label)
        for setting in entry.settings:
            if meant := get_close_matches(setting, ("learning_rate", "weight_decay"), n=1, cutoff=0.85):
                raise ConfigError(
                    f"check_methods: settings of [method.{label}] must be known, got {setting!r}. "
                    f"Did you mean {meant[0]!r}?"
                )
        if entry.method not in METHODS:
            raise ConfigError(
                f"check_methods: methods must be known, got {entry.method!r}"
                f"{suggest(entry.method, dict.fromkeys((*METHODS, *config.method)), listing=True)}"
            )
        try:
            configure(entry.method, entry.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"check_methods: the settings of {label} must suit {entry.method}: {error}") from error


def check_methods(config: RunConfig, workload: Workload) -> None:
    """As ``check_settings``, and for a method that cannot handle the benchmark's model. Nothing is trained."""
    check_settings(config)
    for name in ("epochs", "rate_factors"):
        given, tasks = getattr(config, name), len(workload.tasks)
        if isinstance(given, tuple) and given and len(given) != tasks:
            raise ConfigError(
                f"check_methods: {name} must have one number for each of {tasks} tasks, got {len(given)}: {list(given)}"
            )
    check_splits(config, workload)
    if config.evaluate_on == BOTH and not isinstance(workload, ItemWorkload):
        raise ConfigError(
            "check_methods: benchmark must tell which test items are right (ItemWorkload.correct), got "
            f"{config.benchmark!r}, which does not: paired tests need that. Add the function to it, or compare without "
            "fronts"
        )
    alike = {repr((config.of(label).method, config.of(label).settings)): label for label in config.labels()}
    for label in alike.values():  # a learning rate is nothing to refuse
        why = refusal(config, workload, label)
        if why:
            raise ConfigError(f"check_methods: {label} must suit the benchmark's model and settings: {why}")


def check_splits(config: RunConfig, workload: Workload) -> None:
    """Every split that will be evaluated holds samples, where the workload tells how many."""
    count: Callable[[int, str], int] | None = getattr(workload, "evaluated", None)
    if count is None:
        return
    splits = ("test", "validation") if config.evaluate_on == BOTH else (config.split,)
    for split in splits:
        empty = [name for task, name in enumerate(workload.tasks) if not count(task, split)]
        if empty:
            raise ConfigError(
                f"check_methods: every task must have {split} data with evaluate_on = {config.evaluate_on!r}, got "
                f"none in {listed(empty)}. Set {split}_fraction in [data] above 0, or give such data"
            )


def refusal(config: RunConfig, workload: Workload, label: str) -> str:
    """Why the method of ``label`` cannot be made around this benchmark's model; empty where it can."""
    entry = config.of(label)
    try:
        create(entry.method, workload.model(), dict(entry.settings))
    except (ImportError, TypeError, ValueError) as error:
        return str(error).rstrip(".")
    return ""


def unfinished(config: RunConfig) -> list[tuple[str, int]]:
    """The (label, seed) of ``config`` that have no result in its folder yet, in the order they run."""
    return [
        (label, seed)
        for label, seed in config.pairs()
        if load_result(run_folder(config.out, label, seed), config.identity(label, seed)) is None
    ]
