SOURCE = "kernels/lora_grad_b.cu"
DEFECTS = [
    ("scale forgotten", SOURCE, "entry.scale * value", "value"),
    ("last range of tokens not added", SOURCE, "range < plan.ranges", "range < plan.ranges - 1"),
    ("rows of A counted from the first adapter", SOURCE, "(rank + i - entry.first_rank)", "(rank + i)"),
    ("t of another adapter", SOURCE, "problem.t + entry.first_rank", "problem.t"),
    ("A taken as aligned", SOURCE, "gpu::aligned16(from)", "true"),
    ("A of another format taken as T", SOURCE, "format == gpu::kFormatOf<T>", "true"),
    ("rows after the last taken as rows", SOURCE, "row != nullptr", "true"),
    ("t of one launch over that of the last", SOURCE, "plan.problem.t += t_column", "plan.problem.t += 0"),
    ("dy from its first column", SOURCE, "static_cast<int64_t>(adapter.start)", "0"),
    ("A of one launch is that of the first", SOURCE, "adapters + first", "adapters"),
]

REPRESENTATIVES = {
    "plain": ("kernels/lora_grad_b.cu", "entry.scale * value -> value"),
    "sanitized": ("kernels/lora_grad_b.cu", "rank + i < plan.ranks -> true"),
    "raced": ("kernels/lora_grad_b.cu", "gpu::await(plan.counters + 1 + range,"),
}
