"""Whether these are the kernels that `make test-kernels` last proved: python tests/csrc/proof.py hash|check|write HASH

proved.txt holds the hash of all that the proof is about: csrc, its tests and CMakeLists.txt. `check` compares it with
the tree, exit status 1 if they differ; `write` is for `make test-kernels`, once all of it has passed on the sources of
that hash. Needs nothing but Python.
"""

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROVED = Path("tests", "csrc", "proved.txt")
CONTENT = ("CMakeLists.txt", "csrc", "tests/csrc")


def files(root):
    """What is hashed: all files in these places, but for prose, and what Python and this script leave there."""
    places = [root / place for place in CONTENT]
    found = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    left = {path for path in found if "__pycache__" in path.parts or path.suffix == ".md"} | {root / PROVED}
    return sorted((path for path in found if path not in left), key=lambda path: path.relative_to(root).as_posix())


def tree_hash(root=ROOT):
    """SHA-256 over the paths and contents, each behind its length, so that no two trees run together."""
    total = hashlib.sha256()
    for path in files(root):
        for part in (path.relative_to(root).as_posix().encode(), path.read_bytes()):
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def proved(root=ROOT):
    """The hash of the last proof, "" if there was none."""
    return (root / PROVED).read_text().strip() if (root / PROVED).exists() else ""


def write(tested, root=ROOT):
    if (now := tree_hash(root)) != tested:
        raise SystemExit(f"proof.py: {tested} was tested, and the tree is {now} now: test it again")
    (root / PROVED).write_text(f"{tested}\n")


def main(command, *arguments):
    if command == "hash":
        print(tree_hash())
    elif command == "write":
        write(*arguments)
    elif command == "check":
        if tree_hash() != proved():
            raise SystemExit(f"make test-kernels must prove the kernels anew, got sources other than those of {PROVED}")
        print("make test-kernels has proved these kernels")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["help"]))
