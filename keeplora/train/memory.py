"""Peak memory of a run."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

KINDS = {
    "cpu": "largest resident set of the process (Python, torch, data and model included)",
    "cuda": "largest memory allocated by torch on the GPU",
}
"""What :func:`peak_bytes` measures on each device."""


def reset_peak(device: str) -> None:
    """Start a new measurement. Where Linux does not let a process reset its own mark, the old one stays."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        try:
            marker.write_text("5")
        except OSError:  # a container may forbid it: then the mark is that of the whole process, an upper bound
            return


def peak_bytes(device: str) -> int:
    """The largest memory in use since :func:`reset_peak`, see :data:`KINDS`."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(usage) * (1 if sys.platform == "darwin" else 1024)
