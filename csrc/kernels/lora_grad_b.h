// lora_grad_b -- gradients of LoRA's B for all adapters of a layer, one launch for them.
//
//   dB_i = scale_i dy_i^T t_i     dy_i: columns [start_i, stop_i) of dy, t_i: r_i columns of t from first_i on
//
// Shapes   dy: [tokens, ..], t: [tokens, ..], rows `pitch` elements apart; dB_i: [stop_i - start_i, r_i],
//          row-major and dense. t is x A^T for the layer's input x and the adapters' A.
// Numbers  dy and t in a format each. Sums and results in T: float (on tensor cores as TF32 products, two for
//          16-bit dy and three for float, which keeps the precision of float) or double, which an input in
//          double needs.
// Limits   any sizes from 0 on (below 2^31), any alignments, any n; ranges may overlap. dB must not overlap
//          an input. t that is not in T, and double, take a slower way to shared memory.
// Cost     2 tokens (sum of (stop_i - start_i) r_i) operations; dy is read once from memory, and once more
//          per 64 ranks of an adapter, 16 in double. One launch for 32 adapters, and no memory of its own.
// Repeats  tokens are divided among blocks by the sizes and the GPU's architecture alone and every sum has a
//          fixed order: equal inputs give equal bits.
// Source   the gradient of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3, with
//          A frozen.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/format.h"

namespace keeplora {

struct LoraGradBProblem {
  const void* dy;
  const void* t;
  int64_t dy_pitch, t_pitch;
  int tokens;
  gpu::Format dy_format, t_format;
};

template <typename T>
struct LoraGradBAdapter {
  T* db;
  int first, r, start, stop;
  T scale;
};

// Queues the work on `stream` without waiting for it; `adapters` is host memory and is not needed afterwards.
// Returns the first launch error. Defined for float and double; for float no input may be in double.
template <typename T>
cudaError_t lora_grad_b(const LoraGradBProblem& problem, const LoraGradBAdapter<T>* adapters, int count,
                        cudaStream_t stream);

}  // namespace keeplora
