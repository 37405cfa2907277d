#include "kernels/sketch_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

constexpr const char* kOp = "sketch_rows";

void sketch_rows_cuda(Tensor out, Tensor x, Tensor delta, int64_t seed) {
  check_matrix(kOp, "out", out, out);
  check_matrix(kOp, "x", x, x);
  check_matrix(kOp, "delta", delta, delta);
  const bool wide = x.scalar_type() == ScalarType::Double || delta.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(out.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      out.is_contiguous() && out.size(1) == x.size(1),
                  kOp, ": out must be contiguous with ", x.size(1), " columns, ",
                  wide ? "float64" : "float32", ", got [", out.size(0), ", ", out.size(1), "]");
  STD_TORCH_CHECK(delta.size(0) == x.size(0), kOp, ": delta must have ", x.size(0), " rows, got ",
                  delta.size(0));
  STD_TORCH_CHECK(
      x.get_device_index() == out.get_device_index() && delta.get_device_index() == out.get_device_index(),
      kOp, ": x and delta must be on GPU ", out.get_device_index(), ", got ", x.get_device_index(), " and ",
      delta.get_device_index());
  x = torch::stable::contiguous(x);
  delta = torch::stable::contiguous(delta);

  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const SketchRowsProblem problem{x.const_data_ptr(),
                                  format_of(kOp, x.scalar_type()),
                                  delta.const_data_ptr(),
                                  format_of(kOp, delta.scalar_type()),
                                  out.mutable_data_ptr(),
                                  x.size(0),
                                  static_cast<int>(x.size(1)),
                                  static_cast<int>(delta.size(1)),
                                  static_cast<int>(out.size(0)),
                                  static_cast<uint64_t>(seed)};
  Tensor workspace = torch::stable::new_empty(out, {sketch_rows_workspace(problem)}, ScalarType::Byte);
  check_launch(kOp,
               sketch_rows(problem, workspace.mutable_data_ptr(), current_stream(out.get_device_index())));
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("sketch_rows", TORCH_BOX(&sketch_rows_cuda));
}

}  // namespace
}  // namespace keeplora
