// sketch_rows -- add a random row sketch of a layer's weight gradient, without the gradient itself.
//
//   Z += (Psi delta^T) x,   Psi_ij = +-1/sqrt(width)
//
// Shapes   x: [tokens, d_in]; delta: [tokens, d_out]; Z: [width, d_in]; row-major and dense.
//          Psi [width, d_out] is never stored: bit j % 32 of a hash of (seed, i, j / 32) is set where Psi_ij
//          is negative.
// Numbers  x and delta in any format, also different ones; Z in float, or double as soon as one of them is
//          double. Psi delta^T and the products with x have the precision of Z, as three TF32 products at
//          most, unless both inputs are bfloat16: then Psi delta^T is rounded to bfloat16 once and all else
//          is exact products summed in float. That error is 3e-3 of Z in the norm where the terms of the
//          tokens do not cancel; each element's is at most 2^-8 of the sum of their sizes.
// Limits   any sizes from 0 on (below 2^31) and any alignment; width >= 1. Z must not overlap the inputs.
// Cost     2 width tokens (d_in + d_out) operations; width numbers of workspace for each of at most 16384
//          tokens, and at most 264 tiles of Z more. delta and x are read once for every 64 rows of Z,
//          16 in double.
// Repeats  every sum has a fixed order: equal inputs give equal bits.
// Source   Achlioptas, "Database-friendly random projections", 2003; the 32-bit finalizer of MurmurHash3.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/format.h"

namespace keeplora {

struct SketchRowsProblem {
  const void* x;
  gpu::Format x_format;
  const void* delta;
  gpu::Format delta_format;
  void* out;
  int64_t tokens;
  int d_in, d_out, width;
  uint64_t seed;
};

// Bytes of device memory sketch_rows() needs as `workspace`.
int64_t sketch_rows_workspace(const SketchRowsProblem& problem);

// Queues the work on `stream` without waiting for it. `workspace` must be aligned to 16 bytes.
// Returns the first launch error.
cudaError_t sketch_rows(const SketchRowsProblem& problem, void* workspace, cudaStream_t stream);

}  // namespace keeplora
