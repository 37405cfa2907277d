"""Measure benchmarks: python -m bench.run [ID ...] --device cpu|cuda --json FILE"""

import argparse
import dataclasses
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.harness import Case, Row, run


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
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "command": " ".join(["python -m bench.run", *sys.argv[1:]]),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def table(rows: list[Row]) -> str:
    """The rows of one case as text; times relative to the first provider."""
    lines = [f"\n{rows[0].id}  {rows[0].case}  ({rows[0].repeats} repeats)"]
    for row in rows:
        line = f"  {row.provider:<50} {row.median_s * 1e3:11.3f} ms  [{row.p20_s * 1e3:.3f} .. {row.p80_s * 1e3:.3f}]"
        line += f"  {row.median_s / rows[0].median_s:7.2f}x  {row.peak_bytes / 2**20:9.1f} MiB"
        if row.bytes:
            line += f"  {row.bytes / row.median_s / 1e9:8.1f} GB/s"
        if row.flops and "ceiling" not in row.provider:  # a copy does no useful arithmetic
            line += f"  {row.flops / row.median_s / 1e9:9.1f} GFLOP/s"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="B1 ... B10; all when none is given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per case (default 20)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if device.type == "cpu":
        torch.set_num_threads(1)

    cases = list(all_cases())
    known = {case.id for case in cases}
    if unknown := set(options.ids) - known:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    rows: list[Row] = []
    for case in cases:
        if options.ids and case.id not in options.ids:
            continue
        measured = list(run(case, device, seconds=options.seconds))
        print(table(measured), flush=True)
        rows += measured
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine(device), "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
