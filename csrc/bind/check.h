// Checks that protect memory. Rules for users are checked, with better messages, in keeplora/ops.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

namespace keeplora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `t` is a matrix on the device of `like`, and no dimension overflows an int.
inline void check_matrix_of_any_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must be a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(0) <= limit && t.size(1) <= limit, op, ": ", name,
                  " must have dimensions below 2^31, got [", t.size(0), ", ", t.size(1), "]");
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
