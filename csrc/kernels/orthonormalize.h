// orthonormalize -- orthonormal columns spanning what the columns of many matrices add to bases,
// one launch for all of them.
//
//   Z_i^T Z_i = I,   Q_i^T Z_i = 0,   span[Q_i, Z_i] = span[Q_i, Y_i]
//
// Columns are taken from left to right. One is dropped when its part outside Q_i and the columns kept before
// is at most 32 eps of its length (eps of T). The first `rank` columns of Z are what was kept, the others 0.
//
// Shapes   Y, Z: [d, l]; Q: [d, k] with orthonormal columns; row-major and dense.
// Numbers  float or double. Products with Q and Z in the precision of T (float as three TF32 products); Gram
//          matrices, their factors and the decisions on columns in double.
// Limits   any d, l, k from 0 on (below 2^31), any mixture of shapes and alignments; lengths of columns whose
//          squares double can hold. Z must not overlap Y or Q. A column that is not finite is dropped or
//          makes the columns kept with it NaN.
// Cost     per 64 columns 12 d 64 (k + rank so far) operations, and 6 d 64^2 in double or T; Q is read six
//          times. Columns that the Gram matrix in double cannot separate from those to their left take
//          further rounds of the same cost, in the worst case one per column.
// Repeats  every sum has a fixed order: equal inputs give equal bits.
// Source   Giraud, Langou & Rozloznik, "The loss of orthogonality in the Gram-Schmidt orthogonalization
//          process", 2005 (twice is enough); Yamamoto et al., "Roundoff error analysis of the CholeskyQR2
//          algorithm", 2015.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace keeplora {

template <typename T>
struct OrthonormalizeProblem {
  const T* y;
  const T* q;
  T* z;
  int d, l, k;
};

// Bytes of device memory orthonormalize() needs as `workspace`.
template <typename T>
int64_t orthonormalize_workspace(const OrthonormalizeProblem<T>* problems, int count);

// Queues the work on `stream` without waiting for it; `problems` is host memory and is not needed afterwards.
// `rank`, in device memory, has one number per problem. `workspace` must be aligned to 16 bytes. Returns the
// first launch error. Defined for float and double.
template <typename T>
cudaError_t orthonormalize(const OrthonormalizeProblem<T>* problems, int count, int64_t* rank,
                           void* workspace, cudaStream_t stream);

}  // namespace keeplora
