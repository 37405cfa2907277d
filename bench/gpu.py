"""What bench/gpu.sh does on a GPU, the most valuable first: python -m bench.gpu OUT"""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.stages import OK, Stage, run_stages, summary
from bench.table import markdown

SECONDS = 465  # for all of it; the shell's part before takes a few more
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
]
# What a bare machine may not have, and the tests that import it.
NEED = {
    "open_clip": [
        "report", "tasks", "train", "compare", "tools", "test_examples.py", "methods/dac", "methods/duallora",
        "methods/keeplora_cls", "methods/test_lines.py", "methods/keeplora/test_peft_exchange.py",
        "statistics/test_in_place.py", "test_launches.py",
    ],
    "peft": [
        "methods/keeplora/test_peft_exchange.py", "methods/keeplora/test_hostile_adapters.py",
        "methods/test_every_method.py", "methods/test_unreached.py", "methods/peers", "statistics/test_in_place.py",
        "test_launches.py",
    ],
}  # fmt: skip


def arch_of(major: int, minor: int) -> str:
    """The name nvcc has for a GPU; "a" opens instructions that only sm_90 itself has."""
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def stages(out: Path, arch: str) -> list[Stage]:
    """Build, conformance, the ops on the GPU, benchmarks, sanitizers, everything else."""
    python = sys.executable
    nvcc, sanitizer = tool("nvcc"), tool("compute-sanitizer")
    program = "build/conformance"
    conformance = (
        f"mkdir -p build && {nvcc} -std=c++20 -O2 -I csrc -I tests/csrc "
        f"-gencode=arch=compute_{arch},code=sm_{arch} tests/csrc/conformance/conformance.cu -o {program} && ./{program}"
    )
    # The project's own options want plugins that a bare machine may not have.
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "--durations=5"]
    pytest = [python, "-m", "pytest", "-q", *options]
    missing = [path for name, paths in NEED.items() if find_spec(name) is None for path in paths]
    ignored = [f"--ignore=tests/{path}" for path in (*LEFT_OUT, *missing)]
    build = {"KEEPLORA_CUDA": "1", "KEEPLORA_CUDA_ARCHS": arch}

    def measure(name: str, seconds: int, each: str) -> Stage:
        command = [python, "-m", "bench.run", name, "--device", "cuda", "--seconds", each]
        return Stage(name, seconds, [*command, "--json", str(out / f"{name}.json")], needs="build")

    def sanitize(check: str, seconds: int) -> Stage:
        # initcheck must see who wrote what our kernels read; the others may look at our kernels alone.
        only = [] if check == "initcheck" else ["--kernel-regex", "kns=keeplora"]
        command = [sanitizer, "--tool", check, "--error-exitcode", "9", *only, python, "-m", "bench.sanitize"]
        # Without torch's cache every tensor is an allocation of its own, whose ends the sanitizer knows.
        return Stage(check, seconds, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, needs="build")

    return [
        Stage("build", 150, [python, "setup.py", "build_ext", "--inplace"], build),
        Stage("conformance", 40, ["bash", "-c", conformance]),
        Stage("ops_on_cuda", 120, [*pytest, "tests/ops", "-k", "cuda and not emulated"], needs="build"),
        measure("kernels", 110, "1.5"),
        *(sanitize(check, 40) for check in ("memcheck", "racecheck", "initcheck", "synccheck")),
        Stage("suite", 100, [*pytest, "tests", *ignored], needs="build"),
        measure("systems", 90, "1"),
        Stage("ops_on_cpu", 80, [*pytest, "tests/ops", "-k", "not cuda and not emulated"], needs="build"),
    ]


def tool(name: str) -> str:
    """Path of one of the toolkit's programs; its name where there is none, so that the stage says so."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places)) or name


def main() -> None:
    out = Path(sys.argv[1])
    arch = arch_of(*torch.cuda.get_device_capability())
    results = run_stages(stages(out, arch), out, seconds=SECONDS)
    measured = [out / f"{name}.json" for name in ("kernels", "systems")]
    tables = [markdown(json.loads(path.read_text())) for path in measured if path.exists()]
    (out / "table.md").write_text("\n".join(tables) or "Nothing was measured.\n")
    print(f"\n{summary(results)}tables in {out / 'table.md'}")
    raise SystemExit(0 if all(result.outcome == OK for result in results) else 1)


if __name__ == "__main__":
    main()
