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
]  # fmt: skip

REPRESENTATIVES = {
    "plain": ("kernels/orthonormalize.cu", "at.phase == Phase::kSubtract0 ? entry.y : entry.z -> entry.y"),
    "sanitized": ("kernels/orthonormalize.cu", "column < count -> true"),
    "raced": ("kernels/orthonormalize.cu", "threadIdx.x % gpu::kWarp < kSlice -> true"),
}
