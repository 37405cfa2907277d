// thin_matmul: c x aᵀ for a long x and an `a` of few rows, as LoRA has them.
//
// A gemm packs both factors before it multiplies, which for so few columns costs as much as the product.
// Here x is read once, from where it lies. Two kernels, by the direction in which x is contiguous:
//
//  * along its rows (x Aᵀ of the forward pass): tiles of 6 rows of x by 2 vectors of results; `a` is packed
//    so that the numbers of a step are neighbours.
//  * along its columns (dyᵀ t of the backward pass): tiles of 3 vectors of results along x's columns by 4
//    rows of `a`, 16 of the summed index at a time: with more, rows that lie 2^n bytes apart push each
//    other out of the first cache.
//
// Both tiles use 12 of 16 vector registers for sums. Every result is summed by one thread in one order.
// What a prefetch asks for may lie beyond x: that is no access.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "bind/cpu/matrix.h"
#include "bind/cpu/vectors.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

using cpu::Buffer;
using cpu::kLanes;
using cpu::Matrix;
using cpu::matrix_of;
using cpu::padded;
using cpu::Vector;
using cpu::vector_at;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "thin_matmul";

// ---- x contiguous along its rows

constexpr int kRows = 6;              // of x in a tile
constexpr int kColumns = 2;           // vectors of results in a tile
constexpr int64_t kBlockRows = 48;    // of x, which stay in the second cache for all panels of `a`
constexpr int64_t kBlockDepth = 512;  // of the summed index

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // numbers that come from memory together
template <typename T>
constexpr int64_t kPanel = kColumns * kLanes<T>;

// `a` as panels of kPanel rows, zeros after the last: panel p holds a[p·kPanel + j][k] at [k][j].
template <typename T>
void pack_panels(const Matrix<T>& a, T* panels) {
  constexpr int64_t width = kPanel<T>;
  for (int64_t p = 0; p * width < a.rows; ++p)
    for (int64_t k = 0; k < a.columns; ++k)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t row = p * width + j;
        *panels++ = row < a.rows ? a.data[row * a.row_stride + k * a.column_stride] : T(0);
      }
}

// out[N][kPanel] += x[N][depth] panel[depth][kPanel]
template <typename T, int N>
KEEPLORA_INLINE void row_tile(const T* x, int64_t x_stride, const T* panel, int64_t depth, T* out) {
  Vector<T> sum[N][kColumns] = {};
  const auto step_on = [&](int64_t k) {
    Vector<T> step[kColumns];
    for (int j = 0; j < kColumns; ++j)
      step[j] = vector_at(panel + k * kPanel<T> + j * kLanes<T>);
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < kColumns; ++j)
        sum[i][j] += x[i * x_stride + k] * step[j];
  };
  int64_t k = 0;
  for (; k + kLine<T> <= depth; k += kLine<T>) {
    for (int i = 0; i < N; ++i)
      __builtin_prefetch(x + (N + i) * x_stride + k);  // the next tile's
    for (int64_t j = k; j < k + kLine<T>; ++j)
      step_on(j);
  }
  for (; k < depth; ++k)
    step_on(k);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < kColumns; ++j)
      vector_at(out + i * kPanel<T> + j * kLanes<T>) += sum[i][j];
}

// Rows [begin, end) of the result [n][r].
template <typename T>
KEEPLORA_EVERY_CPU void by_rows(const Matrix<T>& x, const T* panels, int64_t r, T scale, T* result,
                                int64_t begin, int64_t end) {
  constexpr int64_t width = kPanel<T>;
  alignas(64) T out[kBlockRows * width];
  for (int64_t first = begin; first < end; first += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - first);
    for (int64_t p = 0; p * width < r; ++p) {
      std::fill(out, out + rows * width, T(0));
      for (int64_t k = 0; k < x.columns; k += kBlockDepth) {
        const int64_t depth = std::min(kBlockDepth, x.columns - k);
        const T* panel = panels + (p * x.columns + k) * width;
        const T* block = x.data + first * x.row_stride + k;
        int64_t i = 0;
        for (; i + kRows <= rows; i += kRows)
          row_tile<T, kRows>(block + i * x.row_stride, x.row_stride, panel, depth, out + i * width);
        for (; i < rows; ++i)
          row_tile<T, 1>(block + i * x.row_stride, x.row_stride, panel, depth, out + i * width);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < std::min(width, r - p * width); ++j)
          result[(first + i) * r + p * width + j] = scale * out[i * width + j];
    }
  }
}

// ---- x contiguous along its columns

constexpr int kVectors = 3;        // of results in a tile, along a column of x
constexpr int kSteps = 4;          // rows of `a` in a tile
constexpr int64_t kBlockSum = 16;  // of the summed index

template <typename T>
constexpr int64_t kStrip = kVectors * kLanes<T>;

