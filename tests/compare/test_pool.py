"""All runs of a configuration: workers agree with one process, failures are told, Ctrl-C leaves a resumable folder."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from keeplora._files import one_writer
from keeplora.compare.pool import Pool, WorkerError, _Worker
from keeplora.compare.runs import run_benchmark
from keeplora.methods.settings import ConfigError
from keeplora.train.config import override, parse_config
from keeplora.train.events import silent

ROOT = Path(__file__).parents[2]
VALUES = {
    "benchmark": "tiny_workload:workload",
    "methods": ["lora", "keeplora"],
    "epochs": 1,
    "batch_size": 16,
    "workers": 0,
    "tensorboard": False,
    "method": {
        "lora": {"r": 4, "alpha": 4.0, "learning_rate": 1e-2},
        "keeplora": {"r": 4, "alpha": 4.0, "learning_rate": 1e-2, "feature_energy": 0.5},
    },
}


def config_of(out, **changes):
    return parse_config({**VALUES, "out": str(out), **changes})


def numbers(records):
    timing = ("train_seconds", "switch_seconds", "evaluate_seconds", "inference_seconds", "peak_bytes")
    return [{k: v for k, v in dataclasses.asdict(record).items() if k not in timing} for record in records]


def group_is_empty(group):
    """Whether all processes of a group are gone; multiprocessing's own helper ends a moment after its parent."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_workers_give_the_numbers_of_one_process(tmp_path):
    events = []
    alone = run_benchmark(config_of(tmp_path / "alone"), console=events.append)
    assert [(r.label, r.seed) for r in alone] == [("zero-shot", 0), ("lora", 0), ("keeplora", 0)]
    together = run_benchmark(config_of(tmp_path / "together", workers=2), console=events.append)
    assert numbers(alone) == numbers(together)
    learned = [(event.label, event.task) for event in events if event.kind == "learned"]
    assert sorted(learned) == sorted(
        [(label, task) for label in ("zero-shot", "lora", "keeplora") for task in range(3)] * 2
    )
    certificates = [event.certificate for event in events if event.kind == "learned" and event.label == "keeplora"]
    assert all("leak" in text for text in certificates)
    assert any(event.kind == "step" and event.steps == 3 for event in events)


def test_more_methods_and_seeds_join_the_finished_ones(tmp_path):
    few = config_of(tmp_path, methods=["lora"])
    run_benchmark(few, console=lambda event: None)
    started = []
    more = override(config_of(tmp_path), seeds=(0, 1))
    records = run_benchmark(more, console=lambda event: started.append(event) if event.kind == "task" else None)
    assert [(r.label, r.seed) for r in records] == more.pairs()
    assert {(event.label, event.seed) for event in started} == set(more.pairs()) - {("zero-shot", 0), ("lora", 0)}


def test_a_changed_config_is_refused_before_anything_runs(tmp_path):
    config = config_of(tmp_path, methods=["lora"])
    run_benchmark(config, console=lambda event: None)
    with pytest.raises(ConfigError, match=r"2 results .*\n.*made with other settings \(epochs changed\)"):
        run_benchmark(override(config, epochs=2), console=lambda event: None)
    other = {"lora": {**VALUES["method"]["lora"], "r": 2}}
    with pytest.raises(ConfigError, match=r"method changed"):
        run_benchmark(config_of(tmp_path, methods=["lora"], method=other), console=lambda event: None)
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 1


