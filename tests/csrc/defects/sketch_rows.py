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
]

REPRESENTATIVES = {
    "plain": ("kernels/sketch_rows.cu", "work.scale * value -> value"),
    "sanitized": ("kernels/sketch_rows.cu", "first + j * kProductThreads < size -> true"),
    "raced": ("kernels/sketch_rows.cu", "gpu::await(work.counters + 1 + part,"),
}
