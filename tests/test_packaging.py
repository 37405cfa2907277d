"""What is built, what a wheel holds, and that it is installed and used without compiling anything."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packages import ROOT, TOOLKIT, build_wheel, copied, other_torch, shipped_files

from wheels import backend, check, plan

KERNELS = sorted(path.stem for path in (ROOT / "csrc" / "bind" / "cuda").glob("*.cpp"))


def succeeds(command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def run_unpacked(folder, *command, before=()):
    """Run Python where `keeplora` is the unpacked wheel and the folders of ``before`` come first."""
    path = os.pathsep.join(map(str, [folder, *before]))
    # A torch that is installed by itself does not find NVIDIA's libraries beside it.
    libraries = [*TOOLKIT.parent.glob("*/lib"), *(path for place in before for path in place.glob("nvidia/*/lib"))]
    environment = {"PYTHONPATH": path, "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)), "OMP_NUM_THREADS": "1"}
    return succeeds([sys.executable, *command], cwd=folder, env={**os.environ, **environment})


# ---- what is compiled


@pytest.mark.parametrize(
    ("environ", "system", "why"),
    [
        ({"KEEPLORA_CPU": "0"}, "Linux", "built with KEEPLORA_CPU=0"),
        ({}, "Darwin", "compiled on Linux alone, and this is Darwin"),
        ({}, "Windows", "compiled on Linux alone, and this is Windows"),
        ({"PATH": "/nowhere"}, "Linux", "no C++ compiler: c++ is not in PATH"),
        ({"CXX": "no-such-compiler -m64"}, "Linux", "no C++ compiler: no-such-compiler is not in PATH"),
    ],
    ids=str,
)
def test_where_nothing_can_be_compiled_it_is_said_why(environ, system, why):
    environ = {"PATH": os.environ["PATH"], **environ}
    assert why in plan.why_pure(environ, system)
    if "KEEPLORA_CPU" not in environ:
        with pytest.raises(SystemExit, match=f"KEEPLORA_CPU=1 asks for kernels.*{why[-12:]}"):
            plan.why_pure({**environ, "KEEPLORA_CPU": "1"}, system)


def test_here_the_kernels_of_the_cpu_are_compiled():
    assert plan.why_pure({"PATH": os.environ["PATH"]}, "Linux") == ""


@pytest.mark.parametrize(
    ("asked", "gpu", "cuda", "toolkit", "why"),
    [
        ("", False, "13.2", "13.2", "no NVIDIA GPU was visible"),
        ("0", True, "13.2", "13.2", "built with KEEPLORA_CUDA=0"),
        ("", True, None, "13.2", "torch 2.15 has no CUDA"),
        ("", True, "13.2", "", "nvcc is missing; set CUDA_HOME"),
        ("", True, "12.8", "13.2", "nvcc is 13.2, and torch has CUDA 12.8"),
        ("", True, "13.0", "13.2", ""),
        ("1", False, "13.0", "13.2", ""),
    ],
)
def test_cuda_is_compiled_where_a_gpu_is_visible_or_it_is_asked_for(asked, gpu, cuda, toolkit, why):
    fake = SimpleNamespace(__version__="2.15", version=SimpleNamespace(cuda=cuda))
    answer = plan.why_no_cuda(fake, Path("nvcc"), toolkit, {"KEEPLORA_CUDA": asked}, gpu=gpu)
    assert (why in answer) if why else (answer == "")
    if asked != "0" and gpu and why:
        with pytest.raises(SystemExit, match="KEEPLORA_CUDA=1 asks for kernels"):
            plan.why_no_cuda(fake, Path("nvcc"), toolkit, {"KEEPLORA_CUDA": "1"}, gpu=gpu)


@pytest.mark.parametrize(
    ("pure", "places", "needs"),
    [("no compiler", None, []), ("", [], ["ninja"]), ("", ["/x"], ["ninja"]), ("", None, ["ninja", "torch>=2.11"])],
)
def test_a_build_downloads_torch_only_to_compile_where_there_is_none(monkeypatch, pure, places, needs):
    monkeypatch.setattr(backend, "why_pure", lambda: pure)
    monkeypatch.setattr(backend, "find_torch", lambda: places)
    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() == needs
    assert backend.get_requires_for_build_sdist() == []


def test_the_torch_that_pip_hides_from_a_build_is_found(monkeypatch):
    """As pip does it: the same Python, less the folders of installed packages."""
    packages = Path(torch.__file__).parents[1]
    assert plan.find_torch() == []
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place) != packages])
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    assert str(packages) in plan.find_torch()
    monkeypatch.setattr(plan, "OLDEST_TORCH", (99, 0))
    assert plan.find_torch() is None


# ---- the wheels


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `make wheels` makes without CUDA: the source distribution and two wheels."""
    folder = tmp_path_factory.mktemp("wheels")
    environment = {**os.environ, "KEEPLORA_CUDA": "0"}
    succeeds([sys.executable, "-m", "wheels.make", folder / "dist"], cwd=copied(folder), env=environment)
    return folder / "dist"


