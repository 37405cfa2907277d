DEFECTS = [
    ("Y subtracted from twice", "kernels/orthonormalize.cu", "at.phase == Phase::kSubtract0 ? entry.y : entry.z",
     "entry.y"),
    ("no projection after the first factor", "kernels/orthonormalize.cu", "at.kept > 0 && bases > 0 ? rows : 0", "0"),
    ("kept columns not projected out", "kernels/orthonormalize.cu",
     "applies ? panel.count : with_q ? entry.k : at.rank",
     "applies ? panel.count : with_q ? entry.k : 0"),
    ("what is left compared with itself", "kernels/gram_factor.cuh", "lengths[pair] / square", "1"),
    ("limit without the Gram matrix's error", "kernels/gram_factor.cuh", "square + error <= limit",
     "square - error <= limit"),
    ("the factor trusted a million times too long", "kernels/gram_factor.cuh", "growth + inherited < kLost",
     "growth + inherited < 1e6 * kLost"),
    ("scales forgotten in the transform", "kernels/gram_factor.cuh",
     "upper[packed(from, to)] * space.scale[column]", "upper[packed(from, to)]"),
    ("progress kept while a block has the same job", "kernels/orthonormalize.cu",
     "const Progress at = states[i].progress;",
     """const Progress at = [&] {
       static Progress kept[kProductThreads];
       static unsigned job[kProductThreads], block[kProductThreads];
       const unsigned t = threadIdx.x;
       if (job[t] != i + 1u || block[t] != blockIdx.x + 1 || states[i].progress.phase == Phase::kStart)
         job[t] = i + 1u, block[t] = blockIdx.x + 1, kept[t] = states[i].progress;
       return kept[t];
     }();"""),
    ("a worker's first tile again and again", "kernels/primitives/jobs.cuh", "tile_ = slot_->tile;",
     "tile_ = begun_ ? tile_ : slot_->tile;"),
    ("a phase opened before the ended tiles of the last are forgotten", "kernels/primitives/jobs.cuh",
     "job.ended = 0", "(jobs::publish(&job.tiles, static_cast<unsigned long long>(tiles - 1) << 32), 0u)",
     "jobs::publish(&job.tiles, static_cast<unsigned long long>(tiles - 1) << 32)",
     "static_cast<void>(job.ended = 0)"),
    ("ranks of a second launch over those of the first", "kernels/orthonormalize.cu",
     "run_table<T, gpu::kSmallTable>(problems + first, now, rank + first, workspace, stream)",
     "run_table<T, gpu::kSmallTable>(problems + first, now, rank, workspace, stream)"),
    ("columns of Z where those of Y are", "kernels/orthonormalize.cu", "line + at.rank + c", "line + panel.first + c"),
    ("lengths without half of the warps", "kernels/orthonormalize.cu", "warp < gpu::kProductWarps", "warp < 2"),
    ("an error of the Gram matrix a thousand times too small", "kernels/orthonormalize.cu", "0x1p-53", "0x1p-63"),
    ("an int for the size of the products", "kernels/orthonormalize.cu",
     "(static_cast<int64_t>(entry.k) + entry.l) * pitch", "(entry.k + entry.l) * entry.pitch"),
]  # fmt: skip

REPRESENTATIVES = {
    "plain": ("kernels/orthonormalize.cu", "at.phase == Phase::kSubtract0 ? entry.y : entry.z -> entry.y"),
    "sanitized": ("kernels/orthonormalize.cu", "column < count -> true"),
    "raced": ("kernels/orthonormalize.cu", "threadIdx.x % gpu::kWarp < kSlice -> true"),
}
