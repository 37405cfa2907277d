// project_rows -- take protected subspaces out of the rows of many matrices, one launch for all of them.
//
//   R_i = scale_i (G_i - (G_i Q_i) Q_i^T), the projection applied `passes` times
//   leak_i = |R_i Q_i| / |R_i|
//
// Shapes   G, R: [rows, d]; Q: [d, k] with orthonormal columns; row-major and dense; leak: one per problem.
// Numbers  float or double throughout; float on tensor cores as three TF32 products, which keeps the
//          precision of float; the sums of squares behind the leak in double. The leak of R = 0 is 0.
// Limits   any rows, d, k from 0 on (below 2^31), any mixture of shapes and alignments; passes >= 1.
//          R must not overlap G.
// Cost     per pass 4 rows d k operations, and 2 rows d k for the leak. Q is read twice per pass and once for
//          the leak, for every 16, 32 or 64 rows: the fewest that hold the tallest problem, at most 64;
//          16 in double.
// Repeats  every sum has a fixed order: equal inputs give equal bits.
// Source   Saha et al., "Gradient Projection Memory", ICLR 2021, eq. 6; depth scale of KeepLoRA++,
//          arXiv:2606.16256.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace keeplora {

template <typename T>
struct ProjectRowsProblem {
  const T* g;
  const T* q;
  T* out;
  int64_t rows;
  int d, k;
  T scale;
};

// Bytes of device memory project_rows() needs as `workspace`.
template <typename T>
int64_t project_rows_workspace(const ProjectRowsProblem<T>* problems, int count, int passes);

// Queues the work on `stream` without waiting for it; `problems` is host memory and is not needed afterwards.
// `workspace` must be aligned to 16 bytes. Returns the first launch error. Defined for float and double.
template <typename T>
cudaError_t project_rows(const ProjectRowsProblem<T>* problems, int count, int passes, T* leak,
                         void* workspace, cudaStream_t stream);

}  // namespace keeplora