// sums[kSteps][kStrip] += a[k][a_stride]ᵀ x[k][x_stride] over `depth` of k.
template <typename T>
KEEPLORA_INLINE void column_tile(const T* x, int64_t x_stride, const T* a, int64_t a_stride, int64_t depth,
                                 T* sums) {
  Vector<T> sum[kSteps][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> part[kVectors];
    for (int v = 0; v < kVectors; ++v)
      part[v] = vector_at(x + k * x_stride + v * kLanes<T>);
    for (int j = 0; j < kSteps; ++j)
      for (int v = 0; v < kVectors; ++v)
        sum[j][v] += a[k * a_stride + j] * part[v];
  }
  for (int j = 0; j < kSteps; ++j)
    for (int v = 0; v < kVectors; ++v)
      vector_at(sums + j * kStrip<T> + v * kLanes<T>) += sum[j][v];
}

// Strips [begin, end) of kStrip rows each of the result [n][r]; `a` is packed as [columns][r padded].
template <typename T>
KEEPLORA_EVERY_CPU void by_columns(const Matrix<T>& x, const T* a, int64_t r, T scale, T* result,
                                   int64_t begin, int64_t end) {
  constexpr int64_t strip = kStrip<T>;
  const int64_t steps = padded(r, kSteps), size = (end - begin) * steps * strip;
  Buffer<T> sums(size);  // [strips][steps][strip]
  std::fill(sums.get(), sums.get() + size, T(0));
  alignas(64) T edge[kBlockSum * strip] = {};
  for (int64_t first = 0; first < x.columns; first += kBlockSum) {
    const int64_t depth = std::min(kBlockSum, x.columns - first);
    for (int64_t s = begin; s < end; ++s) {
      const T* from = x.data + first * x.column_stride + s * strip;
      int64_t stride = x.column_stride;
      const int64_t left = x.rows - s * strip;
      if (left < strip) {  // nothing is read beyond a strip that is not whole
        for (int64_t k = 0; k < depth; ++k)
          std::copy(from + k * stride, from + k * stride + left, edge + k * strip);
        from = edge;
        stride = strip;
      } else {
        const int64_t next = std::min(kBlockSum, x.columns - first - depth);
        for (int64_t k = depth; k < depth + next; ++k) {
          __builtin_prefetch(from + k * stride, 0, 2);
          __builtin_prefetch(from + k * stride + strip - 1, 0, 2);
        }
      }
      for (int64_t j = 0; j < steps; j += kSteps)
        column_tile<T>(from, stride, a + first * steps + j, steps, depth,
                       sums.get() + ((s - begin) * steps + j) * strip);
    }
  }
  for (int64_t row = begin * strip; row < std::min(end * strip, x.rows); ++row) {
    const T* from = sums.get() + (row / strip - begin) * steps * strip + row % strip;
    for (int64_t j = 0; j < r; ++j)
      result[row * r + j] = scale * from[j * strip];
  }
}

template <typename T>
void multiply(const Matrix<T>& x, const Matrix<T>& a, T scale, T* result) {
  if (x.column_stride == 1) {
    Buffer<T> panels(padded(a.rows, kPanel<T>) * a.columns);
    pack_panels(a, panels.get());
    const int64_t grain = std::max<int64_t>(1, cpu::kGrain / std::max<int64_t>(1, a.rows * x.columns));
    torch::stable::parallel_for(0, x.rows, padded(grain, kRows), [&](int64_t begin, int64_t end) {
      by_rows(x, panels.get(), a.rows, scale, result, begin, end);
    });
    return;
  }
  const int64_t steps = padded(a.rows, kSteps);
  Buffer<T> packed(steps * a.columns);
  for (int64_t k = 0; k < a.columns; ++k)
    for (int64_t j = 0; j < steps; ++j)
      packed.get()[k * steps + j] = j < a.rows ? a.data[j * a.row_stride + k * a.column_stride] : T(0);
  const int64_t grain = cpu::kGrain / std::max<int64_t>(1, a.rows * x.columns * kStrip<T>) + 1;
  torch::stable::parallel_for(
      0, padded(x.rows, kStrip<T>) / kStrip<T>, grain,
      [&](int64_t begin, int64_t end) { by_columns(x, packed.get(), a.rows, scale, result, begin, end); });
}

Tensor thin_matmul_cpu(Tensor x, Tensor a, double scale) {
  STD_TORCH_CHECK(x.dim() == 2 && a.dim() == 2 && x.size(1) == a.size(1), kOp,
                  ": x and a must be matrices with equally many columns, got dimensions ", x.dim(), " and ",
                  a.dim());
  const bool is_double = x.scalar_type() == ScalarType::Double || a.scalar_type() == ScalarType::Double;
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  if (x.scalar_type() != dtype) x = torch::stable::to(x, dtype);
  if (a.scalar_type() != dtype) a = torch::stable::to(a, dtype);
  if (x.stride(0) != 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
  Tensor result = torch::stable::new_empty(x, {x.size(0), a.size(0)}, dtype);
  if (x.size(0) == 0 || a.size(0) == 0) return result;
  for_master_dtype(kOp, dtype, [&](auto* tag) {
    using T = ElementOf<decltype(tag)>;
    multiply<T>(matrix_of<T>(x), matrix_of<T>(a), static_cast<T>(scale), result.mutable_data_ptr<T>());
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CPU, m) {
  m.impl("thin_matmul", TORCH_BOX(&thin_matmul_cpu));
}

}  // namespace
}  // namespace keeplora
