// The library's only switches over dtypes.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

#include "kernels/format.h"

namespace keeplora {

template <typename Tag>
using ElementOf = std::remove_pointer_t<Tag>;

// Calls `body`, a generic lambda, with a null pointer of the element type. float and double: the dtypes of
// bases and adapters, where rounding to 16 bits would break orthogonality.
template <typename Body>
void for_master_dtype(const char* op, torch::headeronly::ScalarType dtype, Body&& body) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case torch::headeronly::ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32 or float64, got ", dtype);
  }
}

// The format of a floating tensor, for kernels that look at it at run time.
inline gpu::Format format_of(const char* op, torch::headeronly::ScalarType dtype) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return gpu::Format::kFloat32;
    case torch::headeronly::ScalarType::Double:
      return gpu::Format::kFloat64;
    case torch::headeronly::ScalarType::BFloat16:
      return gpu::Format::kBfloat16;
    case torch::headeronly::ScalarType::Half:
      return gpu::Format::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be a floating dtype of at most 64 bits, got ", dtype);
  }
}

}  // namespace keeplora
