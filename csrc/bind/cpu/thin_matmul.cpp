// thin_matmul: c x a^T for a long x and an `a` of few rows, as LoRA has them.
//
// A gemm packs both factors before it multiplies, which for so few columns costs as much as the product.
// Here x is read once, from where it lies, and `a` is packed so that the numbers of a step are neighbours. A
// tile is some rows of x by one to three vectors of results. More rows than 8 lose: rows that lie 2^n bytes
// apart, with those fetched ahead, push each other out of the first cache; nor do more sums fit in registers.
//
// Every result is summed by one thread in one order. What a prefetch asks for may lie beyond x: that is no
// access.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "bind/cpu/levels.h"
#include "bind/cpu/matrix.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

using cpu::Buffer;
using cpu::Matrix;
using cpu::matrix_of;
using cpu::padded;
using cpu::Wide;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "thin_matmul";

constexpr int64_t kBlockRows = 48;    // of x, which stay in the second cache for all panels of `a`
constexpr int64_t kBlockDepth = 512;  // of the summed index

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // numbers that come from memory together

// `a` as panels of `width` rows, zeros after the last: panel p holds a[p width + j][k] at [k][j].
template <typename T>
void pack_panels(const Matrix<T>& a, int64_t width, T* panels) {
  for (int64_t p = 0; p * width < a.rows; ++p)
    for (int64_t k = 0; k < a.columns; ++k)
      for (int64_t j = 0; j < width; ++j)
        *panels++ = p * width + j < a.rows ? a.at(p * width + j, k) : T(0);
}

// kColumns: vectors of results in a tile.
template <typename T, int kColumns>
struct ByRows {
  // Rows [begin, end) of the result [n][r].
  template <int kBytes>
  KEEPLORA_INLINE static void run(const Matrix<T>& x, const T* panels, int64_t r, T scale, T* result,
                                  int64_t begin, int64_t end) {
    constexpr int kRows = kBytes == 64 || kColumns == 1 ? 8 : 4;
    constexpr int64_t width = kColumns * kBytes / static_cast<int64_t>(sizeof(T));
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
            tile<kBytes, kRows>(block + i * x.row_stride, x.row_stride, panel, depth, out + i * width);
          for (; i < rows; ++i)
            tile<kBytes, 1>(block + i * x.row_stride, x.row_stride, panel, depth, out + i * width);
        }
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < std::min(width, r - p * width); ++j)
            result[(first + i) * r + p * width + j] = scale * out[i * width + j];
      }
    }
  }

  // out[N][width] += x[N][depth] panel[depth][width]
  template <int kBytes, int N>
  KEEPLORA_INLINE static void tile(const T* x, int64_t x_stride, const T* panel, int64_t depth, T* out) {
    constexpr int kLanes = kBytes / sizeof(T);
    Wide<T, kBytes> sum[N][kColumns] = {};
    for (int64_t k = 0; k < depth;) {
      const int64_t until = std::min(depth, k + kLine<T>);
      for (int i = 0; i < N; ++i)
        __builtin_prefetch(x + (N + i) * x_stride + k);  // the next tile's
      for (; k < until; ++k) {
        Wide<T, kBytes> step[kColumns];
        for (int j = 0; j < kColumns; ++j)
          cpu::load<kBytes>(step[j], panel + (k * kColumns + j) * kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i)
          for (int j = 0; j < kColumns; ++j)
            sum[i][j] += x[i * x_stride + k] * step[j];
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < kColumns; ++j) {
        Wide<T, kBytes> total;
        cpu::load<kBytes>(total, out + (i * kColumns + j) * kLanes);
        total += sum[i][j];
        cpu::store<kBytes>(out + (i * kColumns + j) * kLanes, total);
      }
  }
};

// In a tile: as many as leave the fewest columns empty, of equals those that read x the least. Only the 32
// registers of AVX-512 hold the sums of three.
int64_t vectors_of_results(int bytes, int64_t r, int64_t lanes) {
  if (r <= lanes) return 1;
  return bytes == 64 && padded(r, 3 * lanes) <= padded(r, 2 * lanes) ? 3 : 2;
}

template <typename T>
void multiply(const Matrix<T>& x, const Matrix<T>& a, T scale, T* result) {
  const int bytes = cpu::vector_bytes();
  const int64_t lanes = bytes / static_cast<int64_t>(sizeof(T));
  const int64_t columns = vectors_of_results(bytes, a.rows, lanes), width = columns * lanes;
  const Buffer<T> panels(padded(a.rows, width) * a.columns);
  pack_panels(a, width, panels.get());
  const int64_t grain = std::max<int64_t>(1, cpu::kGrain / std::max<int64_t>(1, a.rows * x.columns));
  torch::stable::parallel_for(0, x.rows, padded(grain, 8), [&](int64_t begin, int64_t end) {
    const T* from = panels.get();
    if (columns == 1)
      cpu::on_this_cpu<ByRows<T, 1>>(bytes, x, from, a.rows, scale, result, begin, end);
    else if (columns == 3)
      cpu::on_this_cpu<ByRows<T, 3>>(bytes, x, from, a.rows, scale, result, begin, end);
    else
      cpu::on_this_cpu<ByRows<T, 2>>(bytes, x, from, a.rows, scale, result, begin, end);
  });
}

Tensor thin_matmul_cpu(Tensor x, Tensor a, double scale) {
  STD_TORCH_CHECK(x.dim() == 2 && a.dim() == 2 && x.size(1) == a.size(1), kOp,
                  ": x and a must be matrices with equally many columns, got dimensions ", x.dim(), " and ",
                  a.dim());
  const bool is_double = x.scalar_type() == ScalarType::Double || a.scalar_type() == ScalarType::Double;
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  if (x.scalar_type() != dtype) x = torch::stable::to(x, dtype);
  if (a.scalar_type() != dtype) a = torch::stable::to(a, dtype);
  if (x.stride(1) != 1) x = torch::stable::contiguous(x);
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
