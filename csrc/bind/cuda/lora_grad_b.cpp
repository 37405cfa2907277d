#include "kernels/lora_grad_b.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

constexpr const char* kOp = "lora_grad_b";

std::tuple<Tensor, std::vector<Tensor>> lora_grad_b_cuda(Tensor x, Tensor dy, std::vector<Tensor> a,
                                                         std::vector<int64_t> rows,
                                                         std::vector<double> scale) {
  const size_t n = a.size();
  STD_TORCH_CHECK(rows.size() == 2 * n && scale.size() == n, kOp, ": rows and scale must have ", 2 * n,
                  " and ", n, " numbers for ", n, " of a, got ", rows.size(), " and ", scale.size());
  check_matrix_of_any_dtype(kOp, "x", x, x);
  check_matrix_of_any_dtype(kOp, "dy", dy, x);
  STD_TORCH_CHECK(dy.size(0) == x.size(0), kOp, ": dy must have the ", x.size(0), " tokens of x, got ",
                  dy.size(0));
  int64_t ranks = 0;
  for (size_t i = 0; i < n; ++i) {
    check_matrix_of_any_dtype(kOp, "a", a[i], x);
    check_matrix(kOp, "a", a[i], a[0]);
    STD_TORCH_CHECK(a[i].size(1) == x.size(1), kOp, ": a must have ", x.size(1), " columns, got ",
                    a[i].size(1), " in adapter ", i);
    STD_TORCH_CHECK(0 <= rows[2 * i] && rows[2 * i] <= rows[2 * i + 1] && rows[2 * i + 1] <= dy.size(1), kOp,
                    ": rows must satisfy 0 <= start <= stop <= ", dy.size(1), ", got (", rows[2 * i], ", ",
                    rows[2 * i + 1], ") for adapter ", i);
    a[i] = torch::stable::contiguous(a[i]);
    ranks += a[i].size(0);
  }
  if (x.stride(1) != 1) x = torch::stable::contiguous(x);
  if (dy.stride(1) != 1) dy = torch::stable::contiguous(dy);

  const auto format = [](const Tensor& tensor) { return format_of(kOp, tensor.scalar_type()); };
  const bool is_double = format(x) == gpu::Format::kFloat64 || format(dy) == gpu::Format::kFloat64 ||
                         (n > 0 && format(a[0]) == gpu::Format::kFloat64);
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor t = torch::stable::new_empty(x, {x.size(0), ranks}, dtype);
  std::vector<Tensor> db;
  for (size_t i = 0; i < n; ++i)
    db.push_back(torch::stable::new_empty(x, {rows[2 * i + 1] - rows[2 * i], a[i].size(0)}, dtype));
  if (n == 0) return {t, db};
  for_master_dtype(kOp, dtype, [&](auto* tag) {
    using T = ElementOf<decltype(tag)>;
    const LoraGradBProblem<T> problem{x.const_data_ptr(),
                                      dy.const_data_ptr(),
                                      t.mutable_data_ptr<T>(),
                                      x.stride(0),
                                      dy.stride(0),
                                      static_cast<int>(x.size(0)),
                                      static_cast<int>(x.size(1)),
                                      format(x),
                                      format(dy),
                                      format(a[0])};
    std::vector<LoraGradBAdapter<T>> adapters;
    for (size_t i = 0; i < n; ++i)
      adapters.push_back({a[i].const_data_ptr(), db[i].mutable_data_ptr<T>(), static_cast<int>(a[i].size(0)),
                          static_cast<int>(rows[2 * i]), static_cast<int>(rows[2 * i + 1]),
                          static_cast<T>(scale[i])});
    const int count = static_cast<int>(n);
    Tensor workspace = torch::stable::new_empty(x, {lora_grad_b_workspace(problem, adapters.data(), count)},
                                                ScalarType::Byte);
    check_launch(kOp, lora_grad_b(problem, adapters.data(), count, workspace.mutable_data_ptr(),
                                  current_stream(x.get_device_index())));
  });
  return {t, db};
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("lora_grad_b", TORCH_BOX(&lora_grad_b_cuda));
}

}  // namespace
}  // namespace keeplora
