"""Rows as text for the terminal and as Markdown for a file."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from bench.harness import Row


def text(rows: Sequence[Row]) -> str:
    """The rows of one case; times relative to the first provider."""
    lines = [f"\n{rows[0].id}  {rows[0].case}  ({rows[0].repeats} repeats)"]
    for row in rows:
        line = f"  {row.provider:<50} {row.median_s * 1e3:11.3f} ms  [{row.p20_s * 1e3:.3f} .. {row.p80_s * 1e3:.3f}]"
        line += f"  {row.median_s / rows[0].median_s:7.2f}x  {_memory(row)}"
        lines.append("  ".join([line, *_rates(row)]))
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """What ``python -m bench.run --json`` writes: the machine, then a table per case."""
    machine = dict(result["machine"])
    names = {"gpu": "", "cpu": "", "threads": "CPU threads ", "torch": "torch ", "cuda": "CUDA ", "driver": "driver "}
    names |= {
        "clock_sm": "SM clock ",
        "clock_sm_max": "at most ",
        "clock_memory": "memory clock ",
        "power_limit": "power limit ",
    }
    facts = [f"{label}{machine[name]}" for name, label in names.items() if name in machine]
    lines = [", ".join(facts), "", f"Commit {machine['commit']}: `{machine['command']}`"]
    rows = [Row(**row) for row in result["rows"]]
    for (id_, case), group in groupby(rows, key=lambda row: (row.id, row.case)):
        measured = list(group)
        lines += ["", f"**{id_}** {case}, {measured[0].repeats} repeats", ""]
        lines += ["| | median | 20 to 80 % | times ours | memory | rate |", "|---|---:|---:|---:|---:|---|"]
        for row in measured:
            ratio = row.median_s / measured[0].median_s
            lines.append(
                f"| {row.provider} | {row.median_s * 1e3:.3f} ms | {row.p20_s * 1e3:.3f} to {row.p80_s * 1e3:.3f} ms "
                f"| {ratio:.2f} | {_memory(row).strip()} | {', '.join(_rates(row))} |"
            )
    for missing in result.get("not_measured", ()):
        why = f"needs {missing['needs']}" if missing["needs"] else missing["error"]
        lines += ["", f"**{missing['id']}** {missing['case']}: not measured, {why}"]
    return "\n".join([*lines, ""])


def _memory(row: Row) -> str:
    held = f" + {row.kept_bytes / 2**20:.1f}" if row.kept_bytes else ""
    return f"{row.peak_bytes / 2**20:9.1f}{held} MiB"


def _rates(row: Row) -> list[str]:
    rates = [f"{row.bytes / row.median_s / 1e9:.1f} GB/s"] if row.bytes else []
    if row.flops and "ceiling" not in row.provider:  # a copy does no useful arithmetic
        rates.append(f"{row.flops / row.median_s / 1e9:.1f} GFLOP/s")
    return rates