def test_wheels_are_what_their_names_say(made):
    pure, compiled = sorted(made.glob("*.whl"))
    assert pure.name.endswith("-py3-none-any.whl")
    newest = re.fullmatch(r"keeplora-[\d.]+-py3-none-manylinux_2_(\d+)_x86_64\.whl", compiled.name)
    assert int(newest[1]) <= 28, "torch's own wheels are for manylinux_2_28"
    wanted = {name for name in shipped_files() if name.startswith("keeplora/") and not name.endswith((".so", ".pyc"))}
    assert len(wanted) > 80
    for path in (pure, compiled):
        wheel = zipfile.ZipFile(path)
        assert not wanted - set(wheel.namelist())
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
        assert "Requires-Dist: torch>=2.11" in metadata
        assert list(check.faults(str(path))) == []


def test_the_source_distribution_has_all_that_a_build_needs_and_no_tests(made):
    [source] = made.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(shipped_files()) <= names
    assert not {name for name in names if name.startswith("tests") or name.endswith((".so", "_built.json"))}


def changed(wheel, folder, name=None, files=(), record=None):
    """A copy of a wheel under another name, with other files besides or other content."""
    path = Path(tempfile.mkdtemp(dir=folder), name or wheel.name)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, (record or {}).get(entry, old.read(entry)))
        for file, content in files:
            new.writestr(file, content)
    return str(path)


def test_wheels_that_are_something_else_are_seen(made, tmp_path):
    pure, compiled = sorted(made.glob("*.whl"))
    library = zipfile.ZipFile(compiled).read("keeplora/_cpu.so")
    host = library.replace(b"libtorch_cpu.so", b"libtorch_cqu.so")
    facts = json.loads(zipfile.ZipFile(compiled).read("keeplora/_built.json"))
    for path, fault in (
        (changed(compiled, tmp_path, compiled.name.replace("py3", "cp311")), "name says cp311-none"),
        (changed(compiled, tmp_path, files=[("tests/test_cli.py", "")]), "must hold the package alone"),
        (changed(compiled, tmp_path, record={"keeplora/_cpu.so": host}), "must need torch and the system alone"),
        (changed(compiled, tmp_path, record={"keeplora/_cpu.so": library + b"/home/me/torch.h"}), "hold no paths"),
        (
            changed(compiled, tmp_path, record={"keeplora/_built.json": json.dumps({**facts, "cpu_kernels": []})}),
            "says",
        ),
        (changed(compiled, tmp_path, re.sub("2_2[0-9]", "2_5", compiled.name)), "must load with glibc 2.5"),
        (changed(pure, tmp_path, files=[("keeplora/_cpu.so", library)]), "must be for manylinux"),
    ):
        assert any(fault in found for found in check.faults(path)), (path, fault)
        with pytest.raises(SystemExit, match=r"wheels\.check: "):
            check.main([path])


