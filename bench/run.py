"""Measure benchmarks: python -m bench.run [ID ...] --device cpu|cuda --json FILE"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import kit
from bench.harness import Case, keep_freed_memory, run
from bench.table import markdown, text

KERNELS = {"B4", "B5", "B6", "B7"}  # the benchmarks of the ops; the others measure what is built from them


def all_cases() -> Iterator[Case]:
    """The cases of every bench_*.py."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        yield from importlib.import_module(f"bench.{path.stem}").cases()


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    facts = {
        "command": " ".join(["python -m bench.run", *sys.argv[1:]]),
        "commit": commit(kit.ROOT),
        "torch": torch.__version__,
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **gpu_state()}
    return facts


def commit(folder: Path) -> str:
    """The commit that ``folder`` is at, and whether files differ from it; of a copy without git, what its kit says."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--verify", "HEAD")
    if not name:
        made = kit.read(folder / "build" / "gpu-kit")
        return made.commit if made else "unknown"
    return name + (", with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def gpu_state() -> dict[str, str]:
    """The driver, and the clocks right now and at most, as nvidia-smi has them; nothing without it."""
    asked = {
        "driver": "driver_version",
        "clock_sm": "clocks.sm",
        "clock_sm_max": "clocks.max.sm",
        "clock_memory": "clocks.mem",
        "power_limit": "power.limit",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(asked, (value.strip() for value in done.stdout.split(",")), strict=True))


def chosen_ids(asked: list[str], known: set[str]) -> set[str]:
    """The benchmarks that ``asked`` names; ``kernels`` and ``systems`` are groups, nothing is everything."""
    groups = {"kernels": KERNELS & known, "systems": known - KERNELS}
    if unknown := set(asked) - known - set(groups):
        raise ValueError(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join([*sorted(known), *groups])}")
    return set().union(*(groups.get(name, {name}) for name in asked)) or known


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="B1 ... B10, kernels or systems; all when none is given")
    parser.add_argument("--only", default="", metavar="TEXT", help="of those, the cases with this in their names")
    parser.add_argument(
        "--without", default="", metavar="TEXT", help="leave out the providers with this in their names"
    )
    parser.add_argument(
        "--small", action="store_true", help="inputs as small as the tests': a rehearsal, no measurement"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the rows as a table in Markdown here")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per case (default 20)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()

    cases = list(all_cases())
    try:
        ids = chosen_ids(options.ids, {case.id for case in cases})
    except ValueError as error:
        parser.error(str(error))
    chosen = [case for case in cases if case.id in ids and options.only in case.name]
    if not chosen:
        parser.error(f"--only: some case of {', '.join(sorted(ids))} must have it in its name, got {options.only!r}")
    chosen.sort(key=lambda case: int(case.id[1:]))
    if options.without:
        chosen = [case.without(options.without) for case in chosen]
    if options.small:
        chosen = [dataclasses.replace(case, setup=case.small or case.setup) for case in chosen]
    failed = False
    for result in measure(chosen, device, options.seconds):
        # After every case: a run that is cut short keeps what it has.
        for path, content in ((options.json, json.dumps(result, indent=1) + "\n"), (options.table, markdown(result))):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
        failed = any(not missing["needs"] for missing in result["not_measured"])
    raise SystemExit(1 if failed else 0)


def measure(cases: list[Case], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """All results so far, after every case. What raises, a case or a provider, is noted with its error and left out."""
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for case in cases:
        failed: dict[str, Exception] = {}
        try:
            measured = list(run(case, device, seconds=seconds, failed=failed))
            if measured:
                print(text(measured), flush=True)
            rows += [dataclasses.asdict(row) for row in measured]
        except Exception as error:
            failed = {"": error}
        for provider, error in failed.items():
            traceback.print_exception(error)
            needs = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
            name = f"{case.name}: {provider}" if provider else case.name
            missing.append({"id": case.id, "case": name, "error": repr(error), "needs": needs})
        yield {"machine": machine(device), "rows": rows, "not_measured": missing}


if __name__ == "__main__":
    main()
