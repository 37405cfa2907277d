#include "kernels/lora_grad_b.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"
#include "bind/spans.h"

namespace keeplora {
namespace {

constexpr const char* kOp = "lora_grad_b";

std::vector<Tensor> lora_grad_b_cuda(Tensor dy, Tensor t, std::vector<int64_t> place,
                                     std::vector<double> scale) {
  check_matrix_of_any_dtype(kOp, "dy", dy, dy);
  check_matrix_of_any_dtype(kOp, "t", t, dy);
  STD_TORCH_CHECK(dy.size(0) == t.size(0), kOp, ": t must have the ", dy.size(0), " tokens of dy, got ",
                  t.size(0));
  check_spans(kOp, dy, t, place, scale);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  if (dy.stride(1) != 1) dy = torch::stable::contiguous(dy);
  if (t.stride(1) != 1) t = torch::stable::contiguous(t);
  const gpu::Format dy_format = format_of(kOp, dy.scalar_type()), t_format = format_of(kOp, t.scalar_type());
  const bool is_double = dy_format == gpu::Format::kFloat64 || t_format == gpu::Format::kFloat64;
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> db;
  for_master_dtype(kOp, dtype, [&](auto* tag) {
    using T = ElementOf<decltype(tag)>;
    std::vector<LoraGradBAdapter<T>> adapters;
    for (size_t i = 0; i < scale.size(); ++i) {
      const auto at = [&](size_t j) { return static_cast<int>(place[4 * i + j]); };
      db.push_back(torch::stable::new_empty(dy, {at(3) - at(2), at(1) - at(0)}, dtype));
      adapters.push_back(
          {db[i].mutable_data_ptr<T>(), at(0), at(1) - at(0), at(2), at(3), static_cast<T>(scale[i])});
    }
    const LoraGradBProblem problem{
        dy.const_data_ptr(),          t.const_data_ptr(), dy.stride(0), t.stride(0),
        static_cast<int>(dy.size(0)), dy_format,          t_format};
    check_launch(kOp, lora_grad_b(problem, adapters.data(), static_cast<int>(adapters.size()),
                                  current_stream(dy.get_device_index())));
  });
  return db;
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("lora_grad_b", TORCH_BOX(&lora_grad_b_cuda));
}

}  // namespace
}  // namespace keeplora
