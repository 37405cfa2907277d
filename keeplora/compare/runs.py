"""All methods and seeds of a configuration: what is checked before they run, and where their records are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from difflib import get_close_matches

from keeplora._calls import named
from keeplora._files import one_writer
from keeplora._messages import listed, suggest
from keeplora.methods import METHODS, configure, create
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import StateError
from keeplora.tasks.workload import EvenlyWorkload, ItemWorkload, Workload
from keeplora.train.config import RunConfig, override
from keeplora.train.config_checks import BOTH
from keeplora.train.evaluated import evaluations_folder
from keeplora.train.events import Event, Listener
from keeplora.train.loop import run_one
from keeplora.train.plugins import load_plugins
from keeplora.train.record import RunRecord, claim_folder, load_result, recorded_data, run_folder
from keeplora.train.workload import configured_workload, source_of

from .console import Console
from .pool import Pool

__all__ = ["all_methods", "check_methods", "check_settings", "check_splits", "is_finished", "read_records", "refusal",
           "run_benchmark", "unfinished", "with_all_methods"]  # fmt: skip


@named
def run_benchmark(
    config: RunConfig,
    *,
    console: Listener | None = None,
    workload: Workload | None = None,
    accept_versions: bool = False,
) -> list[RunRecord]:
    """Run every (method, seed) of ``config`` and return their records in the order of ``config.pairs()``.

    Results land in ``config.out`` (see ``keeplora.train.record``). Finished pairs are read back, pairs
    that were interrupted continue. With ``config.workers = 0`` everything runs in this process. The ``workload`` of
    ``config`` need not be loaded again where it is loaded already, nor at all where every run is finished and the files
    and versions that data and model are made of are as they were. A folder that was begun with another keeplora or
    torch is gone on with if ``accept_versions``.

    Raises ``ConfigError`` for unknown methods or settings, or a folder with other settings; ``OSError`` for a folder
    that another process runs in, or that cannot be written to; ``WorkerError`` when a run fails; ``KeyboardInterrupt``
    after Ctrl-C, when the workers have stopped and the folder can be resumed.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(
            f"run_benchmark: config must be a RunConfig, got {type(config).__name__}. Read one: "
            "keeplora.load_config(path)."
        )
    source = source_of(config)
    data = _finished_data(config, source) if workload is None else None
    if data is None:
        if workload is None:
            workload = configured_workload(config, "cpu" if config.workers else config.device)
        check_methods(config, workload, [label for label, _ in unfinished(config)])  # what has run suits the model
        data = workload.fingerprint()
    with one_writer(config.out, patience=0):
        claim_folder(config, data, source=source, accept_versions=accept_versions)
        _run_all(config, workload, console)
    return read_records(config)


def is_finished(config: RunConfig) -> bool:
    """Whether every run of ``config`` is in its folder, and what data and model are made of is as it was.

    Then there is nothing to load. False, too, where only loading them would tell: for tasks of the user's own.
    """
    return _finished_data(config, source_of(config)) is not None


def _finished_data(config: RunConfig, source: str | None) -> str | None:
    """The recorded fingerprint of the data, if [`is_finished`][]."""
    data = recorded_data(config, source)
    if data is None:
        return None
    check_settings(config)
    return None if unfinished(config) else data


def _run_all(config: RunConfig, workload: Workload | None, console: Listener | None) -> None:
    """``workload`` may be None where nothing is left to run."""
    results = _results(config)
    waiting = [pair for pair, record in results.items() if record is None]
    if workload is None and waiting:  # another process has moved results away
        workload = configured_workload(config, "cpu" if config.workers else config.device)
    done = [record for record in results.values() if record is not None]
    tasks = len(done[0].tasks if workload is None else workload.tasks)
    shown = Console(tasks * len(config.pairs())) if console is None else None
    listener: Listener = console if console is not None else shown  # type: ignore[assignment]
    try:
        for label, seed in config.pairs():
            if (label, seed) not in waiting:
                listener(Event("done", label, seed, tasks, tasks, text="already finished"))
        if config.workers == 0 and workload is not None:
            for label, seed in waiting:
                place, known = run_folder(config.out, label, seed), evaluations_folder(config)
                run_one(config, workload, label, seed, folder=place, evaluations=known, listener=listener)
        elif waiting:
            Pool(config, waiting, listener).run()
    finally:
        if shown is not None:
            shown.close()


def read_records(config: RunConfig) -> list[RunRecord]:
    """The finished runs of ``config`` in its folder; raises ``ConfigError`` when some are missing, naming all."""
    results = _results(config)
    if missing := [f"{label}, seed {seed}" for (label, seed), record in results.items() if record is None]:
        raise ConfigError(
            f"read_records: {config.out} must hold every run, got none of {listed(missing)}. Run the same command again"
        )
    return [record for record in results.values() if record is not None]


