"""A comparison of the module's own settings."""

import pytest


@pytest.fixture
def tiny(request, tmp_path):
    """A file with the settings that the test's module has in ``TINY``."""
    file = tmp_path / "tiny.toml"
    file.write_text(request.module.TINY)
    return str(file)
