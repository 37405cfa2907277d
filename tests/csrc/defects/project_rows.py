DEFECTS = [
    ("scale forgotten", "kernels/project_rows.cu", "entry.scale * left", "left"),
    ("scale in every pass", "kernels/project_rows.cu", "round == passes - 1", "true"),
    ("second pass from G again", "kernels/project_rows.cu", "round == 0 ? entry.g : entry.out", "entry.g"),
]

REPRESENTATIVES = {
    "plain": ("kernels/project_rows.cu", "entry.scale * left -> left"),
    "sanitized": ("kernels/projection.cuh", "column + c >= entry.k -> false"),
    "raced": ("kernels/projection.cuh", "gpu::await(done, before) -> nothing"),
}
