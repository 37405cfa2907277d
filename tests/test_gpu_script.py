"""bench/gpu.sh, as far as it can be tried without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, run, sanitize, stages, table
from bench.harness import Case, Row

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", out],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no CUDA GPU that torch can use, so nothing was built, tested or measured" in done.stderr
    assert not out.exists()


def python(code):
    return [sys.executable, "-c", code]


def test_a_stage_cannot_eat_the_others(tmp_path, capsys):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    alone = [
        stages.Stage("first", 20, python("import os; print('said', os.environ['GIVEN'])"), {"GIVEN": "this"}),
        stages.Stage("slow", 1, python(child)),
        stages.Stage("broken", 20, python("print('why it broke'); raise SystemExit(3)")),
        stages.Stage("absent", 20, ["no-such-program-anywhere", "--tool"]),
        stages.Stage("hopeless", 20, python("print(1)"), needs="broken"),
        stages.Stage("last", 20, python("print(2)"), needs="first"),
    ]
    results = stages.run_stages([[stage] for stage in alone], tmp_path, seconds=60)
    assert time.monotonic() - begin < 30
    assert [result.outcome.split(" [")[0] for result in results[:3]] == [
        "ok",
        "FAILED: not done after 1 s",
        "FAILED: exit status 3",
    ]
    assert results[3].outcome.startswith("FAILED: cannot be started: ")
    assert [result.outcome for result in results[4:]] == ["not run: broken failed", "ok"]
    assert "said this" in (tmp_path / "first.log").read_text()
    assert "why it broke" in capsys.readouterr().out
    written = stages.summary(results)
    assert [line.split()[0] for line in written.splitlines()] == [*(result.name for result in results), "4"]
    assert "4 of 6 stages are not ok" in written


def test_all_stages_have_one_time_limit(tmp_path):
    two = [[stages.Stage(name, 60, python("import time; time.sleep(60)"))] for name in ("one", "two")]
    results = stages.run_stages(two, tmp_path, seconds=1)
    assert [result.outcome for result in results] == [
        "FAILED: not done after 1 s",
        "not run: the 1 s for all stages are over",
    ]
    assert "every stage is ok" in stages.summary([stages.Result("one", "ok", 1.0)])


def test_stages_of_a_group_run_at_the_same_time_and_groups_one_after_another(tmp_path):
    """Each of a pair waits for the other's file; the third finds both."""

    def meet(own, other):
        code = f"""
import pathlib, time
pathlib.Path({str(tmp_path / own)!r}).touch()
while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)
"""
        return stages.Stage(own, 30, python(code))

    after = stages.Stage("after", 20, python(f"import os; assert len(os.listdir({str(tmp_path)!r})) == 5"))
    reported = []
    results = stages.run_stages(
        [[meet("a", "b"), meet("b", "a")], [after]], tmp_path, seconds=60,
        report=lambda results: reported.append([result.name for result in results]),
    )  # fmt: skip
    assert all(result.outcome == "ok" for result in results), results
    assert reported == [["a", "b"], ["a", "b", "after"]]


def test_what_an_earlier_run_has_done_is_left_out(tmp_path):
    fails = python("raise SystemExit(1)")
    groups = [
        [stages.Stage("build", 20, python(""), always=True)],
        [stages.Stage("done", 20, fails)],
        [stages.Stage("new", 20, python(""), needs="done")],
    ]
    results = stages.run_stages(groups, tmp_path, seconds=60, done=["build", "done"])
    assert [result.outcome for result in results] == ["ok", "ok, in an earlier run", "ok"]
    assert "every stage is ok" in stages.summary(results)


def found(rehearse=False):
    return {stage.name: stage for group in gpu.stages("90a", rehearse=rehearse) for stage in group}


def test_the_stages_of_a_gpu():
    """What counts most comes first, and comes to its end whatever it needs; what is timed runs alone."""
    groups = gpu.stages("90a")
    assert [stage.name for stage in groups[0]] == ["build", "conformance"]
    assert [group[0].name for group in groups[1:6]] == ["ceilings", "large", "step", "layers", "kernels"]
    assert sum(max(stage.seconds for stage in group) for group in groups[:6]) <= gpu.SECONDS
    together = [[stage.name for stage in group] for group in groups if len(group) > 1]
    assert together == [["build", "conformance"], list(gpu.SANITIZERS)]
    assert gpu.SECONDS < 10 * 60
    for stage in found().values():
        for word in (word for part in stage.command for word in part.split()):
            if word.startswith(("tests/", "csrc/", "bench/")):
                assert (ROOT / word).exists(), word
    for parts in (gpu.LEFT_OUT, *gpu.NEED.values()):
        assert all((ROOT / "tests" / part).exists() for part in parts)


