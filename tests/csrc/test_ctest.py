"""The kernels' own build and its tests, as a developer runs them: the emulator's self-test, checks, conformance."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_everything_but_nvcc_builds_and_passes(tmp_path):
    """What needs nvcc is test_nvcc_gate.py's and test_packaging.py's."""
    cores = str(os.cpu_count() or 1)
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja")
    run("cmake", "--build", tmp_path)
    report = run("ctest", "--test-dir", tmp_path, "-j", cores, "--output-on-failure", "-E", "nvcc|compiles")
    assert "100% tests passed" in report
    for kernel in (ROOT / "csrc" / "kernels").glob("*.cu"):
        for build in ("emulate", "emulate_sanitized", "emulate_raced"):
            assert f"check_{kernel.stem}_{build} " in report
    assert "selftest" in report
    assert "conformance_emulate_raced" in report