@pytest.mark.parametrize("kind", ["compiled", "pure"])
def test_a_wheel_is_installed_into_an_empty_environment_and_learns_a_task(made, tmp_path, kind):
    """Empty but for a torch that is there already: the packages of this environment, behind its own."""
    wheel = dict(zip(("pure", "compiled"), sorted(made.glob("*.whl")), strict=True))[kind]
    succeeds([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    succeeds([*pip, wheel], env=environment)
    learned = succeeds([python, ROOT / "wheels" / "smoke.py"], cwd=tmp_path, env=environment)
    certificate, facts = learned.splitlines()
    assert "leak" in certificate
    assert str(packages) in facts
    assert ("kernels: ['lora_grad_b'" if kind == "compiled" else "kernels: []") in facts
    said = succeeds([tmp_path / "venv" / "bin" / "keeplora", "info"], cwd=tmp_path, env=environment)
    assert ("pure Python, every op runs its reference; built with KEEPLORA_CPU=0" in said) == (kind == "pure")


def test_ops_keep_their_contracts_without_kernels():
    """What tests/ops asks of the compiled kernels, asked of the references in their place."""
    every = ("compiled_kernel_agrees_with_reference", "same_bits_every_time", "writes_in_place_only_where_declared")
    tests = ["test_thin_matmul.py", *(f"test_every_op.py::test_{name}" for name in every)]
    command = [sys.executable, "-m", "pytest", "-q", *(ROOT / "tests" / "ops" / test for test in tests)]
    said = succeeds(command, cwd=ROOT, env={**os.environ, "KEEPLORA_CPU": "0"})
    assert re.search(r"\d\d+ passed", said)


# ---- with CUDA, built without a GPU


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A wheel with the CUDA kernels, built with the toolkit from PyPI for one architecture, unpacked."""
    assert (TOOLKIT / "bin" / "nvcc").exists(), f"no nvcc in {TOOLKIT}; pip install 'keeplora[dev]' brings one"
    folder = tmp_path_factory.mktemp("cuda")
    wheel = build_wheel(folder, KEEPLORA_CUDA="1", KEEPLORA_CUDA_ARCHS="90a", CUDA_HOME=str(TOOLKIT))
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    shutil.rmtree(folder / "src")
    return folder / "unpacked"


def test_wheel_with_cuda_is_built_and_loads_without_a_gpu(unpacked):
    library = (unpacked / "keeplora" / "_cuda.so").read_bytes()
    assert list(check.library_faults(library, (2, 28))) == []
    assert set(KERNELS) == {path.stem for path in (ROOT / "csrc" / "kernels").glob("*.cu")}
    code = (
        "import torch; from keeplora.ops import build_info; facts = build_info(); "
        "assert not torch.cuda.is_initialized(); "
        "assert facts['archs'] == ['90a'] and facts['cuda'].split('.')[0] == torch.version.cuda.split('.')[0], facts; "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*[name for name in facts['kernels'] if has(f'keeplora::{name}', 'CUDA')])"
    )
    assert run_unpacked(unpacked, "-c", code).split() == KERNELS
    assert "CUDA kernel" in run_unpacked(unpacked, "-m", "keeplora", "info")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "installed"])
def test_one_binary_for_every_torch(unpacked, version):
    """The wheel built above, with the oldest torch that pyproject.toml allows, with another, and with the one here."""
    here = torch.__version__.split("+")[0]
    before = [] if version in ("installed", here) else [other_torch(version)]
    printed = run_unpacked(
        unpacked,
        ROOT / "tests" / "every_op.py",
        here if version == "installed" else version,
        *KERNELS,
        before=before,
    )
    assert printed.startswith("torch ")


def test_setup_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60
