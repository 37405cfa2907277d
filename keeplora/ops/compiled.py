"""Loads the compiled libraries: keeplora._C always, the CUDA kernels where torch has CUDA."""

from importlib.util import find_spec
from pathlib import Path

import torch

try:
    from keeplora import _C
    from keeplora._C import build_info
except ImportError as error:
    if find_spec("keeplora._C") is not None:
        raise
    # Where Python is started in a checkout, the checkout comes before the installed package.
    raise ImportError(
        f"keeplora: the compiled extension must lie in {Path(__file__).parents[1]}, got none. If that is a checkout "
        "and keeplora is installed, start Python in another folder; to run from the checkout, install it with "
        "pip install -e."
    ) from error

__all__ = ["build_info"]


def _load_cuda() -> None:
    built = build_info()["cuda"]
    if not isinstance(built, str) or torch.version.cuda is None:
        return  # every op then runs its reference
    extension = Path(_C.__file__)
    library = extension.with_name(extension.name.replace("_C", "_cuda", 1))
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"keeplora: {library.name} must load into this torch, built with CUDA {torch.version.cuda}; keeplora was "
            f"built with CUDA {built}: {error}. Rebuild keeplora against this torch, or with KEEPLORA_CUDA=0."
        ) from error


_load_cuda()
