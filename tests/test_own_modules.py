"""A benchmark and a method of the user's own, in the folder where the command is given: the installed script."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from keeplora import METHODS, comparison
from keeplora.compare.runs import check_settings
from keeplora.methods.settings import ConfigError
from keeplora.train.config import parse_config

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sysconfig.get_path("scripts")) / "keeplora"
RUN = (
    'benchmark = "my_tasks:workload"\nplugins = ["my_methods"]\nmethods = ["mine"]\nsteps = 2\nbatch_size = 16\n'
    "workers = 1\ntensorboard = false\n"
)
COMPARE = (
    'benchmark = "my_tasks:workload"\nbatch_size = 16\nworkers = 0\ntensorboard = false\n'
    "[budget.small]\nseeds = [0]\nsteps = 2\n[method.mine]\nlearning_rate = 1e-2\n"
)
METHOD = """
from keeplora import METHODS
from keeplora.methods.registry import Registered

plain = METHODS["lora"]
METHODS["mine"] = Registered(plain.build, plain.config, {"r": 2}, "a method of the user's own")
"""


@pytest.fixture
def folder(tmp_path):
    """Nothing but the user's files."""
    shutil.copy(ROOT / "tests" / "tiny_workload.py", tmp_path / "my_tasks.py")
    (tmp_path / "my_methods.py").write_text(METHOD)
    (tmp_path / "my.toml").write_text(RUN)
    (tmp_path / "table.toml").write_text(COMPARE)
    return tmp_path


def keeplora(folder, *arguments):
    """The console script, which has its own folder on sys.path and not the current one."""
    assert SCRIPT.is_file(), f"{SCRIPT} must be there: make setup installs the package"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def test_a_run(folder):
    """In a worker process, which finds both modules as well."""
    answer = keeplora(folder, "run", "my.toml", "--out", "out")
    assert answer.returncode == 0, answer.stderr
    assert [line.split()[0] for line in answer.stdout.splitlines()[3:5]] == ["zero-shot", "mine"]
    assert json.loads((folder / "out" / "config.json").read_text())["plugins"] == ["my_methods"]


def test_a_comparison(folder):
    """The plugin is named on the command line here."""
    asked = ["--benchmark", "table.toml", "--budget", "small", "--methods", "mine", "--out", "out"]
    answer = keeplora(folder, "compare", *asked, "--plugins", "my_methods")
    assert answer.returncode == 0, answer.stderr
    assert "2 methods x 1 seeds on my_tasks:workload" in answer.stderr
    assert "| mine |" in (folder / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (["no_such_module"], "plugins must be importable modules, got 'no_such_module': No module named"),
        ("my_methods", "plugins must be a list of modules, .* got 'my_methods'"),
        (["my methods"], "plugins must be a list of modules, .* got 'my methods'"),
        ([3], "plugins must be a list of modules, .* got 3"),
    ],
)
def test_wrong_plugins(plugins, message, tmp_path):
    values = {"benchmark": "embedded", "methods": ["lora"], "steps": 1, "plugins": plugins}
    with pytest.raises(ConfigError, match=message):
        check_settings(parse_config(values))
    file = tmp_path / "table.toml"
    file.write_text(f"benchmark = 'embedded'\nsteps = 1\nplugins = {json.dumps(plugins)}\n")
    with pytest.raises(ConfigError, match=message):
        comparison(file, methods=["lora"])


def test_a_defect_in_a_plugin_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        check_settings(parse_config({"benchmark": "e", "methods": ["lora"], "steps": 1, "plugins": ["broken_plugin"]}))


def test_plugins_join_and_decide_no_numbers(folder, monkeypatch):
    """A method more in a plugin leaves finished runs of the others as they are."""
    monkeypatch.syspath_prepend(folder)
    values = {"benchmark": "embedded", "methods": ["lora"], "steps": 1}
    plain, more = parse_config(values), parse_config({**values, "plugins": ["my_methods", "my_methods"]})
    assert more.plugins == ("my_methods",)
    assert plain.identity("lora", 0) == more.identity("lora", 0)
    assert more.changed(plain.as_dict()) == []
    try:
        check_settings(more)
        assert METHODS["mine"].defaults == {"r": 2}
    finally:
        METHODS.pop("mine", None)
        sys.modules.pop("my_methods", None)
