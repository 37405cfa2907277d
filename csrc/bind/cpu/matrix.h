// What the CPU's kernels see of a tensor.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace keeplora::cpu {

constexpr int64_t kGrain = 1 << 18;  // multiplications that are worth a thread

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  const T& at(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
};

template <typename T>
Matrix<T> matrix_of(const torch::stable::Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

constexpr int64_t padded(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

}  // namespace keeplora::cpu
