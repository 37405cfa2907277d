// project_rows -- take protected subspaces out of the rows of many matrices, one launch for all of them.
//
//   R_i = scale_i (G_i - (G_i Q_i) Q_i^T), the projection applied `passes` times     leak_i = |R_i Q_i| /
//   |R_i|
//
// Shapes   G, R: [rows, d]; Q: [d, k] with orthonormal columns; row-major and dense; leak: one per problem.
// Numbers  float or double throughout; the sums of squares behind the leak in double. The leak of R = 0 is 0.
// Limits   any rows, d, k from 0 on (d and k below 2^31), any mixture of shapes and alignments; passes >= 1.
//          R must not overlap G. k above a panel's width is taken out panel by panel, which is the same for
//          orthonormal Q and loses less to rounding.
// Cost     per pass 4 rows d k operations; reads Q twice per pass and 8 rows, and once more for the leak. One
// block has
//          8 rows of one problem; blocks share nothing.
// Repeats  every sum has a fixed order: equal inputs give equal bits.
// Source   Saha et al., "Gradient Projection Memory", ICLR 2021, eq. 6; depth scale of KeepLoRA++,
// arXiv:2606.16256.
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

// Number of doubles of device memory project_rows() needs as `workspace`.
template <typename T>
int64_t project_rows_workspace(const ProjectRowsProblem<T>* problems, int count);

// Queues the work on `stream` without waiting for it; `problems` is host memory and is not needed afterwards.
// Returns the first launch error. Defined for float and double.
template <typename T>
cudaError_t project_rows(const ProjectRowsProblem<T>* problems, int count, int passes, T* leak,
                         double* workspace, cudaStream_t stream);

}  // namespace keeplora
