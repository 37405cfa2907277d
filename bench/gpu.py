"""What bench/gpu.sh does on a GPU, the most valuable first: python -m bench.gpu OUT [EARLIER]

EARLIER is the folder an earlier run on the same commit wrote: what that one has done is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import kit
from bench.run import commit
from bench.stages import Result, Stage, run_stages, summary
from bench.table import markdown

SECONDS = 540  # for all of it
WORK = kit.ROOT / "build" / "gpu"  # logs and what single stages write
WORKERS = "8"  # processes of the tests
# Stages of their own, checks of the emulator and of packages, which need no GPU, and what needs downloads.
LEFT_OUT = [
    "ops",
    "csrc",
    "families",
    "integrations",
    "test_cli.py",
    "test_packaging.py",
    "test_readme.py",
    "test_gpu_script.py",
    "test_gpu_kit.py",
]
# What a bare machine may not have, and the tests that import it.
NEED = {
    "open_clip": [
        "report", "tasks", "train", "compare", "tools", "test_examples.py", "methods/dac", "methods/duallora",
        "methods/keeplora_cls", "methods/test_lines.py", "methods/test_wrong_arguments.py",
        "methods/keeplora/test_peft_exchange.py", "statistics/test_in_place.py", "test_launches.py",
    ],
    "peft": [
        "methods/keeplora/test_peft_exchange.py", "methods/keeplora/test_hostile_adapters.py",
        "methods/test_every_method.py", "methods/test_unreached.py", "methods/test_quantised.py", "methods/peers",
        "lora/test_engines.py", "statistics/test_in_place.py", "test_launches.py",
    ],
    "bitsandbytes": ["methods/test_quantised.py", "statistics/test_in_place.py"],
    "torchao": ["methods/test_quantised.py"],
}  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def arch_of(major: int, minor: int) -> str:
    """The name nvcc has for a GPU; "a" opens instructions that only sm_90 itself has."""
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def stages(arch: str, *, rehearse: bool = False) -> list[list[Stage]]:
    """Groups of stages; those of one group run at the same time, so what is timed has a group of its own.

    Args:
        rehearse: the same stages, small and on the CPU, with what needs a GPU's own tools told to look at itself.
    """
    python, device = sys.executable, "cpu" if rehearse else "cuda"
    small = ["--small"] if rehearse else []
    nvcc, sanitizer, ncu = tool("nvcc"), tool("compute-sanitizer"), tool("ncu")
    # The project's own options want plugins that a bare machine may not have.
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "--durations=5"]
    spread = ["-n", WORKERS] if find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", *options, *(["--collect-only"] if rehearse else spread)]
    missing = [path for name, paths in NEED.items() if find_spec(name) is None for path in paths]
    ignored = [f"--ignore=tests/{path}" for path in (*LEFT_OUT, *missing)]

    def measure(name: str, seconds: int, each: str, *asked: str) -> Stage:
        command = [
            python,
            "-m",
            "bench.run",
            *asked,
            "--device",
            device,
            "--seconds",
            "0" if rehearse else each,
            *small,
        ]
        return Stage(name, seconds, [*command, "--json", str(WORK / f"{name}.json")], needs="build")

    def program(name: str, then: str) -> list[str]:
        """Run one of the kit's programs, compiled here where that does not work."""
        ready, made = kit.FOLDER / name, WORK / name
        compiled = " ".join(kit.compile_command(nvcc, arch, name, made))
        if rehearse:  # compiled, and no GPU to run it on
            return ["bash", "-c", f"{compiled} && {then.format('true')}"]
        return ["bash", "-c", f"({then.format(ready)}) 2>/dev/null || ({compiled} && {then.format(made)})"]

    def sanitize(check: str) -> Stage:
        # initcheck must see who wrote what our kernels read; the others may look at our kernels alone.
        only = [] if check == "initcheck" else ["--kernel-regex", "kns=keeplora"]
        command = [sanitizer, "--tool", check, "--error-exitcode", "9", *only, python, "-m", "bench.sanitize"]
        # Without torch's cache every tensor is an allocation of its own, whose ends the sanitizer knows.
        settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(check, 80, [*command, "--device", device], settings, needs="build")

    ceilings = f"{python} -m bench.ceilings --device {device} --json {WORK / 'ceilings.json'}"
    large = [python, "-m", "bench.large", "--device", device, *(["--shrink", "16"] if rehearse else [])]
    counted = [
        ncu, "--clock-control", "none", "--kernel-name", "regex:keeplora", "--section", "SpeedOfLight",
        "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy", "--section", "WarpStateStats",
        "--csv", "--log-file", str(WORK / "ncu.csv"),
    ]  # fmt: skip
    return [
        [
            Stage("build", 200, [python, "-m", "bench.gpu_build", arch], always=True),
            Stage("conformance", 40, program("conformance", "{}")),
        ],
        [Stage("ceilings", 30, program("mma_peak", ceilings + " --mma {}"))],
        [Stage("large", 40, large, needs="build")],
        [measure("step", 70, "10", "B8")],
        [measure("layers", 60, "4", "B6", "--only", "fwd+bwd", "--without", "torch.compile")],
        [measure("kernels", 90, "2", "B4", "B5", "B7", "--without", "torch.compile")],
        [measure("weights", 50, "2", "B6", "--only", "merge_weights", "--without", "torch.compile")],
        [measure("grads", 30, "2", "B6", "--only", "lora_grad_b", "--without", "torch.compile")],
        [Stage("profile", 40, [python, "-m", "bench.profile_step", "--device", device, *small], needs="build")],
        [Stage("counters", 60, [*counted, *large, "--unchecked"], needs="build")],
        [Stage("ops_on_cuda", 90, [*pytest, "tests/ops", "-k", "cuda and not emulated"], needs="build")],
        [sanitize(check) for check in SANITIZERS],
        [measure("switch", 60, "0", "B9", "B1")],
        [measure("bases", 60, "1", "B2", "B3", "--without", "torch.compile")],
        [Stage("suite", 100, [*pytest, "tests", *ignored], needs="build")],
        [measure("compiled", 100, "1", "B4", "B6")],
        [Stage("ops_on_cpu", 80, [*pytest, "tests/ops", "-k", "not cuda and not emulated"], needs="build")],
    ]


