"""Numbers that are none."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["first_not_finite"]


def first_not_finite(tensors: Sequence[Tensor]) -> int | None:
    """The position of the first tensor with a NaN or an infinity; None where all are finite. One transfer for all.

    Examples:
        >>> first_not_finite([torch.ones(2), torch.tensor([0.0, float("nan")])])
        1
    """
    if not tensors:
        return None
    device = tensors[0].device
    finite = torch.stack([torch.isfinite(tensor.detach()).all().to(device) for tensor in tensors]).tolist()
    return None if all(finite) else finite.index(False)
