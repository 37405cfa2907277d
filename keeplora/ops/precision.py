"""Full float32 for the mathematics of subspaces, whatever the caller has switched on for speed."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "is_full_precision"]

_EXACT = ("ieee", "none")
_BACKENDS = ("cuda", "mkldnn")
_lock = threading.Lock()
_open = 0  # blocks, in all threads: the setting is one for the process
_opened = 0  # ever
_before: dict[str, str] = {}  # what the first of them found, for the last one to restore
_any_autocast = torch._C._is_any_autocast_enabled
_setting = torch._C._get_fp32_precision_getter  # the attribute that torch documents takes ten times as long to read


def is_full_precision() -> bool:
    """Whether the caller has switched on nothing that ``full_precision`` switches off; cheap.

    False while any thread is inside such a block: what it sets goes when it leaves. Hence the order: no block is open
    before the settings are read, and none has been opened since.
    """
    opened = _opened
    return (
        _open == 0
        and not _any_autocast()
        and _setting("cuda", "matmul") in _EXACT
        and _setting("mkldnn", "matmul") in _EXACT
        and opened == _opened
    )


class full_precision:
    """Autocast off on the devices of ``of``, and float32 products in float32 (no TF32, no bfloat16 of a CPU).

    Both are restored afterwards, the second by the last thread that leaves such a block. A basis computed in bfloat16
    leaks 1e-2 of an update, in TF32 1e-3, in float32 1e-7 (measured). Every function of ``keeplora.ops`` and
    ``keeplora.math`` guards itself with it.

    Args:
        of: Devices, or tensors on them.

    Examples:
        >>> x = torch.eye(2)
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(x):
        ...     print((x @ x).dtype)
        torch.float32
    """

    __slots__ = ("_of", "_stack")

    def __init__(self, *of: Tensor | torch.device):
        self._of = of
        self._stack: ExitStack | None = None

    def __enter__(self) -> None:
        if is_full_precision():
            return
        with ExitStack() as stack:
            for kind in {value.type if isinstance(value, torch.device) else value.device.type for value in self._of}:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            _switch_off()
            stack.callback(_restore)
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stack is not None:
            self._stack.close()


def _switch_off() -> None:
    global _open, _opened
    with _lock:
        _open, _opened = _open + 1, _opened + 1  # before anything is set: is_full_precision() takes no lock
        if _open == 1:
            # By backend: torch refuses to read its older, common setting where somebody has used these.
            for name in _BACKENDS:
                if _setting(name, "matmul") not in _EXACT:
                    _before[name] = _setting(name, "matmul")
                    _matmul(name).fp32_precision = "ieee"


def _restore() -> None:
    global _open
    with _lock:
        while _open == 1 and _before:
            name, value = _before.popitem()
            _matmul(name).fp32_precision = "none"  # inherits torch.backends.fp32_precision, if the value came from it
            if _setting(name, "matmul") != value:
                _matmul(name).fp32_precision = value
        _open -= 1  # after all is restored


def _matmul(name: str) -> Any:
    return getattr(torch.backends, name).matmul
