"""Ways in which a caller trades exactness of float32 products for speed; no function of ops and math may follow."""

from contextlib import contextmanager

import torch

MATMULS = {"cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}


def settings():
    """What every way below changes, as it is now."""
    return {
        "generic": torch.backends.fp32_precision,
        **{name: matmul.fp32_precision for name, matmul in MATMULS.items()},
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available()):
        yield


@contextmanager
def older():
    """torch.set_float32_matmul_precision: TF32 on a GPU, bfloat16 on a CPU that multiplies it."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def by_backend():
    """The attributes that torch recommends since 2.9. Read the older way, torch raises then."""
    MATMULS["cuda"].fp32_precision, MATMULS["mkldnn"].fp32_precision = "tf32", "bf16"
    try:
        yield
    finally:
        for matmul in MATMULS.values():
            matmul.fp32_precision = "none"


@contextmanager
def for_all():
    """One attribute, which the backends inherit."""
    for matmul in MATMULS.values():
        matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"


FASTER = {f.__name__: f for f in (autocast, older, by_backend, for_all)}
