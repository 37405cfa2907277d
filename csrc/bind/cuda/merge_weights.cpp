#include "kernels/merge_weights.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

constexpr const char* kOp = "merge_weights";

// Queues the problems whose sums are formed in T.
template <typename T>
void run(const std::vector<Tensor>& w, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
         const std::vector<double>& scale, const std::vector<Tensor>& merged) {
  std::vector<MergeWeightsProblem<T>> problems;
  for (size_t i = 0; i < w.size(); ++i) {
    const gpu::Format formats[] = {format_of(kOp, w[i].scalar_type()), format_of(kOp, a[i].scalar_type()),
                                   format_of(kOp, b[i].scalar_type()),
                                   format_of(kOp, merged[i].scalar_type())};
    const bool is_double = formats[0] == gpu::Format::kFloat64 || formats[1] == gpu::Format::kFloat64 ||
                           formats[2] == gpu::Format::kFloat64;
    if (is_double != (sizeof(T) == 8)) continue;
    problems.push_back({w[i].const_data_ptr(), a[i].const_data_ptr(), b[i].const_data_ptr(),
                        merged[i].mutable_data_ptr(), w[i].stride(0), static_cast<int>(w[i].size(0)),
                        static_cast<int>(w[i].size(1)), static_cast<int>(a[i].size(0)),
                        static_cast<T>(scale[i]), formats[0], formats[1], formats[2], formats[3]});
  }
  check_launch(kOp, merge_weights(problems.data(), static_cast<int>(problems.size()),
                                  current_stream(w[0].get_device_index())));
}

std::vector<Tensor> merge_weights_cuda(std::vector<Tensor> w, std::vector<Tensor> a, std::vector<Tensor> b,
                                       std::vector<double> scale, std::optional<ScalarType> dtype) {
  // The dispatcher comes here only with a tensor on a GPU.
  const size_t n = w.size();
  STD_TORCH_CHECK(n > 0 && a.size() == n && b.size() == n && scale.size() == n, kOp,
                  ": w, a, b and scale must have one length, got ", n, ", ", a.size(), ", ", b.size(),
                  " and ", scale.size());
  for (size_t i = 0; i < n; ++i) {
    check_matrix_of_any_dtype(kOp, "w", w[i], w[0]);
    check_matrix_of_any_dtype(kOp, "a", a[i], w[0]);
    check_matrix_of_any_dtype(kOp, "b", b[i], w[0]);
    STD_TORCH_CHECK(
        b[i].size(0) == w[i].size(0) && a[i].size(1) == w[i].size(1) && b[i].size(1) == a[i].size(0), kOp,
        ": b times a must have the shape of w, got [", b[i].size(0), ", ", b[i].size(1), "] times [",
        a[i].size(0), ", ", a[i].size(1), "] for [", w[i].size(0), ", ", w[i].size(1), "] in problem ", i);
    if (w[i].stride(1) != 1) w[i] = torch::stable::contiguous(w[i]);
    a[i] = torch::stable::contiguous(a[i]);
    b[i] = torch::stable::contiguous(b[i]);
  }

  const torch::stable::accelerator::DeviceGuard guard(w[0].get_device_index());
  std::vector<Tensor> merged;
  for (const Tensor& weight : w)
    merged.push_back(torch::stable::new_empty(weight, weight.sizes(), dtype.value_or(weight.scalar_type())));
  run<float>(w, a, b, scale, merged);
  run<double>(w, a, b, scale, merged);
  return merged;
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("merge_weights", TORCH_BOX(&merge_weights_cuda));
}

}  // namespace
}  // namespace keeplora
