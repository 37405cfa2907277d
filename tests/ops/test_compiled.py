"""Which kernels are loaded, and what is said where they are not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import keeplora
from keeplora.ops import build_info, compiled

PACKAGE = Path(keeplora.__file__).parent
WRITTEN = {
    "torch": "2.15.0", "torch_target": "2.11", "cuda": "13.2", "archs": ["90a"], "kernels": ["project_rows"],
    "cpu_kernels": ["thin_matmul"], "without_cpu": "", "without_cuda": "",
}  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that lets the package find facts of a build, and returns what build_info makes of them."""
    monkeypatch.setattr(compiled, "_RECORD", tmp_path / "_built.json")
    monkeypatch.delenv("KEEPLORA_CPU", raising=False)
    monkeypatch.delenv("KEEPLORA_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def write(**changes):
        (tmp_path / "_built.json").write_text(json.dumps({**WRITTEN, **changes}))
        compiled._facts.cache_clear()
        return build_info()

    yield write
    monkeypatch.undo()
    compiled._facts.cache_clear()


def test_all_that_was_built_is_used_where_torch_has_the_same_cuda(written):
    assert written() == WRITTEN


@pytest.mark.parametrize(
    ("set_up", "why"),
    [
        (lambda patch: patch.setattr(torch.version, "cuda", None), "this torch has no CUDA"),
        (lambda patch: patch.setattr(torch.version, "cuda", "12.8"), "for CUDA 13.2, and this torch has CUDA 12.8"),
        (lambda patch: patch.setenv("KEEPLORA_CUDA", "0"), "KEEPLORA_CUDA=0 is set"),
    ],
    ids=["no CUDA", "another CUDA", "not wanted"],
)
def test_cuda_kernels_of_no_use_are_not_loaded(written, monkeypatch, set_up, why):
    set_up(monkeypatch)
    facts = written()
    assert why in facts["without_cuda"]
    assert (facts["cuda"], facts["kernels"], facts["archs"]) == (None, [], [])
    assert facts["cpu_kernels"] == ["thin_matmul"]


def test_kernels_can_be_left_unloaded(written, monkeypatch):
    monkeypatch.setenv("KEEPLORA_CPU", "0")
    facts = written()
    assert facts["without_cpu"] == facts["without_cuda"] == "KEEPLORA_CPU=0 is set"
    assert facts["cpu_kernels"] == facts["kernels"] == []


def test_why_nothing_was_compiled_is_kept(written, monkeypatch):
    monkeypatch.setenv("KEEPLORA_CPU", "0")  # says less than what the build said
    why = "no C++ compiler: c++ is not in PATH"
    assert written(cpu_kernels=[], kernels=[], cuda=None, without_cpu=why)["without_cpu"] == why


def test_another_cuda_is_said_where_a_gpu_would_have_used_it(written, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    written()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled._load()  # no warning: pytest.warns below sees that there can be one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match=r"CUDA kernels are not used: .*13\.2.*12\.8.*run their references"):
        compiled._load()


def test_a_library_that_does_not_load_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_PACKAGE", tmp_path)
    (tmp_path / "_cpu.so").write_bytes(b"none")
    with pytest.raises(ImportError, match=r"_cpu\.so must load into torch .*compiled with torch 2\.15.*KEEPLORA_CPU=0"):
        compiled._load_library(tmp_path / "_cpu.so", "2.15.0")


def test_a_checkout_that_was_never_built_runs_and_says_so(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "keeplora", ignore=shutil.ignore_patterns("*.so", "_built.json", "*.npz"))
    code = (
        "import keeplora.ops, torch\n"
        "print(keeplora.ops.thin_matmul(torch.eye(2), torch.ones(1, 2)).tolist(), keeplora.ops.build_info())\n"
    )
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[[1.0], [1.0]]" in done.stdout
    assert "was never built" in done.stdout
    [warning] = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert f"{tmp_path / 'mine.py'}:1" in warning  # the user's line, not one of ours
    assert "pip install -e" in warning
