"""One call declares one op: schema, reference, fake, autograd, sample inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeplora.ops.precision import full_precision, is_full_precision

__all__ = ["NAMESPACE", "OPS", "Op", "declare"]

NAMESPACE = "keeplora"

Samples = Callable[[torch.device, torch.dtype], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Op:
    """A declared op: what the dispatcher calls, its exact reference, and inputs to try it on."""

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Samples


OPS: dict[str, Op] = {}

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Samples,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Declare ``schema`` in ``torch.ops.keeplora`` and list it in ``OPS``.

    ``reference`` is the kernel of every device for which the compiled libraries bring none, so callers
    never ask which kernels exist. It runs in full precision there, as the compiled ones do. ``fake``
    allocates outputs of the right shapes; ``save`` and ``backward`` are the two halves of
    ``torch.library.register_autograd``. ``samples(device, dtype)`` returns argument tuples for the
    contract tests.
    """
    name = schema.split("(", 1)[0]
    full = f"{NAMESPACE}::{name}"
    _library.define(schema)
    _library.impl(name, _guarded(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(full, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(full, backward, setup_context=save, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    mutated = [i for i, arg in enumerate(overload._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
    if mutated:
        _count_versions(name, overload, mutated)
    op = OPS[name] = Op(name, overload, reference, samples)
    return op


def _guarded(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as a kernel: autocast and TF32 would reach the products it is made of."""

    def kernel(*args: Any) -> Any:
        if is_full_precision():
            return reference(*args)
        with full_precision(*_first_tensors(args)):
            return reference(*args)

    return kernel


def _first_tensors(args: Sequence[Any]) -> list[Tensor]:
    """The first tensor of ``args``, alone or in a list: all of an op's lie on one device."""
    for arg in args:
        if isinstance(arg, Tensor):
            return [arg]
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor):
            return [arg[0]]
    return []


def _count_versions(name: str, overload: Any, mutated: list[int]) -> None:
    # Without this, autograd would not notice that a tensor saved for backward was overwritten.
    def kernel(keys: Any, *args: Any) -> Any:
        for index in mutated:
            written: Tensor | Sequence[Tensor] = args[index]
            torch.autograd.graph.increment_version(written if isinstance(written, Tensor) else tuple(written))
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)
