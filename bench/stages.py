"""Runs stages, each with a time limit of its own, so that none can eat or hide another's result."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

OK, EARLIER = "ok", "ok, in an earlier run"


@dataclass(frozen=True)
class Stage:
    """One command; its output goes to ``<name>.log``."""

    name: str
    seconds: float  # time limit
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a stage without which this one has no meaning
    always: bool = False  # also where an earlier run has done it


@dataclass(frozen=True)
class Result:
    """How a stage ended: "ok", or why not."""

    name: str
    outcome: str
    seconds: float

    @property
    def well(self) -> bool:
        return self.outcome in (OK, EARLIER)


def run_stages(
    groups: Sequence[Sequence[Stage]],
    folder: Path,
    *,
    seconds: float,
    done: Collection[str] = (),
    report: Callable[[Sequence[Result]], None] = lambda results: None,
) -> list[Result]:
    """Run groups of stages within ``seconds`` in all: one group after another, the stages of one at the same time.

    Args:
        folder: for the logs.
        done: names of stages that an earlier run has done.
        report: is given all results so far, after every group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    results: list[Result] = []
    for group in groups:
        failed = {result.name for result in results if not result.well}

        def run(stage: Stage, failed: set[str] = failed) -> Result:
            begin = time.monotonic()
            limit = min(stage.seconds, end - begin)
            if stage.name in done and not stage.always:
                outcome = EARLIER
            elif stage.needs in failed:
                outcome = f"not run: {stage.needs} failed"
            elif limit <= 0:
                outcome = f"not run: the {seconds:.0f} s for all stages are over"
            else:
                outcome = _run(stage, limit, folder / f"{stage.name}.log")
            return Result(stage.name, outcome, time.monotonic() - begin)

        with ThreadPoolExecutor(len(group)) as pool:
            finished = list(pool.map(run, group))
        for result in finished:
            print(_line(result), flush=True)
            if result.outcome.startswith("FAILED"):
                log = (folder / f"{result.name}.log").read_text(errors="replace")
                print("\n".join(log.splitlines()[-15:]), flush=True)
        results += finished
        report(results)
    return results


def summary(results: Sequence[Result]) -> str:
    """One line per stage, and how many did not end well."""
    bad = sum(not result.well for result in results)
    verdict = "every stage is ok" if not bad else f"{bad} of {len(results)} stages are not ok"
    return "\n".join([*map(_line, results), verdict, ""])


def _line(result: Result) -> str:
    return f"{result.name:<20} {result.seconds:6.1f} s  {result.outcome}"


def _run(stage: Stage, limit: float, log: Path) -> str:
    with log.open("w") as output:
        output.write(f"$ {' '.join(stage.command)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                stage.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **stage.environment},
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{error}\n")
            return f"FAILED: cannot be started: {error}"
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what the command started, too
            process.wait()
            return f"FAILED: not done after {limit:.0f} s"
    return OK if status == 0 else f"FAILED: exit status {status}"
