"""The ops: grouped tensor kernels behind ``torch.ops.keeplora``. Importing them touches no GPU."""

from keeplora.ops.compiled import build_info  # first: loading the compiled libraries registers their kernels
from keeplora.ops.gram import gram
from keeplora.ops.lora_grad_b import lora_grad_b
from keeplora.ops.merge_weights import merge_weights
from keeplora.ops.orthonormalize import orthonormalize
from keeplora.ops.project_rows import project_rows
from keeplora.ops.projected_adamw import projected_adamw
from keeplora.ops.sketch_rows import random_signs, sketch_rows
from keeplora.ops.thin_matmul import thin_matmul

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
