"""What bench/gpu.sh takes along, what it does with it, and the programs it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ceilings, gpu_build, graphs, kit, large, profile_step, run
from bench.gpu import tool
from keeplora.ops.declare import OPS

ROOT = Path(__file__).parent.parent
INFO = {"cuda": "13.0", "archs": ["80", "90a"]}


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "_cuda.so"
    path.write_bytes(b"kernels")
    return path


def made(tmp_path, library, info=INFO, commands=None):
    commands = [] if commands is None else commands
    return kit.make(
        tmp_path / "kit", nvcc="nvcc", arch="90a", commit="abc", library=library, info=info,
        run=lambda command, cwd: commands.append(command),
    )  # fmt: skip


def test_a_kit_holds_the_library_the_programs_the_packages_and_what_it_was_made_from(tmp_path, library):
    commands = []
    found = made(tmp_path, library, commands=commands)
    assert (tmp_path / "kit" / "_cuda.so").read_bytes() == b"kernels"
    assert [command[-1] for command in commands[:2]] == [str(tmp_path / "kit" / name) for name in kit.PROGRAMS]
    assert all((ROOT / word).exists() for command in commands[:2] for word in command if word.endswith(".cu"))
    assert {"--no-deps", "open_clip_torch==3.3.0"} <= set(commands[2])
    assert kit.read(tmp_path / "kit") == found == kit.Kit("abc", kit.sources_hash(), "13.0", ("80", "90a"))
    assert kit.read(tmp_path) is None


@pytest.mark.parametrize("info", [{"cuda": None, "archs": []}, {"cuda": "13.0", "archs": ["80"]}], ids=str)
def test_a_build_without_kernels_for_that_gpu_makes_no_kit(tmp_path, library, info):
    with pytest.raises(SystemExit, match=r"must have kernels for 90a, got CUDA .*KEEPLORA_CUDA_ARCHS=90a"):
        made(tmp_path, library, info)
    assert not (tmp_path / "kit").exists()


def test_a_library_of_older_sources_makes_no_kit(tmp_path, library):
    os.utime(library, (0, 0))
    with pytest.raises(SystemExit, match=r"must be newer than the sources, got older than .*csrc"):
        made(tmp_path, library)
    assert not (tmp_path / "kit").exists()


def test_a_kit_is_used_for_its_own_sources_and_gpu_alone():
    fits = kit.Kit("abc", "hash", "13.0", ("80", "90a"))
    assert gpu_build.why_not(fits, "90a", "hash") == ""
    assert gpu_build.why_not(None, "90a", "hash") == "there is no kit"
    assert gpu_build.why_not(fits, "90a", "other") == "it was made from other sources"
    assert gpu_build.why_not(fits, "100", "hash") == "it is for 80, 90a, and this GPU is 100"


@pytest.mark.parametrize(
    ("statuses", "says", "libraries"),
    [
        ([0, 0], "the kernels are the kit's", [True, True]),
        ([0, 1, 0, 0], "compiled here: it does not build or load here", [True, True, False, False]),
        ([1, 0, 0], "compiled here: it does not build or load here", [True, False, False]),
        ([0, 1, 1], "compiled here: it does not build or load here", [True, True, False]),
    ],
)
def test_kernels_that_do_not_load_are_compiled(tmp_path, library, capsys, statuses, says, libraries):
    made(tmp_path, library)
    (tmp_path / "keeplora").mkdir()
    given, environments = iter(statuses), []

    def call(command, cwd, env=None):
        environments.append(env or environments[-1])
        return next(given)

    status = gpu_build.build(tmp_path / "kit", "90a", call, root=tmp_path)
    assert status == statuses[-1]
    [taken] = (tmp_path / "keeplora").iterdir()
    assert taken.read_bytes() == b"kernels"
    assert taken.name == "_cuda.so"
    assert says in capsys.readouterr().out
    assert [environment["KEEPLORA_CUDA_COMPILED"] == "1" for environment in environments] == libraries
    assert all(environment["KEEPLORA_CUDA_ARCHS"] == "90a" for environment in environments)


def test_a_copy_without_git_has_the_commit_of_its_kit(tmp_path):
    (tmp_path / "build" / "gpu-kit").mkdir(parents=True)
    content = {"commit": "abc", "sources": "", "cuda": "13.0", "archs": ["90a"]}
    (tmp_path / "build" / "gpu-kit" / "kit.json").write_text(json.dumps(content))
    assert run.commit(tmp_path) == "abc"


def test_a_graph_is_captured_once_for_its_arguments_and_lives_with_them(monkeypatch):
    seen = []
    monkeypatch.setattr(graphs, "captured", lambda call: seen.append(call) or (lambda: seen.append("replayed")))
    provider, one, two = graphs.in_graph(lambda x, graphs: None), {}, {}
    for held in (one, one, two):
        provider(3, held)
    assert seen[1:3] == ["replayed", "replayed"]
    assert len(seen) == 5
    assert len(one) == len(two) == 1


def test_every_kernel_has_a_call_at_the_benchmarks_sizes():
    named = {name for name, _ in large.calls(torch.device("cpu"), 32)}
    assert named == {path.stem for path in (ROOT / "csrc" / "bind" / "cuda").glob("*.cpp")}


def test_large_calls_are_compared_with_float64(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.large", "--device", "cpu", "--shrink", "32"])
    with pytest.raises(SystemExit, match="0"):
        large.main()
    assert capsys.readouterr().out.count("of what rounding explains") == 11


@pytest.mark.parametrize("name", ["project_rows", "merge_weights", "lora_grad_b", "orthonormalize", "sketch_rows"])
def test_a_result_that_is_off_by_a_little_is_seen(monkeypatch, name):
    """An op that leaves out the last row of its first input."""
    op = OPS[name]

    def short(*arguments):
        arguments = list(arguments)
        place = 1 if name == "sketch_rows" else 0
        first = arguments[place]
        for tensor in first if isinstance(first, list) else [first]:
            tensor[-1] = 0
        return op.reference(*arguments)

    device = torch.device("cpu")
    for found, arguments in large.calls(device, 32):
        if found == name:
            exact = large.moved(arguments, device)
            assert large.error_of(name, arguments, device) <= 1
            monkeypatch.setitem(OPS, name, type(op)(op.name, short, op.reference, op.samples))
            assert large.error_of(name, exact, device) > 1
            monkeypatch.setitem(OPS, name, op)


def test_profile_of_a_step_names_every_provider(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.profile_step", "--device", "cpu", "--small"])
    profile_step.main()
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line in profile_step.PROVIDERS] == list(profile_step.PROVIDERS)
    assert text.count("aten::addmm") == 3


def test_ceilings_of_a_cpu(tmp_path, monkeypatch):
    program = tmp_path / "mma_peak"
    program.write_text("#!/bin/sh\necho mma_tf32_TFLOPs 290.5\n")
    program.chmod(0o755)
    out = tmp_path / "ceilings.json"
    monkeypatch.setattr(sys, "argv", ["bench.ceilings", "--device", "cpu", "--mma", str(program), "--json", str(out)])
    ceilings.main()
    found = json.loads(out.read_text())
    assert found.pop("mma_tf32_TFLOPs") == 290.5
    assert {"copy_GBs", "eager_call_us", "matmul_bf16_TFLOPs"} <= found.keys()
    assert all(value > 0 for value in found.values())


@pytest.mark.skipif(not Path(tool("nvcc")).exists(), reason="needs nvcc")
def test_the_peak_program_compiles(tmp_path):
    subprocess.run(kit.compile_command(tool("nvcc"), "90a", "mma_peak", tmp_path / "mma_peak"), cwd=ROOT, check=True)
