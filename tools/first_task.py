"""How long it takes from a wheel to a first trained task, in an environment that has torch and nothing else.

`python -m tools.first_task dist/keeplora-….whl` makes one for each of two jobs: the folders of images of
docs/first-steps.md with a small open_clip model, and the model of docs/vlm.md. `python -m tools.first_task .` does the
same from source. torch and torchvision, with what they require, are links to those of this Python. All else comes from
the package index, without a cache. Each step is a row: seconds that passed, CPU seconds, megabytes installed.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_path("purelib"))
EXTRAS = {"images": "[demo,datasets,peft]", "vlm": "[vlm]"}
"""As the two pages install keeplora."""
MODEL = """
import json, sys
from pathlib import Path
import open_clip, torch
from safetensors.torch import save_file

folder = Path("model")
folder.mkdir()
towers = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
settings = {"model_cfg": towers, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
(folder / "open_clip_config.json").write_text(json.dumps(settings))
towers["vision_cfg"] = open_clip.CLIPVisionCfg(**towers["vision_cfg"])
towers["text_cfg"] = open_clip.CLIPTextCfg(**towers["text_cfg"])
save_file(open_clip.model.CLIP(**towers).state_dict(), folder / "open_clip_model.safetensors")
"""
IMAGES = """
import numpy as np
from PIL import Image
from pathlib import Path

rng = np.random.default_rng(0)
for task, names in {"birds": ["wren", "barn_owl"], "cars": ["fiat_500", "audi_tt"]}.items():
    for name in names:
        Path("data", task, name).mkdir(parents=True)
        colour = rng.integers(60, 200, 3)
        for number in range(50):
            pixels = (colour + rng.normal(0, 25, (64, 48, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(Path("data", task, name, f"{number}.jpg"))
"""


def required(*names: str) -> set[str]:
    """The distributions that these need here, themselves among them."""
    found: set[tuple[str, str]] = set()
    waiting = [(name, "") for name in names]
    while waiting:
        name, extra = one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        for need in map(Requirement, metadata.requires(name) or ()):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(need.name), part) for part in ("", *need.extras)]
    return {name for name, _ in found}


def parts(names: Sequence[str]) -> Iterator[Path]:
    """Files and folders of site-packages that these distributions consist of, each once."""
    tops = {file.parts[0] for name in names for file in metadata.files(name) or () if not file.is_absolute()}
    return (SITE / top for top in sorted(tops - {"..", "__pycache__"}))


def size(folder: Path) -> int:
    """Bytes below ``folder``; what links lead to does not count."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


class Trial:
    """An environment of its own, and a row for each thing that is done in it."""

    def __init__(self, place: Path):
        venv.create(place / "venv", with_pip=True)
        self.place, self.rows = place, list[tuple[str, float, float, str]]()
        [self.site] = (place / "venv").glob("lib/python*/site-packages")
        for part in parts(sorted(required("torch", "torchvision"))):
            if not (self.site / part.name).exists():
                (self.site / part.name).symlink_to(part)

    def call(self, title: str, *words: str, until: str = "") -> str:
        """Run this environment's Python; with ``until`` a row, too, for the first line that holds it."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
        before, began, told = size(self.site), time.monotonic(), []
        spent = _spent()
        command = [str(self.place / "venv/bin/python"), *words]
        with subprocess.Popen(
            command, cwd=self.place, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                told.append(line)
                if until and until in line:
                    self.rows.append((f"{title}, until “{until}”", time.monotonic() - began, float("nan"), ""))
                    until = ""
        text = "".join(told)
        if running.returncode or until:
            raise SystemExit(f"first_task: {title} must end well, got {running.returncode}:\n{text}")
        grown = size(self.site) - before
        self.rows.append((title, time.monotonic() - began, _spent() - spent, f"{grown / 1e6:.1f}" if grown else ""))
        return text


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def images(trial: Trial) -> None:
    """The four commands of docs/first-steps.md, of two tasks, with KeepLoRA alone."""
    trial.call("(made: model and images)", "-c", MODEL + IMAGES)
    trial.call("keeplora init", "-m", "keeplora", "init", "data", "--model", "local-dir:model")
    trial.call("keeplora run --dry-run", "-m", "keeplora", "run", "tasks.toml", "--dry-run")
    command = ("-m", "keeplora", "run", "tasks.toml", "--methods", "keeplora", "--workers", "0", "--export")
    trial.call("keeplora run --export", *command, until="task 1/2")
    trial.call("the same again", *command[:-1])


def vlm(trial: Trial) -> None:
    """The first block of docs/vlm.md: a small LLaVA learns a task, merges it and generates."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/vlm.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    trial.call("first block of docs/vlm.md", "-c", block[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and bytes from a wheel, or from source, to a first task.")
    parser.add_argument("source", help="a wheel, or . for a checkout")
    parser.add_argument("--jobs", nargs="+", choices=EXTRAS, default=list(EXTRAS), help="default: both")
    asked = parser.parse_args()
    source = str(Path(asked.source).resolve())
    for job in asked.jobs:
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(Path(folder))
            trial.call("pip install", "-m", "pip", "install", "--no-cache-dir", source + EXTRAS[job])
            loaded = trial.call(
                "import keeplora", "-c", "import json, keeplora.ops as o; print(json.dumps(o.build_info()))"
            )
            images(trial) if job == "images" else vlm(trial)
            kernels = json.loads(loaded.splitlines()[-1])["cpu_kernels"]
            print(f"\n{job}: pip install {Path(source).name}{EXTRAS[job]}")
            print(f"kernels for the CPU: {', '.join(kernels) if kernels else 'none'}\n")
            print(f"{'':<44}{'s':>8}{'CPU s':>8}{'MB':>9}")
            for title, passed, spent, grown in trial.rows:
                print(f"{title:<44}{passed:>8.1f}{'' if spent != spent else f'{spent:.1f}':>8}{grown:>9}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
