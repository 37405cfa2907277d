"""conformance/ must be able to fail: a mistake planted in a primitive has to show in that primitive's line."""

import shutil
import subprocess
from pathlib import Path

import pytest
from csrc.programs import CSRC, EMULATOR, HERE, INCLUDE

PRIMITIVES = Path("kernels", "primitives")
FLAGS = ["-std=c++20", "-O1", "-DKEEPLORA_EMULATE"]

# primitive file, what is there, what is planted, the line that must say DIFFERS. The first of every file are planted
# together in one build, so are the second ones; none of them reaches the line of another file.
MISTAKES = [
    ("warp.cuh", "offset > 0; offset /= 2", "offset > 1; offset /= 2", "warp_sum, block_sum, float"),
    ("warp.cuh", "upper ? values[i] : values[i + half]", "values[i]", "warp_sum_transposed"),
    ("block.cuh", "__syncthreads();  // every warp", "//", "warp_sum, block_sum"),
    ("shared.cuh", "take_shared(taken_++", "take_shared(taken_", "SharedArena"),
    ("mma.cuh", "column = 2 * (lane % 4);", "column = lane % 4;", "mma_tf32"),
    ("mma.cuh", "float_of(bits & 0xffffe000u)", "float_of(bits)", "mma_tf32"),
    ("mma.cuh", "if constexpr (!kExactA) mma_tf32(c, a.small, b.large);", "", "multiply_add, split floats"),
    ("convert.cuh", "0x7fff + (bits >> 16 & 1)", "0x8000", "narrow, float to bfloat16"),
    ("convert.cuh", "0xfff + (low >> 13 & 1)", "0x1000", "narrow, float to float16"),
    ("convert.cuh", "if (y != 0) y =", "if (false) y =", "narrow, double to bfloat16"),
    ("async.cuh", "kBytes, valid_bytes}, EMULATE_SITE", "kBytes, kBytes}, EMULATE_SITE", "copy_async, 16 bytes"),
    ("async.cuh", "finish_copies(kLeft)", "finish_copies(kLeft + 1)", "copy_async, 4 bytes"),
    ("convert.cuh", "(bits_of(x) + 0x1000u) & 0xffffe000u", "bits_of(x) & 0xffffe000u", "nearest_tf32"),
    ("atomic.cuh", "emulate::add_announcement(counter);", "", "take_ticket"),
    (
        "jobs.cuh",
        "jobs::publish(&job.tiles, static_cast<unsigned long long>(tiles - 1) << 32);",
        "jobs::publish(&job.tiles, static_cast<unsigned long long>(tiles) << 32);",
        "Worker",
    ),
    ("jobs.cuh", "jobs::fetch_add(&pool_->closed, 1u);", "", "Worker"),
    (
        "ldmatrix.cuh",
        "kTransposed ? rows[8 * i + other][lane / 4]",
        "kTransposed ? rows[8 * i + lane / 4][other]",
        "load_matrices, transposed",
    ),
    ("ldmatrix.cuh", "rows[8 * i + lane / 4][other];", "rows[8 * i + lane / 4][lane % 4 + 4 * j];", "load_matrices "),
    ("mma.cuh", "i ? bits & 0xffff0000u : bits << 16", "bits << 16", "mma_bf16"),
    ("cluster.cuh", "return emulate::cluster_rank();", "return 0;", "cluster_sync"),
    ("async.cuh", "emulate::mbarrier_wait(mbarrier_word(mbarrier), parity, EMULATE_SITE);", "", "mbarrier, bulk_copy"),
]


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The emulator without kernels, compiled once."""
    folder = tmp_path_factory.mktemp("emulator")
    include = [f"-I{path}" for path in INCLUDE]
    for source in EMULATOR:
        done = run("g++", *FLAGS, *include, "-c", source, "-o", folder / f"{source.stem}.o")
        assert done.returncode == 0, done.stderr
    return [folder / f"{source.stem}.o" for source in EMULATOR]


def conformance(folder, objects):
    """Build the program with the kernels' sources in ``folder`` and run it."""
    include = [f"-I{path}" for path in (folder, *(path for path in INCLUDE if path != CSRC))]
    program = HERE / "conformance" / "conformance.cu"
    done = run("g++", *FLAGS, *include, "-xc++", program, "-xnone", *objects, "-o", folder / "conformance")
    assert done.returncode == 0, done.stderr
    return run(folder / "conformance")


def test_every_primitive_has_a_mistake():
    names = [path.stem for path in (CSRC / PRIMITIVES).glob("*.cuh")]
    text = "".join(path.read_text() for path in (HERE / "conformance").iterdir())
    assert not [name for name in names if f'"kernels/primitives/{name}.cuh"' not in text]
    assert {f"{name}.cuh" for name in names} == {file for file, *_ in MISTAKES}


def builds():
    """Mistakes by how many of the same file come before."""
    places = [sum(file == other for other, *_ in MISTAKES[:i]) for i, (file, *_) in enumerate(MISTAKES)]
    return [[m for m, place in zip(MISTAKES, places, strict=True) if place == n] for n in range(max(places) + 1)]


def test_every_primitive_is_as_its_definition_says(tmp_path, objects):
    assert_differing([], tmp_path, objects)


@pytest.mark.proof
@pytest.mark.parametrize("mistakes", builds(), ids=[str(i + 1) for i in range(len(builds()))])
def test_mistakes_show(tmp_path, objects, mistakes):
    assert_differing(mistakes, tmp_path, objects)


def assert_differing(mistakes, tmp_path, objects):
    shutil.copytree(CSRC / "kernels", tmp_path / "kernels")
    for file, there, planted, _ in mistakes:
        path = tmp_path / PRIMITIVES / file
        original = path.read_text()
        assert there in original, f"{file} no longer contains {there!r}: update the mistake"
        path.write_text(original.replace(there, planted))
    done = conformance(tmp_path, objects)
    wrong = [text for text in done.stdout.splitlines() if "DIFFERS" in text]
    assert done.returncode == (1 if mistakes else 0), done.stdout + done.stderr
    for *_, line in mistakes:
        assert any(text.startswith(line) for text in wrong), (line, wrong)
