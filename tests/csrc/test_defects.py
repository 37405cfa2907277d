"""The tests of the emulated kernels must be able to fail: every planted defect has to be caught.

Every barrier, wait and bounds check of every kernel is left out in turn (mutations.py), and mistakes in meaning are
made (defects/<op>.py); a check program must then fail, built plainly, with sanitizers, or with the race detector.
`make test-kernels` tries all of them; `make test` one per kernel and build.
"""

import importlib
import re
from dataclasses import replace

import pytest
from csrc.mutations import Mutation, closing, mutations, plant, sources, visible
from csrc.programs import CSRC, HERE, MODES, Planted, checks, each, programs

SURVIVORS = HERE / "survivors.txt"
# What the report of a build is known by: in the sanitized and the raced build it is the sanitizer that notices.
TELLING = {"plain": "", "sanitized": "AddressSanitizer|runtime error", "raced": "ThreadSanitizer: data race"}
# What may stand around the expression in a defect's texts.
AROUND = re.compile(r"((?:return|[\w:<>*& ]+ [+*/-]?=) )?(.*?)(;)?", re.S)


def defects_of(op):
    return importlib.import_module(f"csrc.defects.{op}")


def place_of(file, find, put):
    """The mutation that puts one text of a defect for another."""
    text = (CSRC / file).read_text()
    assert text.count(find) == 1, f"{file} contains {find!r} {text.count(find)} times: update the defects"
    before, find_expression, after = AROUND.fullmatch(find).groups()
    same_before, put_expression, same_after = AROUND.fullmatch(put).groups()
    assert put_expression, f"{file}: {put!r} is no expression"
    assert (before, after) == (same_before, same_after), f"{file}: {find!r} and {put!r} differ in more"
    at = text.index(find) + len(before or "")
    line = text.count("\n", 0, at) + 1
    return Mutation(file, line, at, at + len(find_expression), find_expression, put_expression)


def meaning_defects():
    for path in sorted((HERE / "defects").glob("[!_]*.py")):
        for _, file, *texts in defects_of(path.stem).DEFECTS:
            first, *also = [place_of(file, find, put) for find, put in zip(texts[::2], texts[1::2], strict=True)]
            yield replace(first, also=tuple(also))


def everything():
    covered = set().union(*(program.files for program in programs()))
    generated = [m for path in sources(CSRC) if path in covered for m in mutations(CSRC, path)]
    return sorted({*generated, *meaning_defects()}, key=lambda m: (m.file, m.start, -m.end, m.put))


def excused():
    lines = [line for line in SURVIVORS.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {tuple(part.strip() for part in line.split(" | ")[:2]): line for line in lines}


def built(folder, mutations, programs):
    """The programs, after a run in which no mistake was active and all passed."""
    planted = Planted(folder, mutations, programs)
    runs = [(mode, program) for mode in MODES for program in planted.programs]
    reports = zip(runs, each(lambda run: planted.fails(*run), runs), strict=True)
    wrong = [f"{mode} {program.name}: {report}" for (mode, program), report in reports if report]
    assert not wrong, "\n".join(wrong)
    return planted


def representatives():
    """By op and mode: the mutation that REPRESENTATIVES of the op's list names."""
    found, chosen = everything(), {}
    for program in checks():
        for mode, (file, begin) in defects_of(program.name).REPRESENTATIVES.items():
            named = [m for m in found if m.file == file and m.key.startswith(begin)]
            assert named, f"REPRESENTATIVES of {program.name}: {file} has no mutation {begin!r}"
            chosen[program.name, mode] = named[0]
    return chosen


@pytest.fixture(scope="module")
def planted(request, tmp_path_factory):
    """With every mutation and program where the whole table is asked for, else with the representatives."""
    whole = any(item.name == "test_every_defect_is_caught" for item in request.session.items)
    chosen = set(representatives().values())
    mutations = [m for m in everything() if whole or m in chosen]
    return built(tmp_path_factory.mktemp("planted"), mutations, programs() if whole else checks())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("program", checks(), ids=lambda program: program.name)
def test_one_defect_of_every_kernel_and_build_is_caught(planted, program, mode):
    mutation = representatives()[program.name, mode]
    report = planted.fails(mode, program, planted.mutations.index(mutation))
    assert report, f"{mutation} goes unnoticed"
    assert re.search(TELLING[mode], report), report


@pytest.mark.proof
def test_every_defect_is_caught(planted):
    excuses = excused()
    keys = [(m.file, m.key) for m in planted.mutations]
    assert not (stale := set(excuses) - set(keys)), f"{SURVIVORS.name} excuses what is not there: {stale}"
    numbers = [i for i, key in enumerate(keys) if key not in excuses]
    results = each(planted.caught, numbers)
    for i, result in zip(numbers, results, strict=True):
        print(f"{planted.mutations[i]} | {' | '.join(result) if result else 'NOT CAUGHT'}")
    missed = []
    for i, result in zip(numbers, results, strict=True):
        reached = any(planted.reaches(program, i) for program in planted.programs)
        if result is None:
            missed.append(f"{planted.mutations[i]}{'' if reached else ' (no program comes here)'}")
    assert not missed, f"{len(missed)} of {len(numbers)} defects go unnoticed:\n" + "\n".join(missed)


EXAMPLE = """
__device__ void kernel(int* x, int n) {
  int i = threadIdx.x;
#ifdef KEEPLORA_EMULATE
  if (i < n && x[i] >= 0) x[i] = min(kMost, max(0, n - i));  // a < b
#else
  if (i < 2) asm("");
#endif
  for (int j = 0; j < n; ++j)
    gpu::copy_wait<0>();
  __syncthreads();
}
int host(int a) { return a < 3; }
"""


def test_mutations_of_an_example(tmp_path):
    path = tmp_path / "kernels" / "example.cu"
    path.parent.mkdir()
    path.write_text(EXAMPLE)
    found = mutations(tmp_path, path)
    assert [(m.line, m.key) for m in found] == [
        (5, "i < n -> true"),
        (5, "x[i] >= 0 -> true"),
        (5, "min(kMost, max(0, n - i)) -> kMost"),
        (5, "max(0, n - i) -> n - i"),
        (10, "gpu::copy_wait<0>() -> nothing"),
        (11, "__syncthreads() -> nothing"),
    ]
    text = plant(EXAMPLE, found, 7)
    assert "(planted::active(7) ? (true) : (i < n))" in text
    assert "(planted::active(9) ? (kMost) : (min(kMost, (planted::active(10) ? (n - i) : (max(0, n - i))))))" in text
    assert text.count("\n") == EXAMPLE.count("\n")
    moved = plant(EXAMPLE, [replace(found[4], put="__syncthreads()", also=(found[5],))], 3)
    assert "(planted::active(3) ? (__syncthreads()) : (gpu::copy_wait<0>()));" in moved
    assert "(planted::active(3) ? (void()) : (__syncthreads()));" in moved
    code = visible(EXAMPLE)
    assert "a < b" not in code
    assert "asm" not in code
    assert closing("f(a, (b))", 1) == 8
