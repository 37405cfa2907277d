"""What results were made of: a hash of files and versions, known before anything of them is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from keeplora._files import sha256

__all__ = ["made_of", "version"]

_PACKAGE = Path(__file__).parent
_NO_SOURCE = ("__pycache__", ".so", ".pyc")


def made_of(packages: Iterable[str], files: Iterable[Path] = (), *more: object) -> str:
    """A hash of every source and data file of keeplora, of ``files``, of versions, and of what else is given.

    It costs milliseconds for keeplora's own 15 MB, and nothing is imported.
    """
    digest = hashlib.sha256()
    for file in [*sorted(_sources()), *files]:
        name = file.relative_to(_PACKAGE).as_posix() if file.is_relative_to(_PACKAGE) else file.name
        digest.update(f"{name} {sha256(file)}\n".encode())
    for package in packages:
        digest.update(f"{package} {version(package)}\n".encode())
    for one in more:
        digest.update(f"{one}\n".encode())
    return digest.hexdigest()


def _sources() -> Iterable[Path]:
    for file in _PACKAGE.rglob("*"):
        if file.is_file() and not any(part.endswith(_NO_SOURCE) for part in file.relative_to(_PACKAGE).parts):
            yield file


def version(package: str) -> str | None:
    """The version of an installed distribution, None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
