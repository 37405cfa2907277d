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
    (
        "a leak that waits for too few products",
        "kernels/projection.cuh",
        "before + multiplies",
        "before + multiplies - (phase == Phase::kLeak && multiplies > 0)",
    ),
    (
        "products announced before they are written",
        "kernels/projection.cuh",
        "gpu::await(done, before)",
        "(gpu::await(done, before), gpu::announce(done))",
        "gpu::announce(done)",
        "(phase == Phase::kMultiply ? void() : gpu::announce(done))",
    ),
    (
        "every leak relative to the first problem's rows",
        "kernels/projection.cuh",
        "phases.squares[phases.multiplies + entry.first_subtract + j]",
        "phases.squares[phases.multiplies + j]",
    ),
    (
        "leaks of a second launch over those of the first",
        "kernels/projection.cuh",
        "run_table<Op, kRowTiles, gpu::kSmallTable>(op, fill, first, now, phases, leak + first,\n"
        "                                                          workspace, stream)",
        "run_table<Op, kRowTiles, gpu::kSmallTable>(op, fill, first, now, phases, leak, workspace, stream)",
    ),
    (
        "an int for the size of the products",
        "kernels/projection.cuh",
        "static_cast<int64_t>(entry.rows) * products_pitch(entry.k)",
        "entry.rows * products_pitch(entry.k)",
    ),
    ("more tiles than a grid has", "kernels/projection.cuh", "blocks > 0x7fffffff", "false"),
    ("a workspace for the last launch", "kernels/group.cuh", "taken_ > needed_ ? taken_ : needed_", "taken_"),
]

REPRESENTATIVES = {
    "plain": ("kernels/project_rows.cu", "entry.scale * left -> left"),
    "sanitized": ("kernels/projection.cuh", "column + c >= entry.k -> false"),
    "raced": ("kernels/projection.cuh", "gpu::await(done, before) -> nothing"),
}
