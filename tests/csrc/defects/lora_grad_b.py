SOURCE = "kernels/lora_grad_b.cu"
DEFECTS = [
    ("scale forgotten", SOURCE, "entry.scale * total", "total"),
    ("last block of the cluster not added", SOURCE, "other < cluster", "other < cluster - 1"),
    ("the own sums for those of all", SOURCE, "gpu::cluster_map(shared.sums + i, other)", "(shared.sums + i)"),
    ("the own share only of the first blocks", SOURCE, "(block + 1) * share", "(block > 0 ? 0 : share)"),
    ("tokens of a range in two blocks", SOURCE, "(block + 1) * range", "(block + 1) * range + kDepth"),
    ("the last tokens left out", SOURCE, "ceil_div(tokens, cluster)", "(tokens / cluster)"),
    ("t of the first adapter", SOURCE, "at(problem.t, problem.t_format, adapter.first)",
     "at(problem.t, problem.t_format, 0)"),
    ("dy from its first column", SOURCE, "at(problem.dy, problem.dy_format, adapter.start)",
     "at(problem.dy, problem.dy_format, 0)"),
    ("adapters of one launch are those of the first", SOURCE, "adapters + first", "adapters"),
    ("rows of dB as long as those of t", SOURCE, "static_cast<int64_t>(c) * entry.r",
     "static_cast<int64_t>(c) * problem.t_pitch"),
]  # fmt: skip

REPRESENTATIVES = {
    "plain": ("kernels/lora_grad_b.cu", "entry.scale * total -> total"),
    "sanitized": ("kernels/lora_grad_b.cu", "r >= entry.r -> false"),
    "raced": ("kernels/product.cuh", "__syncthreads() -> nothing"),
}
