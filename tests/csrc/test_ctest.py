"""The kernels' own build and its tests, as a developer runs them: its self-test, checks, conformance."""

import os
import subprocess

import pytest
from csrc.programs import CSRC, ROOT, find_nvcc


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.proof
def test_everything_builds_and_passes(tmp_path):
    """But for the compile gate of nvcc, which is test_nvcc_gate.py's."""
    cores = str(os.cpu_count() or 1)
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DNVCC={find_nvcc()}")
    run("cmake", "--build", tmp_path)
    report = run("ctest", "--test-dir", tmp_path, "-j", cores, "--output-on-failure", "-E", "nvcc_gate")
    assert "100% tests passed" in report
    for kernel in (CSRC / "kernels").glob("*.cu"):
        for build in ("emulate", "emulate_sanitized", "emulate_raced"):
            assert f"check_{kernel.stem}_{build} " in report
    assert "selftest" in report
    assert "conformance_emulate_raced" in report
    assert all(f"conformance_compiles_sm_{arch} " in report for arch in ("80", "90a", "100"))
