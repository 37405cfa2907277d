// Row ranges, rows without an adapter (r = 0) and A's that are cast into their stack (r = 0, too) are
// problems of one launch.
#include "kernels/merge_weights.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"
#include "bind/merge_places.h"

namespace keeplora {
namespace {

constexpr const char* kOp = "merge_weights";

// out's rows from `to` on = rows [start, stop) of w, merged if there is an adapter. All but w, out: dense.
struct Merged {
  const Tensor& w;
  int64_t start, stop;
  const Tensor& out;
  int64_t to;
  const Tensor *a, *b, *origin;
  double scale;
};

template <typename T>
MergeWeightsProblem<T> problem_of(const Merged& merged) {
  const auto format = [](const Tensor& tensor) { return format_of(kOp, tensor.scalar_type()); };
  MergeWeightsProblem<T> problem{};
  problem.w_format = format(merged.w), problem.out_format = format(merged.out);
  problem.pitch = merged.w.stride(0);
  problem.w = static_cast<const char*>(merged.w.const_data_ptr()) +
              merged.start * problem.pitch * static_cast<int64_t>(merged.w.element_size());
  problem.rows = static_cast<int>(merged.stop - merged.start);
  problem.cols = static_cast<int>(merged.w.size(1));
  problem.out = static_cast<char*>(merged.out.mutable_data_ptr()) +
                merged.to * merged.out.size(1) * static_cast<int64_t>(merged.out.element_size());
  if (merged.a == nullptr) return problem;
  problem.a = merged.a->const_data_ptr(), problem.a_format = format(*merged.a);
  problem.b = merged.b->const_data_ptr(), problem.b_format = format(*merged.b);
  problem.r = static_cast<int>(merged.a->size(0)), problem.scale = static_cast<T>(merged.scale);
  if (merged.origin == nullptr) return problem;
  problem.origin = merged.origin->const_data_ptr(), problem.origin_format = format(*merged.origin);
  return problem;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> merge_weights_cuda(
    std::vector<Tensor> w, std::vector<Tensor> a, std::vector<Tensor> b, std::vector<Tensor> origin,
    std::vector<int64_t> place, std::vector<double> scale, bool stack, std::optional<ScalarType> dtype) {
  // The dispatcher comes here only with a tensor on a GPU.
  STD_TORCH_CHECK(!w.empty(), kOp, ": w must have a matrix, got none");
  for (Tensor& weight : w) {
    check_matrix_of_any_dtype(kOp, "w", weight, w[0]);
    if (weight.stride(1) != 1) weight = torch::stable::contiguous(weight);
  }
  const auto densely = [&](const char* name, std::vector<Tensor>& tensors) {
    for (Tensor& tensor : tensors) {
      check_matrix_of_any_dtype(kOp, name, tensor, w[0]);
      tensor = torch::stable::contiguous(tensor);
    }
  };
  densely("a", a);
  densely("b", b);
  densely("origin", origin);
  const MergePlaces places = merge_places(kOp, w, a, b, origin, place, scale);

  const torch::stable::accelerator::DeviceGuard guard(w[0].get_device_index());
  std::vector<Tensor> merged, stacked;
  std::vector<MergeWeightsProblem<float>> singles;
  std::vector<MergeWeightsProblem<double>> doubles;
  for (size_t k = 0; k < w.size(); ++k) {
    const ScalarType to = dtype.value_or(w[k].scalar_type());
    const auto add = [&](bool any, const Merged& one) {
      any ? doubles.push_back(problem_of<double>(one)) : singles.push_back(problem_of<float>(one));
    };
    const bool any = places.is_double(k, w, a, b);
    const Tensor& out = merged.emplace_back(torch::stable::new_empty(w[k], w[k].sizes(), to));
    for (const auto& [start, stop, j] : places.rows[k])
      if (j < 0)
        add(any, {w[k], start, stop, out, start, nullptr, nullptr, nullptr, 0});
      else
        add(any, {w[k], start, stop, out, start, &a[j], &b[j], places.origin[j], scale[j]});
    if (!stack) continue;
    const Tensor& rows =
        stacked.emplace_back(torch::stable::new_empty(w[k], {places.ranks(k, a), w[k].size(1)}, to));
    int64_t row = 0;
    for (const int64_t j : places.adapters[k]) {
      add(any, {a[j], 0, a[j].size(0), rows, row, nullptr, nullptr, nullptr, 0});
      row += a[j].size(0);
    }
  }
  const cudaStream_t stream = current_stream(w[0].get_device_index());
  check_launch(kOp, merge_weights(singles.data(), static_cast<int>(singles.size()), stream));
  check_launch(kOp, merge_weights(doubles.data(), static_cast<int>(doubles.size()), stream));
  return {merged, stacked};
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("merge_weights", TORCH_BOX(&merge_weights_cuda));
}

}  // namespace
}  // namespace keeplora