def tool(name: str) -> str:
    """Path of one of the toolkit's programs; its name where there is none, so that the stage says so."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places)) or name


def done_before(folder: Path | None, now: str) -> tuple[list[str], dict[str, Any]]:
    """The stages that the run which wrote ``folder`` has done, and the figures it has; none of another commit's."""
    if folder is None:
        return [], {}
    done = json.loads((folder / "done.json").read_text())
    if done["commit"] != now:
        print(f"{folder} is of commit {done['commit']}, and this is {now}: every stage is run", flush=True)
        return [], {}
    return done["stages"], json.loads((folder / "results.json").read_text())


def write(out: Path, results: Sequence[Result], now: str, earlier: dict[str, Any]) -> None:
    """Summary, figures, tables, logs and what is done, in five files: a run that is cut short keeps what it has."""
    out.mkdir(parents=True, exist_ok=True)
    figures = dict(earlier)
    for path in sorted(WORK.glob("*.json")):
        figures[path.stem] = json.loads(path.read_text())
    measured = [
        markdown(figures[name]) for name in (result.name for result in results) if "rows" in figures.get(name, ())
    ]
    ceilings = [f"* {name}: {value:.1f}" for name, value in figures.get("ceilings", {}).items()]
    (out / "summary.txt").write_text(f"commit {now}\n{summary(results)}")
    (out / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "table.md").write_text("\n".join([*ceilings, "", *measured]) if figures else "Nothing was measured.\n")
    done = {"commit": now, "stages": [result.name for result in results if result.well]}
    (out / "done.json").write_text(json.dumps(done, indent=1) + "\n")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as logs:
        for path in sorted([*WORK.glob("*.log"), *WORK.glob("*.csv")]):
            logs.add(path, path.name)


def main() -> None:
    rehearse = bool(os.environ.get("REHEARSE"))
    out, now = Path(sys.argv[1]), commit(kit.ROOT)
    done, earlier = done_before(Path(sys.argv[2]) if len(sys.argv) > 2 else None, now)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    arch = "90a" if rehearse else arch_of(*torch.cuda.get_device_capability())
    groups = stages(arch, rehearse=rehearse)
    if rehearse:  # on a small machine
        groups = [[replace(stage, seconds=900) for stage in group] for group in groups]
    results = run_stages(
        groups,
        WORK,
        seconds=float("inf") if rehearse else SECONDS,
        done=done,
        report=lambda results: write(out, results, now, earlier),
    )
    print(f"\n{summary(results)}tables in {out / 'table.md'}")
    raise SystemExit(0 if all(result.well for result in results) else 1)


if __name__ == "__main__":
    main()