def _results(config: RunConfig) -> dict[tuple[str, int], RunRecord | None]:
    """The result of every (label, seed), None where there is none yet.

    Raises:
        ConfigError: results were made with other settings.
        StateError: results are damaged. All are told in one message.
    """
    results: dict[tuple[str, int], RunRecord | None] = {}
    wrong: list[ConfigError | StateError] = []
    for label, seed in config.pairs():
        try:
            results[label, seed] = load_result(run_folder(config.out, label, seed), config.identity(label, seed))
        except (ConfigError, StateError) as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        kind = next((type(error) for error in wrong if isinstance(error, StateError)), ConfigError)
        raise kind(f"{len(wrong)} results of {config.out} cannot be used:\n" + "\n".join(f"  {e}" for e in wrong))
    return results


def check_settings(config: RunConfig) -> None:
    """Raise ``ConfigError`` for methods that are not registered, or for settings that they do not have; all at once.

    Plugins are loaded first.
    """
    load_plugins(config.plugins)
    known = (*config.methods, *METHODS)
    _refuse_all(
        f'[method.{label}] must name a method of this run or set method = "…" to one of '
        f"{', '.join(METHODS)}, got {entry.method!r}{suggest(entry.method, known)}"
        for label, entry in config.method.items()
        if entry.method not in METHODS
    )
    shared = dict.fromkeys(["learning_rate", *(each.name for one in METHODS.values() for each in fields(one.config))])
    _refuse_all(
        f"every_method must have settings of some method, got {name!r}{suggest(name, shared)}"
        for name in config.every_method
        if name not in shared
    )
    _refuse_all(told for label in config.labels() if (told := _unsuited(config, label)))


def _unsuited(config: RunConfig, label: str) -> str:
    """What is wrong with a method's name or settings, whatever the model; empty where nothing is."""
    entry = config.of(label)
    for setting in entry.settings:
        if meant := get_close_matches(setting, ("learning_rate", "weight_decay"), n=1, cutoff=0.85):
            return f"settings of [method.{label}] must be known, got {setting!r}. Did you mean {meant[0]!r}?"
    if entry.method not in METHODS:
        names = dict.fromkeys((*METHODS, *config.method))
        return f"methods must be known, got {entry.method!r}{suggest(entry.method, names, listing=True)}"
    try:
        configure(entry.method, entry.settings)
    except (TypeError, ValueError) as error:
        return f"the settings of {label} must suit {entry.method}: {error}"
    return ""


def check_methods(config: RunConfig, workload: Workload, labels: Collection[str] | None = None) -> None:
    """As ``check_settings``, and for a method that cannot handle the benchmark's model. Nothing is trained.

    Of ``labels`` alone the methods are tried on the model; None: of all. Without any, no model is loaded.
    """
    check_settings(config)
    for name in ("epochs", "steps", "rate_factors"):
        given, tasks = getattr(config, name), len(workload.tasks)
        if isinstance(given, tuple) and given and len(given) != tasks:
            raise ConfigError(
                f"check_methods: {name} must have one number for each of {tasks} tasks, got {len(given)}: {list(given)}"
            )
    check_splits(config, workload)
    if config.switch_order == "evenly" and not isinstance(workload, EvenlyWorkload):
        raise ConfigError(
            'check_methods: switch_order must be "shuffled" with a benchmark that does not space its samples evenly '
            f'(EvenlyWorkload.evenly), got "evenly" with {config.benchmark!r}'
        )
    if config.evaluate_on == BOTH and not isinstance(workload, ItemWorkload):
        raise ConfigError(
            "check_methods: benchmark must tell which test items are right (ItemWorkload.correct), got "
            f"{config.benchmark!r}, which does not: paired tests need that. Add the function to it, or compare without "
            "fronts"
        )
    alike = {
        repr((config.of(label).method, config.of(label).settings)): label
        for label in config.labels()
        if labels is None or label in labels
    }
    _refuse_all(
        f"{label} must suit the benchmark's model and settings: {why}"
        for label in alike.values()  # a learning rate is nothing to refuse
        if (why := refusal(config, workload, label))
    )


def _refuse_all(told: Iterable[str]) -> None:
    """One `ConfigError` for all that is told, where there is something."""
    lines = list(told)
    if len(lines) == 1:
        raise ConfigError(f"check_methods: {lines[0]}")
    if lines:
        raise ConfigError(f"check_methods: {len(lines)} methods cannot run:\n" + "\n".join(f"  {x}" for x in lines))


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


def all_methods(config: RunConfig) -> RunConfig:
    """``config`` with every method it has a table for and every registered one."""
    return override(config, methods=tuple(dict.fromkeys((*config.methods, *config.method, *METHODS))))


def with_all_methods(config: RunConfig, workload: Workload) -> tuple[RunConfig, dict[str, str]]:
    """[`all_methods`][] but those that the model refuses; and these: why.

    A method that the configuration itself names stays, and is refused later.
    """
    every = all_methods(config).methods
    left_out = {
        label: why for label in every if label not in config.methods and (why := refusal(config, workload, label))
    }
    return override(config, methods=tuple(label for label in every if label not in left_out)), left_out


def unfinished(config: RunConfig) -> list[tuple[str, int]]:
    """The (label, seed) of ``config`` that have no result in its folder yet, in the order they run."""
    return [pair for pair, record in _results(config).items() if record is None]
