SOURCE = "kernels/projected_adamw.cu"
DEFECTS = [
    ("AdamW in every round", SOURCE,
     "round == 0 ? step(entry, at, left, common) : left", "step(entry, at, left, common)"),
    ("weight decay forgotten", SOURCE, "T(1) - entry.lr * weight_decay", "T(1)"),
    ("first moment not corrected", SOURCE, "entry.lr / common.correction1", "entry.lr"),
    ("step of the host where the device has one", SOURCE, "entry.step_at ? *entry.step_at : entry.step", "entry.step"),
]  # fmt: skip

REPRESENTATIVES = {
    "plain": ("kernels/projected_adamw.cu", "entry.lr / common.correction1 -> entry.lr"),
    "sanitized": ("kernels/projection.cuh", "column + c >= entry.d -> false"),
    "raced": ("kernels/projection.cuh", "gpu::await(done, multiplied) -> nothing"),
}
