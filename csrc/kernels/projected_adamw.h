// projected_adamw -- one AdamW step on many parameters that keeps their rows outside protected subspaces,
// one launch for all of them.
//
//   g = grad (I - Q Q^T)
//   m <- m + (1 - beta1)(g - m),   v <- beta2 v + (1 - beta2) g^2
//   A <- (1 - lr weight_decay) A - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//   A <- A (I - Q Q^T), twice
//   leak = |A Q| / |A|
//
// Shapes   A, m, v, grad: [rows, d]; Q: [d, k] with orthonormal columns; row-major and dense;
//          leak: one per problem.
// Numbers  A, m, v, Q float or double throughout; grad in any format. float on tensor cores as three TF32
//          products. The leak of A = 0 is 0.
// Steps    each problem counts its own, from 1. A count in device memory is read when the kernel runs, so a
//          captured graph advances with it.
// Limits   any rows, d, k from 0 on (below 2^31), any mixture of shapes and alignments. A, m and v are
//          overwritten and must not overlap anything.
// Cost     14 rows d k operations; Q is read seven times, of which the first is from memory and the others
//          are too where Q does not fit the L2 cache. A, m, v are read and written once for the step,
//          A twice more.
// Repeats  every sum has a fixed order: equal inputs give equal bits.
// Source   Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, alg. 2; Saha et al.,
//          "Gradient Projection Memory", ICLR 2021.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/format.h"

namespace keeplora {

template <typename T>
struct ProjectedAdamWProblem {
  T* a;
  T* exp_avg;
  T* exp_avg_sq;
  const void* grad;
  gpu::Format grad_format;
  const T* q;
  int64_t rows;
  int d, k;
  T lr;
  const float* step_at;  // the number of this step in device memory; null: `step` is it
  float step;
};

struct AdamWOptions {
  double beta1, beta2, eps, weight_decay;
};

// Bytes of device memory projected_adamw() needs as `workspace`.
template <typename T>
int64_t projected_adamw_workspace(const ProjectedAdamWProblem<T>* problems, int count);

// Queues the work on `stream` without waiting for it; `problems` is host memory and is not needed afterwards.
// `workspace` must be aligned to 16 bytes. Returns the first launch error. Defined for float and double.
template <typename T>
cudaError_t projected_adamw(const ProjectedAdamWProblem<T>* problems, int count, const AdamWOptions& options,
                            T* leak, void* workspace, cudaStream_t stream);

}  // namespace keeplora
