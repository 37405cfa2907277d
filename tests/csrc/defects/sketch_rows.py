SOURCE = "kernels/sketch_rows.cu"
DEFECTS = [
    ("signs of every row the same", SOURCE, "static_cast<uint32_t>(line + i)", "0u"),
    (
        "signs repeat after 256 rows",
        SOURCE,
        "static_cast<uint32_t>(line + i)",
        "static_cast<uint32_t>((line + i) % 256)",
    ),
    ("signs repeat along the depth", SOURCE, "static_cast<uint32_t>(depth / 32)", "0u"),
    ("signs of neighbouring pairs", SOURCE, "lane % 4 * 2", "lane % 4"),
    ("scale forgotten", SOURCE, "work.scale * value", "value"),
    ("scale forgotten where parts are added up", SOURCE, "work.scale * total[j]", "total[j]"),
    ("every part from the first token", SOURCE, "first * Path::Sum::kColumns", "0"),
    (
        "a wait for too few tiles of a part",
        SOURCE,
        "static_cast<unsigned>((last - first) * work.row_tiles)",
        "static_cast<unsigned>((last - first) * work.row_tiles - 1)",
    ),
    (
        "a wait for too few parts",
        SOURCE,
        "gpu::await(work.counters + 1 + work.parts, work.multiplies())",
        "gpu::await(work.counters + 1 + work.parts, work.multiplies() - 1)",
    ),
    ("halves of a matrix exchanged", "kernels/product_bf16.cuh", "lane / 16 * 8", "8 - lane / 16 * 8"),
    (
        "signs repeat after 256 columns",
        SOURCE,
        "static_cast<uint32_t>(depth / 32)",
        "static_cast<uint32_t>(depth / 32 % 8)",
    ),
    (
        "every part waits for the first",
        SOURCE,
        "gpu::await(work.counters + 1 + part, static_cast<unsigned>((last - first) * work.row_tiles))",
        "gpu::await(work.counters + 1, static_cast<unsigned>((last - first) * work.row_tiles))",
    ),
    (
        "a part announced before it is written",
        SOURCE,
        "gpu::await(work.counters + 1 + part, static_cast<unsigned>((last - first) * work.row_tiles))",
        "(gpu::await(work.counters + 1 + part, static_cast<unsigned>((last - first) * work.row_tiles)), "
        "gpu::announce(work.counters + 1 + work.parts))",
        "gpu::announce(work.counters + 1 + work.parts)",
        "void()",
    ),
    (
        "blocks that add up parts one after another overlap",
        SOURCE,
        "static_cast<int64_t>(tile) * kReduced * kProductThreads",
        "static_cast<int64_t>(tile) * kProductThreads",
    ),
    ("the first two parts are all", SOURCE, "part < work.parts", "part < 2"),
    (
        "counters of a second launch not cleared",
        SOURCE,
        "(2 + work.parts) * sizeof(unsigned)",
        "first > 0 ? 0 : (2 + work.parts) * sizeof(unsigned)",
    ),
    (
        "x of a second launch that of the first",
        SOURCE,
        "first * problem.d_in * size_of(problem.x_format)",
        "0 * problem.d_in * size_of(problem.x_format)",
    ),
    ("an int for the size of S", SOURCE, "static_cast<int64_t>(work.width) * work.pitch", "work.width * work.pitch"),
]

REPRESENTATIVES = {
    "plain": ("kernels/sketch_rows.cu", "work.scale * value -> value"),
    "sanitized": ("kernels/sketch_rows.cu", "first + j * kProductThreads < size -> true"),
    "raced": ("kernels/sketch_rows.cu", "gpu::await(work.counters + 1 + part,"),
}
