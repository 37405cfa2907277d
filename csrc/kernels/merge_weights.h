// merge_weights -- the effective weights of many LoRA layers, one launch for all of them.
//
//   out_i = cast(W_i + scale_i (B_i - B0_i) A_i)
//
// Shapes   W, out: [rows, cols]; A: [r, cols]; B, B0: [rows, r]; row-major. Rows of W are `pitch` elements
//          apart, so a row range of a fused weight needs no copy; the others are dense. origin is B0, or
//          null: none. Rows without an adapter, and an A that is only to be cast, are problems with r = 0.
// Numbers  every array in any format of its own. Sums in T: float (on tensor cores as three TF32 products,
//          which keeps the precision of float) or double, which an input in double needs. Each element of out
//          is rounded once from its sum. To bfloat16 from float sums, B - B0 and A are rounded to TF32 and one
//          product is left: that adds at most 2^-10 scale |B - B0| |A| (sizes of the elements), a fraction of
//          what rounding to bfloat16 is where the update is smaller than the weight.
// Limits   any rows, cols, r from 0 on (below 2^31), any mixture of shapes, formats and alignments. out must
//          not overlap an input.
// Cost     2 rows cols r operations; one launch for some 340 problems; W is read once and out written once, A
//          and B once per 64 rows (16 in double) or columns, from L2. Elements move four at a time where rows
//          are aligned.
// Repeats  every sum has a fixed order: equal inputs give equal bits.
// Source   Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, sec. 4.1.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/format.h"

namespace keeplora {

template <typename T>
struct MergeWeightsProblem {
  const void* w;
  const void* a;
  const void* b;
  const void* origin;
  void* out;
  int64_t pitch;
  int rows, cols, r;
  T scale;
  gpu::Format w_format, a_format, b_format, origin_format, out_format;
};

// Queues the work on `stream` without waiting for it; `problems` is host memory and is not needed afterwards.
// Returns the first launch error. Defined for float and double; for float no input may be in double.
template <typename T>
cudaError_t merge_weights(const MergeWeightsProblem<T>* problems, int count, cudaStream_t stream);

}  // namespace keeplora
