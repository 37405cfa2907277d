"""Weights of which every process holds some rows: FSDP2 (``torch.distributed.fsdp.fully_shard``).

Between forwards such a weight is a ``DTensor`` of the whole's shape; inside the forward of its block it is whole. What
is written to a weight that is whole would be lost: [`reshard`][] comes before everything that reads or writes rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

__all__ = [
    "DTENSORS",
    "MODULES",
    "LocalRows",
    "class_before",
    "is_dtensor",
    "is_shared_out",
    "is_wrapped",
    "reshard",
    "rows_of",
    "shared_over",
    "unfit",
    "without_rows",
]

MODULES = tuple(
    f"torch.distributed.fsdp.{name}"
    for name in ("FSDPModule", "_fully_shard.FSDPModule", "_fully_shard._fully_shard.FSDPModule")
)
DTENSORS = ("torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor")


class LocalRows(NamedTuple):
    """The rows of a weight that are in this process: a view, which may have none, and the index of the first."""

    rows: Tensor
    first: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor that is whole."""
        return tensor[self.first : self.first + len(self.rows)]


def is_wrapped(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with the module itself."""
    return any(f"{c.__module__}.{c.__qualname__}" in MODULES for c in type(module).__mro__)


def class_before(module: nn.Module) -> type[nn.Module]:
    """The module's class, before ``fully_shard`` derived another from it."""
    kind = type(module)
    return kind.__bases__[1] if is_wrapped(module) else kind


def is_shared_out(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with the model or a part of it."""
    return any(is_wrapped(module) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Leave every process its own rows: after a forward the outermost module's weights are still whole."""
    for module in model.modules():
        if is_wrapped(module):
            cast(Any, module).reshard()


def rows_of(weight: Tensor) -> LocalRows:
    """Those of ``weight`` that are here: all of them where it is no ``DTensor``."""
    if not is_dtensor(weight):
        return LocalRows(weight, 0)
    shared = cast(Any, weight)
    mesh = shared.device_mesh
    each = -(-weight.shape[0] // mesh.size())  # torch.chunk's share; the last ones may be smaller, or empty
    return LocalRows(shared.to_local(), min(mesh.get_local_rank() * each, weight.shape[0]))


def shared_over(model: nn.Module) -> int:
    """How many processes hold rows of its weights."""
    sizes = (cast(Any, p).device_mesh.size() for p in model.parameters() if is_dtensor(p))
    return next(sizes, 1)


def without_rows(weight: Tensor) -> int | None:
    """The first process that has no row of it."""
    if not is_dtensor(weight):
        return None
    size, rows = cast(Any, weight).device_mesh.size(), weight.shape[0]
    parts = -(-rows // -(-rows // size))
    return parts if parts < size else None


def unfit(model: nn.Module) -> str:
    """What of a model that ``fully_shard`` cut up is in the way of adapters: "" where nothing is."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_dtensor(parameter):
                continue
            where, shared = f"{path}.{name}".lstrip("."), cast(Any, parameter)
            if shared.device_mesh.ndim != 1 or not all(p.is_shard(0) for p in shared.placements):
                return f"{where} on a mesh of {shared.device_mesh.ndim} dimensions, as {shared.placements}"
            if parameter.requires_grad and not getattr(module, "trains_weights", False):  # a LoraHost
                return f"{where} with requires_grad"
            if shared.to_local().device.type != shared.device_mesh.device_type:
                return f"{where} offloaded to {shared.to_local().device}"
    return ""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is, without an import of the class."""
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(tensor).__mro__]
    return any(name in DTENSORS for name in names)
