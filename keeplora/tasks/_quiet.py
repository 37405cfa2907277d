"""What libraries say of themselves while a model is read, and nobody asked for, by their own switches."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["quiet_loading"]

_REGISTERING = "torch.utils._pytree"
"""Says at every import of torchao, which transformers does where it is installed, how torchao registers its enums."""


@contextmanager
def quiet_loading(*, warnings: bool = True) -> Iterator[None]:
    """transformers draws no bars for weights it reads; bars of downloads stay. All is as before afterwards.

    Args:
        warnings: Whether transformers' warnings are shown.
    """
    hub: Any = importlib.import_module("huggingface_hub.utils")  # comes with transformers
    theirs: Any = importlib.import_module("transformers.utils.logging")  # optional
    bars, downloads, verbosity = theirs.is_progress_bar_enabled(), not hub.are_progress_bars_disabled(), None
    theirs.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()
    if not warnings:
        verbosity = theirs.get_verbosity()
        theirs.set_verbosity_error()
    registering = logging.getLogger(_REGISTERING)
    level = registering.level
    registering.setLevel(logging.ERROR)
    try:
        yield
    finally:
        registering.setLevel(level)
        if verbosity is not None:
            theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()
