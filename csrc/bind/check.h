// Checks that protect memory. Rules for users are checked, with better messages, in keeplora/ops.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace keeplora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Kernels count rows, columns and tiles in ints, which they round up to whole tiles.
constexpr int64_t kMostRows = (int64_t{1} << 31) - (1 << 16);

// `t` is a matrix on the device of `like`, and no dimension overflows an int.
inline void check_matrix_of_any_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must be a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(0) <= kMostRows && t.size(1) <= kMostRows, op, ": ", name,
                  " must have dimensions of at most ", kMostRows, ", got [", t.size(0), ", ", t.size(1), "]");
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on GPU ", like.get_device_index(), ", got device index ", t.get_device_index());
}

// `t` also has the dtype of `like`.
inline void check_matrix(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_matrix_of_any_dtype(op, name, t, like);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name,
                  " must have the dtype of the first matrix");
}

}  // namespace keeplora
