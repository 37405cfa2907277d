"""The guard of ``keeplora.ops.precision``, for the rooms that know this one and not the ops."""

from keeplora.ops.precision import full_precision

__all__ = ["full_precision"]