def test_every_benchmark_stage_measures_something(monkeypatch):
    """With the arguments the stages give, and inputs of the tests' sizes; in a rehearsal, on a CPU."""
    asked = []
    monkeypatch.setattr(run, "measure", lambda cases, *_: iter([asked.append((stage.name, cases))][:0]))
    measuring = [stage for stage in found(rehearse=True).values() if "bench.run" in stage.command]
    for stage in measuring:
        monkeypatch.setattr(sys, "argv", ["bench.run", *stage.command[3:]])
        with pytest.raises(SystemExit, match="0"):
            run.main()
    assert [name for name, _ in asked] == [stage.name for stage in measuring]
    providers = {name: {p for case in cases for p in case.providers} for name, cases in asked}
    assert not any("torch.compile" in p for name in providers if name != "compiled" for p in providers[name])
    assert any("torch.compile" in p for p in providers["compiled"])
    known = {case.id for case in run.all_cases()} - {"B10"}
    assert {case.id for _, cases in asked for case in cases} == known


def test_a_rehearsal_has_the_same_stages(tmp_path):
    real, rehearsed = found(), found(rehearse=True)
    assert real.keys() == rehearsed.keys()
    assert not any(word == "cuda" for stage in rehearsed.values() for word in stage.command)
    assert all(stage.needs == rehearsed[name].needs for name, stage in real.items())


def test_suite_leaves_out_what_a_bare_machine_cannot_import(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    suite = found()["suite"]
    assert "--ignore=tests/train" in suite.command
    asks = {path for path in (ROOT / "tests").rglob("*.py") if "open_clip" in path.read_text()} - {Path(__file__)}
    asks |= {path for path in (ROOT / "tests").rglob("*.py") if "import tiny_workload" in path.read_text()}
    gone = {ROOT / argument.removeprefix("--ignore=") for argument in suite.command if argument.startswith("--ignore=")}
    kept = [path for path in asks if not gone & {path, *path.parents}]
    named_only = {f"test_{name}.py" for name in ("layers", "public", "api_page", "gpu_script", "startup")}  # as text
    assert {path.name for path in kept} <= {"tiny_workload.py", *named_only}


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    gpu.WORK.mkdir()
    return gpu.WORK


def test_what_a_run_writes_is_five_files_and_a_later_run_adds_to_it(tmp_path, work):
    rows = {"machine": MACHINE, "rows": [dataclasses.asdict(row) for row in ROWS[:3]], "not_measured": []}
    (work / "kernels.json").write_text(json.dumps(rows))
    (work / "ceilings.json").write_text(json.dumps({"copy_GBs": 4300.0}))
    (work / "kernels.log").write_text("what it said")
    first = [
        stages.Result("ceilings", "ok", 1.0),
        stages.Result("kernels", "ok", 1.0),
        stages.Result("suite", "FAILED", 1),
    ]
    gpu.write(tmp_path / "one", first, "abc", {})
    names = ["done.json", "logs.tar.gz", "results.json", "summary.txt", "table.md"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    text = (tmp_path / "one" / "table.md").read_text()
    assert "* copy_GBs: 4300.0" in text
    assert "**B4** case one" in text
    assert "commit abc" in (tmp_path / "one" / "summary.txt").read_text()
    with tarfile.open(tmp_path / "one" / "logs.tar.gz") as logs:
        assert logs.extractfile("kernels.log").read() == b"what it said"

    done, earlier = gpu.done_before(tmp_path / "one", "abc")
    assert done == ["ceilings", "kernels"]
    for path in work.iterdir():
        path.unlink()
    (work / "suite.log").write_text("passed")
    again = [*(stages.Result(name, stages.EARLIER, 0.0) for name in done), stages.Result("suite", "ok", 1.0)]
    gpu.write(tmp_path / "two", again, "abc", earlier)
    assert (tmp_path / "two" / "table.md").read_text() == text
    assert json.loads((tmp_path / "two" / "done.json").read_text())["stages"] == ["ceilings", "kernels", "suite"]


def test_a_run_of_another_commit_is_not_continued(tmp_path, work, capsys):
    gpu.write(tmp_path, [stages.Result("suite", "ok", 1.0)], "abc", {})
    assert gpu.done_before(tmp_path, "def") == ([], {})
    assert "is of commit abc, and this is def: every stage is run" in capsys.readouterr().out
    assert gpu.done_before(None, "def") == ([], {})


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 0), "120")]
)
def test_arch(capability, arch):
    assert gpu.arch_of(*capability) == arch


