"""Try for some time to lose something, and print a table of tries and losses.

    python -m tools.reliability --minutes 5
    python -m tools.reliability --hours 3 --json build/reliability.json --page docs/reliability.md
    python -m tools.reliability --minutes 1 --only "killed" --seed 4

The exit code is 1 where anything was lost. What the trials are and what the last long run found: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import keeplora
from keeplora._files import write_json
from keeplora.report.summary import environment, write_text

from . import disk, hostile, kills, memory, ranks, writers
from .trials import Trial, distinct, run, table

PLACE = next(place for place in (Path("/dev/shm"), Path(tempfile.gettempdir())) if place.is_dir())
"""Files in memory where there are such: nobody cuts the power here, so that nothing need wait for a disk."""

BEGIN, END = "<!-- the last long run -->", "<!-- its end -->"

TRIALS = [
    Trial("killed at random moments", kills.at_random, share=2),
    Trial("killed at every file operation", kills.at_every_write, whole=True, share=2),
    Trial("runs killed and resumed", kills.runs, share=2),
    Trial("disk full at every write", disk.full_at_every_write, whole=True),
    Trial("disk failing at every file operation", disk.failing_at_every_operation, whole=True),
    Trial("files that cannot grow", disk.short_files, whole=True),
    Trial("small file systems", disk.small_disk, whole=True),
    Trial("concurrent saves", writers.together),
    Trial("two ranks against one process", ranks.against_one),
    Trial("one of two ranks stopped", ranks.one_ends),
    Trial("fifty tasks, flat memory", memory.fifty_tasks, whole=True),
    Trial("odd things in place of files", hostile.odd, whole=True),
    Trial("hostile bytes", hostile.changed_bytes, share=3),
    Trial("hostile JSON", hostile.changed_json, share=3),
    Trial("hostile values under right hashes", hostile.signed, share=3),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--hours", type=float, help="in place of --minutes")
    parser.add_argument("--seed", type=int, help="of all draws; from the clock if not given, and printed")
    parser.add_argument("--only", default="", help="trials whose name has this in it")
    parser.add_argument("--place", type=Path, default=PLACE, help=f"where files are made; {PLACE} if not given")
    parser.add_argument("--json", type=Path, help="a file for the outcomes, with every loss")
    parser.add_argument("--page", type=Path, help="a page that takes the table, as docs/reliability.md does")
    parsed = parser.parse_args(arguments)
    seed = int(time.time()) if parsed.seed is None else parsed.seed
    seconds = 60 * parsed.minutes if parsed.hours is None else 3600 * parsed.hours
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes = run([trial for trial in TRIALS if parsed.only in trial.name], seconds, seed, place=parsed.place)
    length = f"--minutes {parsed.minutes:g}" if parsed.hours is None else f"--hours {parsed.hours:g}"
    shown = f"{origin(length, seed, parsed)}\n\n{table(outcomes)}"
    print(f"\n{shown}")
    losses = [f"{outcome.name}: {loss}" for outcome in outcomes for loss in outcome.losses]
    for loss in distinct(losses)[:40]:
        print(f"LOST {loss}", file=sys.stderr)
    if parsed.json is not None:
        write_json(parsed.json, {"seed": seed, "outcomes": [vars(outcome) for outcome in outcomes]})
    if parsed.page is not None:
        before, mark, rest = parsed.page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        write_text(parsed.page, f"{before}{mark}\n\n{shown}\n\n{END}{after}")
    return bool(losses)


def origin(length: str, seed: int, parsed: argparse.Namespace) -> str:
    """Which command found it, when, and on what."""
    here = environment(kills.CONFIG)
    only = f' --only "{parsed.only}"' if parsed.only else ""
    return (
        f"`python -m tools.reliability {length} --seed {seed}{only} --place {parsed.place}` on "
        f"{time.strftime('%Y-%m-%d')}: keeplora {keeplora.__version__}, torch {torch.__version__}, "
        f"{os.cpu_count()} CPUs ({here['cpu']}), {platform.system()} {platform.release()}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
