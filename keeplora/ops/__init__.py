"""The ops: grouped tensor kernels behind ``torch.ops.keeplora``. Importing them touches no GPU."""

from .compiled import build_info  # first: loading the compiled libraries registers their kernels
from .gram import gram
from .lora_grad_b import lora_grad_b
from .merge_weights import merge_weights
from .orthonormalize import orthonormalize
from .project_rows import project_rows
from .projected_adamw import projected_adamw
from .sketch_rows import random_signs, sketch_rows
from .thin_matmul import thin_matmul

__all__ = [
    "build_info",
    "gram",
    "lora_grad_b",
    "merge_weights",
    "orthonormalize",
    "project_rows",
    "projected_adamw",
    "random_signs",
    "sketch_rows",
    "thin_matmul",
]