ROWS = [
    Row("B4", "case one", "keeplora", 0.002, 0.0019, 0.0021, 30, 2**20, 4_000_000, 8_000_000_000),
    Row("B4", "case one", "loop", 0.007, 0.0065, 0.0075, 30, 2**21, 4_000_000, 8_000_000_000),
    Row("B4", "case one", "copy (ceiling)", 0.001, 0.001, 0.001, 30, 0, 4_000_000, 8_000_000_000),
    Row("B5", "case two", "keeplora", 0.5, 0.4, 0.6, 3, 0, 0, 0),
]
MACHINE = {
    "command": "python -m bench.run kernels", "commit": "abc", "torch": "2.11", "cpu": "a CPU", "threads": 1,
    "gpu": "NVIDIA H200", "cuda": "13.0", "driver": "580.1", "clock_sm": "1980 MHz", "clock_memory": "3201 MHz",
}  # fmt: skip


def test_table_has_the_machine_and_every_row():
    text = table.markdown({"machine": MACHINE, "rows": [dataclasses.asdict(row) for row in ROWS]})
    for fact in ("NVIDIA H200", "driver 580.1", "SM clock 1980 MHz", "torch 2.11", "CUDA 13.0", "Commit abc"):
        assert fact in text
    assert "`python -m bench.run kernels`" in text
    assert "**B4** case one, 30 repeats" in text
    assert "| loop | 7.000 ms | 6.500 to 7.500 ms | 3.50 | 2.0 MiB | 0.6 GB/s, 1142.9 GFLOP/s |" in text
    assert "| copy (ceiling) | 1.000 ms | 1.000 to 1.000 ms | 0.50 | 0.0 MiB | 4.0 GB/s |" in text
    assert "**B5** case two, 3 repeats" in text
    assert text.count("| keeplora |") == 2
    assert "3.50x" in table.text(ROWS[:3])


def test_nvidia_smi_is_asked_for_driver_and_clocks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.gpu_state() == {}
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.159.04, 1980 MHz, 1980 MHz, 3201 MHz, 700.00 W'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert run.gpu_state() == {
        "driver": "580.159.04",
        "clock_sm": "1980 MHz",
        "clock_sm_max": "1980 MHz",
        "clock_memory": "3201 MHz",
        "power_limit": "700.00 W",
    }


def test_commit_says_when_files_differ(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@e", *arguments], cwd=tmp_path, check=True)

    assert run.commit(tmp_path) == "unknown"
    git("init", "--quiet")
    assert run.commit(tmp_path) == "unknown"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    name = run.commit(tmp_path)
    assert len(name) == 40
    (tmp_path / "file").write_text("2")
    assert run.commit(tmp_path) == f"{name}, with changes"


def test_a_case_that_fails_does_not_hide_the_others():
    def absent():
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    calls = {"works": lambda: torch.ones(3), "breaks": lambda: 1 / 0, "lacks": absent}
    cases = [Case("B4", name, lambda device: (), {"keeplora": call}) for name, call in calls.items()]
    *_, last = run.measure([*cases, cases[0]], torch.device("cpu"), 0.01)
    assert [row["case"] for row in last["rows"]] == ["works", "works"]
    assert [(missing["case"], missing["needs"]) for missing in last["not_measured"]] == [
        ("breaks: keeplora", ""),
        ("lacks: keeplora", "peft"),
    ]
    text = table.markdown(last)
    assert "**B4** breaks: keeplora: not measured, ZeroDivisionError" in text
    assert "**B4** lacks: keeplora: not measured, needs peft" in text


def test_a_provider_that_fails_does_not_hide_the_others():
    providers = {"keeplora": lambda: torch.ones(3), "captured": lambda: 1 / 0, "plain": lambda: torch.ones(3)}
    [result] = run.measure([Case("B4", "case", lambda device: (), providers)], torch.device("cpu"), 0.01)
    assert [row["provider"] for row in result["rows"]] == ["keeplora", "plain"]
    assert [missing["case"] for missing in result["not_measured"]] == ["case: captured"]
    assert "**B4** case: captured: not measured, ZeroDivisionError" in table.markdown(result)


def test_groups_of_benchmarks():
    known = {"B2", "B3", "B4", "B6"}
    assert run.chosen_ids([], known) == known
    assert run.chosen_ids(["kernels"], known) == {"B4", "B6"}
    assert run.chosen_ids(["systems", "B4"], known) == {"B2", "B3", "B4"}
    with pytest.raises(ValueError, match="no benchmark B9; there are B2, B3, B4, B6, kernels, systems"):
        run.chosen_ids(["B9"], known)


def test_sanitizer_program_runs_every_op(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.sanitize", "--device", "cpu"])
    sanitize.main()
    assert capsys.readouterr().out.count("as expected") == len(sanitize.OPS)


def test_sanitizer_program_sees_a_wrong_result():
    op = dataclasses.replace(sanitize.OPS["gram"], reference=lambda out, energy, x: None)
    with pytest.raises(AssertionError, match="gram"):
        sanitize.check(op, torch.device("cpu"))