def test_other_data_in_the_same_folder_is_refused(tmp_path):
    config = config_of(tmp_path, methods=["lora"])
    run_benchmark(config, console=lambda event: None)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert len(saved["data"]) == 16
    file.write_text(json.dumps({**saved, "data": "0" * 16}))
    with pytest.raises(ConfigError, match="the data changed"):
        run_benchmark(config, console=lambda event: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["lorra"]}, "got 'lorra'. Did you mean 'lora'"),
        ({"method": {"lorra": {}}}, r"\[method.lorra\] must name a method of this run .* Did you mean 'lora'"),
        ({"method": {"lora": {"rank": 3}}}, "settings of lora must suit lora: .* 'rank'"),
        ({"method": {"lora": {"r": 0}}}, "settings of lora must suit lora: LoraConfig: r must be"),
        ({"method": {"keeplora": {"r": 33}}}, "r must be at most the layer's width"),
        ({"benchmark": "embeded"}, r"benchmark must .* got 'embeded'\. Did you mean 'embedded'"),
        ({"benchmark": "tiny_workload:nothing"}, "must name a function of tiny_workload, got 'nothing'"),
        ({"benchmark": "no_such_module:workload"}, "'no_such_module:workload' must be importable"),
        ({"benchmark": "builtins:str"}, "must return a Workload, got str"),
    ],
)
def test_wrong_methods_settings_and_benchmarks(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_benchmark(config_of(tmp_path, **changes), console=lambda event: None)
    assert not (tmp_path / "config.json").exists()


def test_a_failing_run_stops_all_and_names_itself(tmp_path):
    config = config_of(tmp_path, benchmark="tiny_workload:broken", methods=["lora"], workers=1)
    with pytest.raises(WorkerError, match=r"lora, seed 0 failed(.|\n)*NonFiniteLossError(.|\n)*task 2"):
        run_benchmark(config, console=lambda event: None)
    assert (tmp_path / "runs" / "lora" / "seed-0" / "state" / "state.json").is_file()


def test_a_killed_worker_is_named_with_its_signal(tmp_path):
    config = config_of(tmp_path, benchmark="tiny_workload:dying", methods=["lora"], workers=1)
    with pytest.raises(WorkerError, match=r"(lora|zero-shot), seed 0 must finish, .* SIGKILL"):
        run_benchmark(config, console=lambda event: None)


def left_alone(pipe):
    """A worker whose child keeps the pipe, as one that loads data would."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    pipe.send("ready")
    signal.pause()


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_a_dead_worker_is_noticed_within_two_seconds(tmp_path, kind, code):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=left_alone, args=(theirs,), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    pool = Pool(config_of(tmp_path), [], silent, [_Worker(process, ours, ("lora", 3))])
    threading.Timer(0.2, os.kill, (process.pid, kind)).start()
    started = time.monotonic()
    with pytest.raises(WorkerError, match=f"lora, seed 3 .* {kind.name}"):
        pool.listen(deque())
    assert time.monotonic() - started < 2
    assert process.exitcode == code


def test_a_full_disk_in_a_worker_is_one_sentence(tmp_path):
    (tmp_path / "runs" / "zero-shot").mkdir(parents=True)
    (tmp_path / "runs" / "zero-shot" / "seed-0").touch()  # a file where a folder should be stands in for it
    config = config_of(tmp_path, methods=["zero-shot"], workers=1)
    with pytest.raises(WorkerError, match=r"zero-shot, seed 0 failed: write: .*seed-0") as caught:
        run_benchmark(config, console=lambda event: None)
    assert "\n" not in str(caught.value)


def begun(tmp_path):
    """A run of two workers from the shell, in a process group of its own, in the middle of the second task."""
    slow = tmp_path / "slow.toml"
    slow.write_text(
        'benchmark = "tiny_workload:slow"\nmethods = ["lora", "keeplora"]\nepochs = 1\nbatch_size = 16\n'
        "workers = 2\ntensorboard = false\n"
        "[method.lora]\nr = 4\n[method.keeplora]\nr = 4\nfeature_energy = 0.5\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "keeplora", "run", str(slow), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for background jobs
    )  # fmt: skip
    state = out / "runs" / "keeplora" / "seed-0" / "state" / "state.json"
    deadline = time.monotonic() + 600  # three processes import torch, beside whatever else runs
    while not state.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process, out, state


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_to_the_command_alone_ends_all(tmp_path, kind, code):
    process, out, state = begun(tmp_path)
    os.kill(process.pid, kind)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert group_is_empty(process.pid)
    assert "Traceback" not in errors
    assert "leaked" not in errors
    assert state.is_file()
    with one_writer(out, patience=0):  # nobody holds it
        pass


def test_ctrl_c_stops_the_workers_and_the_folder_resumes(tmp_path):
    """SIGINT to the whole process group, as a terminal sends it, in the middle of the second task."""
    process, out, state = begun(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "stopped. The same command continues" in errors
    assert "Traceback" not in errors
    assert "leaked" not in errors
    assert group_is_empty(process.pid)
    assert state.is_file()
    assert not (out / "summary.json").exists()

    resumed = []
    values = {**VALUES, "benchmark": "tiny_workload:slow", "out": str(out), "tensorboard": False}
    values["method"] = {"lora": {"r": 4}, "keeplora": {"r": 4, "feature_energy": 0.5}}
    records = run_benchmark(parse_config(values), console=resumed.append)
    assert ("resumed", "keeplora") in {(event.kind, event.label) for event in resumed}
    whole = run_benchmark(parse_config({**values, "out": str(tmp_path / "whole")}), console=lambda event: None)
    assert numbers(records) == numbers(whole)
