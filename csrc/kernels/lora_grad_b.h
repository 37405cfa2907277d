// lora_grad_b -- gradients of LoRA's B for all adapters that share an input, one launch for them.
//
//   t = x [A_1; ..; A_n]^T     dB_i = scale_i dy_i^T t_i     dy_i: columns [start_i, stop_i) of dy
//
// Shapes   x: [tokens, in], dy: [tokens, ..], rows `pitch` elements apart; A_i: [r_i, in],
//          t: [tokens, sum of r_i], dB_i: [stop_i - start_i, r_i], row-major and dense.
//          t_i: the columns of t that A_i made.
// Numbers  x, dy, A in a format each. Sums and results in T: float (on tensor cores as TF32 products, two for
//          16-bit x or dy and three for float, which keeps the precision of float) or double, which an input
//          in double needs.
// Limits   any sizes from 0 on (below 2^31), any alignments, any n; ranges may overlap. t and dB must not
//          overlap an input. x and dy of different formats, or double, take a slower way to shared memory.
// Cost     2 tokens in (sum of r_i) + 2 tokens (sum of (stop_i - start_i) r_i) operations; x and dy are read
//          once from memory (x once per 32 adapters, and from L2 once more per 64 ranks of them, dy once more
//          per 64 ranks of an adapter, 16 in double).
// Repeats  tokens are divided among blocks by the sizes alone and every sum has a fixed order: equal inputs
//          give equal bits.
// Source   the gradient of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3,
//          with A frozen.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/format.h"

namespace keeplora {

template <typename T>
struct LoraGradBProblem {
  const void* x;
  const void* dy;
  T* t;
  int64_t x_pitch, dy_pitch;
  int tokens, in;
  gpu::Format x_format, dy_format, a_format;
};

template <typename T>
struct LoraGradBAdapter {
  const void* a;
  T* db;
  int r, start, stop;
  T scale;
};

// Bytes of device memory lora_grad_b() needs as `workspace`.
template <typename T>
int64_t lora_grad_b_workspace(const LoraGradBProblem<T>& problem, const LoraGradBAdapter<T>* adapters,
                              int count);

// Queues the work on `stream` without waiting for it; `adapters` is host memory and is not needed afterwards.
// `workspace` must be aligned to 16 bytes. Returns the first launch error. Defined for float and double; for
// float no input may be in double.
template <typename T>
cudaError_t lora_grad_b(const LoraGradBProblem<T>& problem, const LoraGradBAdapter<T>* adapters, int count,
                        void* workspace, cudaStream_t stream);

}  // namespace keeplora
