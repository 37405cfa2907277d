"""The wheel holds what a user needs, built without the CUDA part as on a machine without a toolkit."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_without_cuda_has_the_extension_and_the_data(tmp_path):
    # A copy, because setuptools builds in place; only what git would ship.
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "keeplora", "csrc", "setup.py", "pyproject.toml",
         "README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(tmp_path / "src")],
        check=True,
        env={**os.environ, "KEEPLORA_CUDA": "0"},
    )
    [wheel] = tmp_path.glob("keeplora-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert any(name.startswith("keeplora/_C.") and name.endswith(".so") for name in names)
    assert not any(name.startswith("keeplora/_cuda") for name in names)
    wanted = [name for name in files if name.startswith("keeplora/") and not name.endswith((".so", ".pyc"))]
    assert len(wanted) > 80
    assert not set(wanted) - names
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch>=2.11" in metadata
