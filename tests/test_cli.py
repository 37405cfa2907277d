"""The command line, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keeplora import cli
from keeplora.methods import METHODS
from keeplora.train.config import load_config, shipped_configs

ROOT = Path(__file__).parents[1]
TINY = (
    'benchmark = "tiny_workload:workload"\nmethods = ["lora", "keeplora"]\nseeds = [0, 1]\nepochs = 1\n'
    "batch_size = 16\nworkers = 0\ntensorboard = false\n[method.keeplora]\nr = 4\nfeature_energy = 0.5\n"
)


def keeplora(*arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "keeplora", *arguments], env=env, capture_output=True, text=True)


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return str(file)


def test_help_shows_commands_and_examples():
    answer = keeplora("--help")
    assert answer.returncode == 0
    for word in ("demo", "run", "init", "compare", "report", "plan", "info", "examples:", "Ctrl-C"):
        assert word in answer.stdout


@pytest.mark.parametrize("command", ["demo", "run", "init", "compare", "report", "plan", "info"])
def test_help_of_every_command(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"keeplora {command}" in shown
    assert command in ("info", "init", "report", "plan") or "--methods" in shown
    assert max(map(len, shown.splitlines())) <= 90  # descriptions are wrapped as options are


def test_a_run_from_the_shell(tiny, tmp_path):
    out = tmp_path / "out"
    answer = keeplora("run", tiny, "--out", str(out), "--methods", "keeplora")
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["zero-shot", "keeplora"]
    assert f"chart: {out / 'demo.png'}" in lines
    # not a terminal: a line for every task and its certificate, no moving bars
    assert sum(" task " in line and "% · mean" in line for line in answer.stderr.splitlines()) == 2 * 3
    assert sum("leak" in line for line in answer.stderr.splitlines()) == 2 * 3
    assert sum("is free; room for" in line for line in answer.stderr.splitlines()) == 2 * 3
    assert "room left by keeplora, seed" in answer.stdout
    assert "\r" not in answer.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert summary["certificates"]["keeplora"]["leak"] <= 1e-6


def test_the_same_command_again_computes_nothing(tiny, tmp_path, capsys, monkeypatch):
    arguments = ["run", tiny, "--out", str(tmp_path / "out"), "--methods", "lora"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    monkeypatch.setattr("keeplora.compare.runs.refusal", None)  # it would load the model, which takes seconds
    assert cli.main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert again.err.count("already finished") == 4
    assert "task" not in again.err.replace("already finished", "")


def test_demo_takes_its_options(monkeypatch):
    seen = []
    monkeypatch.setattr("keeplora.compare.runs.run_benchmark", lambda config, **options: seen.append(config) or [])
    monkeypatch.setattr("keeplora.report.report_run", lambda config, records: "the table")
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--seeds", "1", "--out", "x", "--workers", "4", "--methods", "lora", "keeplora++"]) == 0
    plain, changed = seen
    assert (plain.out, plain.seeds) == ("runs/demo", (0, 1, 2))
    assert (changed.out, changed.seeds, changed.workers) == ("x", (0,), 4)
    assert changed.labels() == ("zero-shot", "lora", "keeplora++")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.toml"], "quick, ucit, x-tail, got 'nothing.toml'"),
        (["demo", "--methods", "kepplora"], "got 'kepplora'. Did you mean 'keeplora'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, arguments, message):
    out = ["--out", str(tmp_path / "out")]
    assert cli.main([*arguments, *out]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["demo", "--seeds", "0"], "must be a whole number >= 1, got 0"),
        (["demo", "--seeds", "x"], "must be a whole number >= 1, got x"),
        (["demo", "--workers", "-1"], "must be a whole number >= 0, got -1"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_bad_arguments_are_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_changed_config_is_refused(tiny, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["run", tiny, "--out", out, "--methods", "lora"]) == 0
    Path(tiny).write_text(TINY.replace("epochs = 1", "epochs = 2"))
    capsys.readouterr()
    assert cli.main(["run", tiny, "--out", out, "--methods", "lora"]) == 2
    assert "other settings (epochs changed)" in capsys.readouterr().err


def test_a_damaged_folder_is_exit_code_2(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{")
    assert cli.main(["run", tiny, "--out", str(tmp_path / "out")]) == 2
    assert "config.json must be JSON" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def stop(config, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("keeplora.compare.runs.run_benchmark", stop)
    assert cli.main(["run", "quick"]) == 130
    assert "same command continues" in capsys.readouterr().err


def test_a_defect_is_not_disguised_as_bad_input(monkeypatch):
    def broken(config, **options):
        raise ValueError("a bug")

    monkeypatch.setattr("keeplora.compare.runs.run_benchmark", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["run", "quick"])


def test_info_names_what_is_there(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for name in (
        *METHODS,
        *shipped_configs(),
        "embedded",
        "minilm",
        "clip-b16",
        "comparisons",
        "torch",
        "CUDA",
        "project_rows",
        "kernels",
        "thin_matmul (CPU kernel)",
        "gram (reference)",
    ):
        assert name in shown


def test_init_writes_a_file_that_run_reads(tmp_path, monkeypatch, capsys):
    from own_folders import classes

    classes(tmp_path / "birds", {"owl": 5, "tit": 5})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "birds", "--out", "my birds.toml"]) == 0
    shown = capsys.readouterr().out
    assert '"birds": train 10, 2 classes' in shown
    assert shown.endswith("Next: keeplora run 'my birds.toml' --dry-run\n")
    assert load_config("my birds.toml").own.tasks[0].folder == "birds"
    assert cli.main(["init", "birds", "--out", "my birds.toml"]) == 2
    assert "Add --force" in capsys.readouterr().err
    assert cli.main(["init", "birds", "--out", "my birds.toml", "--force", "--model", "ViT-L-14"]) == 0
    assert load_config("my birds.toml").own.model.open_clip == "ViT-L-14"
    assert cli.main(["init", "gone"]) == 2
    assert "folder must be a folder that exists, got 'gone'" in capsys.readouterr().err


def test_help_waits_for_no_torch():
    code = """
import sys
from keeplora.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("keeplora 0.")


def test_a_misspelled_learning_rate_is_told_by_its_name(tmp_path, capsys):
    (tmp_path / "x.toml").write_text(
        'benchmark = "embedded"\nmethods = ["lora"]\nsteps = 1\n[method.lora]\nlearning_rat = 1e-3\n'
    )
    assert cli.main(["run", str(tmp_path / "x.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "got 'learning_rat'. Did you mean 'learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "nowhere.toml"], "keeplora: path must be a TOML file"),
        (["plan", "llava-1.5-7b", "--gpu", "H10"], "keeplora: gpu must be one whose rates are known, got 'H10'"),
        (["init", "nowhere"], "keeplora: folder must be a folder that exists, got 'nowhere'"),
        (["compare", "--benchmark", "embeded"], "keeplora: benchmark must be one of"),
    ],
)
def test_messages_name_no_function_that_was_not_typed(command, said, capsys):
    assert cli.main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)


def test_messages_keep_what_is_no_function(capsys):
    assert cli._complain(ValueError("KeepLoraConfig: r must be an int"), 2) == 2
    assert cli._complain(ValueError("tasks.toml: methods must be names"), 2) == 2
    assert capsys.readouterr().err == (
        "keeplora: KeepLoraConfig: r must be an int\nkeeplora: tasks.toml: methods must be names\n"
    )
