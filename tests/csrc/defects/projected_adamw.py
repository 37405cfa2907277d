SOURCE = "kernels/projected_adamw.cu"
DEFECTS = [
    ("AdamW in every round", SOURCE,
     "round == 0 ? step(entry, at, left, common) : left", "step(entry, at, left, common)"),
    ("weight decay forgotten", SOURCE, "T(1) - entry.lr * weight_decay", "T(1)"),
    ("first moment not corrected", SOURCE, "entry.lr / common.correction1", "entry.lr"),
    ("step of the host where the device has one", SOURCE, "entry.step_at ? *entry.step_at : entry.step", "entry.step"),
    ("the gradient not awaited", "kernels/projection.cuh",
     "(round + (phases.prepares && phase != Phase::kPrepare)) * subtracts", "round * subtracts"),
    ("every row tile of a gradient to be converted the first", "kernels/projection.cuh",
     "op.prepare(entry, static_cast<int64_t>(row + r) * entry.d + column + c)",
     "op.prepare(entry, static_cast<int64_t>(r) * entry.d + column + c)"),
    ("an int for the size of a gradient", SOURCE, "problem.rows * problem.d",
     "static_cast<int>(problem.rows) * problem.d"),
]  # fmt: skip

REPRESENTATIVES = {
    "plain": ("kernels/projected_adamw.cu", "entry.lr / common.correction1 -> entry.lr"),
    "sanitized": ("kernels/projection.cuh", "column + c >= entry.d -> false"),
    "raced": ("kernels/projection.cuh", "gpu::await(done, multiplied) -> nothing"),
}
