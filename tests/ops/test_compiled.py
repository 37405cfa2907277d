"""A checkout without its compiled extension says what to do."""

import runpy
import sys
from pathlib import Path

import pytest

import keeplora


def test_a_missing_extension_is_explained(monkeypatch):
    source = Path(keeplora.__file__).parent / "ops" / "compiled.py"
    monkeypatch.delattr(keeplora, "_C")
    monkeypatch.setitem(sys.modules, "keeplora._C", None)
    with pytest.raises(
        ImportError, match=r"compiled extension must lie in .*start Python in another folder.*install -e"
    ):
        runpy.run_path(str(source))
