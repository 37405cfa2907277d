DEFECTS = [
    ("scale forgotten", "kernels/project_rows.cu", "entry.scale * left", "left"),
    ("scale in every pass", "kernels/project_rows.cu", "round == passes - 1", "true"),
    ("second pass from G again", "kernels/project_rows.cu", "round == 0 ? entry.g : entry.out", "entry.g"),
    (
        "counters of a second launch not cleared",
        "kernels/projection.cuh",
        "(1 + count) * sizeof(unsigned)",
        "first > 0 ? 0 : (1 + count) * sizeof(unsigned)",
    ),
    ("a wait for too few products", "kernels/projection.cuh", "before + multiplies", "before + multiplies - 1"),
    (
        "a wait for too few of the round before",
        "kernels/projection.cuh",
        "round * multiplies + (round + (phases.prepares && phase != Phase::kPrepare)) * subtracts",
        "round * multiplies + (round + (phases.prepares && phase != Phase::kPrepare)) * subtracts - (round > 0)",
    ),
]

REPRESENTATIVES = {
    "plain": ("kernels/project_rows.cu", "entry.scale * left -> left"),
    "sanitized": ("kernels/projection.cuh", "column + c >= entry.k -> false"),
    "raced": ("kernels/projection.cuh", "gpu::await(done, before) -> nothing"),
}
