"""Runs stages one after another, each with a time limit of its own, so that none can eat or hide another's result."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

OK = "ok"


@dataclass(frozen=True)
class Stage:
    """One command; its output goes to ``<name>.log``."""

    name: str
    seconds: float  # time limit
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a stage without which this one has no meaning


@dataclass(frozen=True)
class Result:
    """How a stage ended: "ok", or why not."""

    name: str
    outcome: str
    seconds: float


def run_stages(stages: Sequence[Stage], out: Path, *, seconds: float) -> list[Result]:
    """Run ``stages`` within ``seconds`` in all; ``out/summary.txt`` is up to date after each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    results: list[Result] = []
    for stage in stages:
        begin = time.monotonic()
        limit = min(stage.seconds, end - begin)
        failed = {result.name for result in results if result.outcome != OK}
        if stage.needs in failed:
            outcome = f"not run: {stage.needs} failed"
        elif limit <= 0:
            outcome = f"not run: the {seconds:.0f} s for all stages are over"
        else:
            outcome = _run(stage, limit, out / f"{stage.name}.log")
        results.append(Result(stage.name, outcome, time.monotonic() - begin))
        print(_line(results[-1]), flush=True)
        if outcome.startswith("FAILED"):
            print("\n".join((out / f"{stage.name}.log").read_text(errors="replace").splitlines()[-15:]), flush=True)
        (out / "summary.txt").write_text(summary(results))
    return results


def summary(results: Sequence[Result]) -> str:
    """One line per stage, and how many did not end well."""
    bad = sum(result.outcome != OK for result in results)
    total = sum(result.seconds for result in results)
    verdict = "every stage is ok" if not bad else f"{bad} of {len(results)} stages are not ok"
    return "\n".join([*map(_line, results), f"{verdict}, {total:.0f} s", ""])


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
