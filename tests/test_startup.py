"""What a command or an import loads: counted, because seconds depend on what else the machine does."""

import json
import subprocess
import sys

from made_folders import LABELS, config_of, keep, record_of

from keeplora._files import write_json
from keeplora.report import report_run
from keeplora.train.record import versions
from keeplora.train.workload import source_of

COMMANDS = ["", "demo", "run", "init", "compare", "report", "info"]
WANTED = {"filelock", "keeplora", "numpy", "safetensors", "torch", "tqdm", "typing_extensions"}
"""Packages that the library may load beside what torch does."""


def loaded(code, *, after=""):
    """The modules that ``code`` adds to those that ``after`` has loaded, in a process of its own."""
    lines = ["import sys", after, "before = set(sys.modules)", code, "print()", "print(*set(sys.modules) - before)"]
    program = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_waits_for_no_library():
    code = "\n".join(
        f"try: cli.main({json.dumps([*command.split(), '--help'])})\nexcept SystemExit: pass" for command in COMMANDS
    )
    modules = loaded(f"from keeplora import cli\n{code}")
    assert "keeplora.cli" in modules
    assert not {"torch", "numpy", "keeplora.ops"} & modules
    assert len(modules) < 150, "argparse and what it needs are 80 modules"


def test_the_version_waits_for_no_library():
    modules = loaded("from keeplora import cli\ntry: cli.main(['--version'])\nexcept SystemExit: pass")
    assert not {"torch", "numpy"} & modules


def test_importing_keeplora_is_next_to_nothing():
    assert loaded("import keeplora", after="import torch") <= {"keeplora", "keeplora._lazy", "keeplora._version"}


def test_the_method_loads_nothing_that_is_optional():
    modules = loaded("from keeplora import METHODS, KeepLora, create, load", after="import torch")
    packages = {module.partition(".")[0] for module in modules}
    strangers = {name for name in packages if name not in sys.stdlib_module_names and not name.startswith("_")} - WANTED
    assert not strangers
    assert not {module for module in modules if module.startswith(("torch._dynamo", "torch._inductor"))}


def test_printing_a_finished_run_again_loads_neither_model_nor_charts(tmp_path):
    config = config_of(tmp_path / "run")
    records = [record_of(label, seed) for label, seed in config.pairs()]
    keep(config, records)
    values = {**config.as_dict(), "data": "0123", "source": source_of(config), "versions": [versions()]}
    write_json(tmp_path / "run" / "config.json", values)
    table = report_run(config, records)
    settings = {"benchmark": "embedded", "methods": LABELS[1:], "seeds": [0, 1], "epochs": 1, "out": config.out}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (tmp_path / "run.toml").write_text("\n".join([*lines, "[method.keeplora]", "learning_rate = 2e-3", "r = 8"]))

    out = tmp_path / "printed.txt"
    modules = loaded(
        "from contextlib import redirect_stdout\nfrom keeplora import cli\n"
        f"with open({str(out)!r}, 'w') as file, redirect_stdout(file):\n"
        f"    assert cli.main(['run', {str(tmp_path / 'run.toml')!r}]) == 0"
    )
    assert out.read_text().strip() == table
    assert "keeplora.report.drawn" in modules
    assert not {"open_clip", "torchvision", "timm", "transformers", "matplotlib"} & modules
