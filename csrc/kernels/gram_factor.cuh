// The triangular matrix that makes a panel of columns orthonormal, from the panel's Gram matrix, by one
// block; and on the way the decision which columns to keep.
#pragma once
#include <cstdint>

#include "kernels/primitives/block.cuh"
#include "kernels/primitives/shared.cuh"
#include "kernels/product.cuh"

namespace keeplora {

constexpr int kPanel = gpu::kColumns;

// A column whose part outside everything to its left is at most this many eps of its length is dropped: that
// part is the rounding of the column's own entries, not a direction the caller meant.
// The same number is KEPT_EPS of keeplora/ops.
constexpr double kKeptEps = 32;

// A column is not decided where making the panel orthonormal would lose more than the root of this many eps
// of it: the columns kept so far are rounded when they are written, and the column's part along each loses as
// much. It also keeps the roundings of the smallest kept columns, 32 eps, well below their length.
constexpr double kLost = 64;

struct FactorSpace {
  double *scale, *limit;  // by column: of the panel
  double *row, *error;    // by kept column: a new column's part along it; its squared rounding error in eps
  double* sums;
  int *column, *place;  // of a kept column in the panel; the other way round, -1 for a dropped one

  static constexpr size_t bytes() {
    return 4 * gpu::shared_bytes<double>(kPanel) + gpu::shared_bytes<double>(3 * gpu::kProductWarps) +
           2 * gpu::shared_bytes<int>(kPanel);
  }
  __device__ explicit FactorSpace(gpu::SharedArena& arena)
      : scale(arena.take<double>(kPanel)),
        limit(arena.take<double>(kPanel)),
        row(arena.take<double>(kPanel)),
        error(arena.take<double>(kPanel)),
        sums(arena.take<double>(3 * gpu::kProductWarps)),
        column(arena.take<int>(kPanel)),
        place(arena.take<int>(kPanel)) {}
};

constexpr int kPacked = kPanel * (kPanel + 1) / 2;  // numbers of an upper triangle

__device__ inline int packed(int row, int column) {
  return column * (column + 1) / 2 + row;
}

// What became of a panel: its first `decided` columns are kept or dropped, `kept` is how many are kept.
struct Decided {
  int columns, kept;
};

// gram: W^T W of the panel W, of `n` columns; both matrices have rows of `pitch` numbers. Writes `transform`,
// [n, kept], such that W transform has orthonormal columns spanning the decided columns of W.
//
// With `lengths` (squares, of the columns before anything was taken out of them) columns are dropped, and the
// first column that the Gram matrix is too inexact to decide about ends the decided ones; a panel's first
// column that is not dropped is always decided. Without `lengths` all columns are kept.
//
// `upper` is shared memory for kPacked numbers. Column j of it is one of the scaled Gram matrix until step j,
// and later one of R^-1, where R is the Cholesky factor over the kept columns. `noise` is the error of an
// entry of the scaled Gram matrix. Every thread of a block of kProductThreads must call, and meet at a
// barrier before.
template <typename T>
__device__ Decided factor(const double* gram, const double* lengths, int n, int pitch, double noise,
                          double* upper, const FactorSpace& space, T* transform) {
  constexpr double kEps = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
  const int pair = threadIdx.x / 2, half = threadIdx.x % 2;  // two threads per column kept so far
  if (half == 0) space.error[pair] = 0;
  if (pair < n && half == 0) {
    const double square = gram[pair * pitch + pair];
    space.scale[pair] = 1 / sqrt(square);
    space.limit[pair] = lengths ? kKeptEps * kEps * kKeptEps * kEps * lengths[pair] / square : 0;
    space.place[pair] = -1;
  }
  __syncthreads();  // scales are there
  for (int i = threadIdx.x; i < n * n; i += gpu::kProductThreads) {
    const int row = i / n, column = i % n;
    if (row <= column)
      upper[packed(row, column)] = gram[row * pitch + column] * space.scale[row] * space.scale[column];
  }
  // The first kept column passes three barriers before anyone reads the scaled Gram matrix.

  Decided done{0, 0};
  for (; done.columns < n; ++done.columns) {
    const int j = done.columns, kept = done.kept;
    const double limit = space.limit[j];
    if (!(limit < 1)) continue;  // not even with the columns of this panel; NaN comes here too

    // In the coordinates of the orthonormal columns, r; in those of the kept columns, c.
    double r = 0, c = 0;
    if (pair < kept)
      for (int i = half; i <= pair; i += 2)
        r += upper[packed(i, pair)] * upper[packed(space.column[i], j)];
    r += __shfl_xor_sync(gpu::kAllLanes, r, 1);
    if (half == 0) space.row[pair] = r;
    const double part = half == 0 ? r * r : 0;
    const double inside = gpu::block_sum<gpu::kProductWarps>(part, space.sums);
    const double inherited =
        gpu::block_sum<gpu::kProductWarps>(part * space.error[pair], space.sums + gpu::kProductWarps);
    for (int i = pair + half; i < kept; i += 2)
      c += upper[packed(pair, i)] * space.row[i];
    c += __shfl_xor_sync(gpu::kAllLanes, c, 1);
    const double growth =
        1 + gpu::block_sum<gpu::kProductWarps>(half == 0 ? c * c : 0, space.sums + 2 * gpu::kProductWarps);

    const double square = 1 - inside;     // of what is left of the column
    const double error = noise * growth;  // of `square`, from the Gram matrix
    if (lengths) {  // the first kept column passes: nothing is taken out of it, and its limit is below 1
      if (square + error <= limit) continue;
      if (!(16 * error < square && growth + inherited < kLost)) break;
    }
    const double inverse = 1 / sqrt(square);
    if (half == 0 && pair <= kept) upper[packed(pair, kept)] = pair < kept ? -c * inverse : inverse;
    if (threadIdx.x == 0) {
      space.error[kept] = growth / square;
      space.column[kept] = j;
      space.place[j] = kept;
    }
    ++done.kept;
    __syncthreads();  // the new column is there
  }

  for (int i = threadIdx.x; i < n * done.kept; i += gpu::kProductThreads) {
    const int column = i / done.kept, to = i % done.kept, from = space.place[column];
    const double value = from >= 0 && from <= to ? upper[packed(from, to)] * space.scale[column] : 0;
    transform[column * pitch + to] = static_cast<T>(value);
  }
  return done;
}

}  // namespace keeplora
