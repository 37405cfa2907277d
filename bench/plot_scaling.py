"""Plot B10 and fit how time and memory grow: python -m bench.plot_scaling FILE, FILE being what bench.run --json wrote.

Writes FILE with .png, and prints the exponents: measured, and of the counted arithmetic and memory.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bench_scaling import count


@dataclass(frozen=True)
class Curve:
    """Growth along one axis: sizes, seconds and bytes measured, arithmetic and memory counted."""

    axis: str
    sizes: list[int]
    seconds: list[float]
    peak: list[int]
    flops: list[int]
    bytes: list[int]

    def exponents(self) -> dict[str, float]:
        """Slopes on logarithmic scales over all sizes."""
        measured = {"time": self.seconds, "memory": self.peak, "flops": self.flops, "bytes": self.bytes}
        return {name: exponent(self.sizes, values) for name, values in measured.items()}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through (log size, log value).

    Example:
        >>> round(exponent([1, 2, 4], [5, 40, 320]), 3)
        3.0
    """
    x, y = ([math.log(v) for v in numbers] for numbers in (sizes, values))
    middle, level = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / spread


def curves(result: dict[str, Any]) -> list[Curve]:
    """The measured curves among the rows that bench.run wrote."""
    kind, cores = "cuda" if "gpu" in result["machine"] else "cpu", result["machine"]["cores"]
    found: dict[str, Curve] = {}
    for row in result["rows"]:
        if row["id"] != "B10" or row["provider"] != "keeplora":
            continue
        axis, _, value = row["case"].rpartition(" / ")[2].partition(" = ")
        need = count(axis, int(value), kind, cores)
        curve = found.setdefault(axis, Curve(axis, [], [], [], [], []))
        curve.sizes.append(int(value))
        curve.seconds.append(row["median_s"])
        curve.peak.append(row["peak_bytes"])
        curve.flops.append(need.flops)
        curve.bytes.append(need.bytes)
    return list(found.values())


def plot(path: Path, measured: Sequence[Curve]) -> None:
    """Time and memory, a column for each axis; dashed, the counts, put through the last point."""
    from matplotlib.figure import Figure  # seconds to import: not for those who only measure

    figure = Figure(figsize=(4.2 * len(measured), 6.4), layout="constrained")
    axes = figure.subplots(2, len(measured), squeeze=False)
    for column, curve in enumerate(measured):
        slopes = curve.exponents()
        for row, (what, unit, values, counted, name) in enumerate(
            [
                ("time", "s", curve.seconds, curve.flops, "flops"),
                ("memory", "MiB", [b / 2**20 for b in curve.peak], curve.bytes, "bytes"),
            ]
        ):
            at = axes[row][column]
            at.loglog(curve.sizes, values, marker="o", label=f"measured, exponent {slopes[what]:.2f}")
            scaled = [values[-1] * c / counted[-1] for c in counted]
            at.loglog(curve.sizes, scaled, linestyle="--", label=f"counted {name}, exponent {slopes[name]:.2f}")
            at.set_xticks(curve.sizes, [str(size) for size in curve.sizes], rotation=30, ha="right")
            at.minorticks_off()
            at.set_xlabel(curve.axis)
            at.set_ylabel(f"{what} ({unit})")
            at.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    source = Path(sys.argv[1])
    measured = curves(json.loads(source.read_text()))
    for curve in measured:
        slopes = curve.exponents()
        print(
            f"{curve.axis:<8} time {slopes['time']:5.2f} (flops {slopes['flops']:.2f})"
            f"   memory {slopes['memory']:5.2f} (bytes {slopes['bytes']:.2f})"
        )
    plot(source.with_suffix(".png"), measured)


if __name__ == "__main__":
    main()
