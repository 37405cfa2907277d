// The library's only switch over dtypes. The body is a generic lambda that receives a null pointer of the
// element type.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

namespace keeplora {

template <typename Tag>
using ElementOf = std::remove_pointer_t<Tag>;

// float and double: the dtypes of bases and adapters, where rounding to 16 bits would break orthogonality.
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

}  // namespace keeplora
