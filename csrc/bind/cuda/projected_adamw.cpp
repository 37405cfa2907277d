#include "kernels/projected_adamw.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

constexpr const char* kOp = "projected_adamw";

// A matrix that is written in place, shaped like `like`.
void check_state(const char* name, const Tensor& t, const Tensor& like) {
  check_matrix(kOp, name, t, like);
  STD_TORCH_CHECK(t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.is_contiguous(), kOp, ": ",
                  name, " must be contiguous [", like.size(0), ", ", like.size(1), "], got [", t.size(0),
                  ", ", t.size(1), "]");
}

Tensor projected_adamw_cuda(std::vector<Tensor> a, std::vector<Tensor> grad, std::vector<Tensor> exp_avg,
                            std::vector<Tensor> exp_avg_sq, std::vector<Tensor> q, std::vector<Tensor> step,
                            std::vector<double> lr, double beta1, double beta2, double eps,
                            double weight_decay) {
  // The dispatcher comes here only with a tensor on a GPU.
  const size_t n = a.size();
  STD_TORCH_CHECK(n > 0 && grad.size() == n && exp_avg.size() == n && exp_avg_sq.size() == n &&
                      q.size() == n && step.size() == n && lr.size() == n,
                  kOp, ": a, grad, exp_avg, exp_avg_sq, q, step and lr must have one length, got ", n, ", ",
                  grad.size(), ", ", exp_avg.size(), ", ", exp_avg_sq.size(), ", ", q.size(), ", ",
                  step.size(), " and ", lr.size());
  for (size_t i = 0; i < n; ++i) {
    check_matrix(kOp, "a", a[i], a[0]);
    check_state("a", a[i], a[i]);
    check_state("exp_avg", exp_avg[i], a[i]);
    check_state("exp_avg_sq", exp_avg_sq[i], a[i]);
    check_matrix(kOp, "q", q[i], a[0]);
    STD_TORCH_CHECK(q[i].size(0) == a[i].size(1), kOp, ": q must have ", a[i].size(1), " rows, got ",
                    q[i].size(0), " in problem ", i);
    check_matrix(kOp, "grad", grad[i], grad[i]);
    STD_TORCH_CHECK(grad[i].size(0) == a[i].size(0) && grad[i].size(1) == a[i].size(1) &&
                        grad[i].get_device_index() == a[i].get_device_index(),
                    kOp, ": grad must be [", a[i].size(0), ", ", a[i].size(1),
                    "] on the GPU of a in problem ", i);
    STD_TORCH_CHECK(step[i].dim() == 0 && step[i].scalar_type() == ScalarType::Float &&
                        (step[i].is_cpu() || step[i].get_device_index() == a[i].get_device_index()),
                    kOp, ": step must be float32 without dimensions, on the CPU or the GPU of a in problem ",
                    i);
    grad[i] = torch::stable::contiguous(grad[i]);
    q[i] = torch::stable::contiguous(q[i]);
  }

  const torch::stable::accelerator::DeviceGuard guard(a[0].get_device_index());
  Tensor leak = torch::stable::new_empty(a[0], {static_cast<int64_t>(n)});
  for_master_dtype(kOp, a[0].scalar_type(), [&](auto* tag) {
    using T = ElementOf<decltype(tag)>;
    std::vector<ProjectedAdamWProblem<T>> problems;
    for (size_t i = 0; i < n; ++i) {
      const float* count = step[i].const_data_ptr<float>();
      const bool on_host = step[i].is_cpu();
      problems.push_back({a[i].mutable_data_ptr<T>(), exp_avg[i].mutable_data_ptr<T>(),
                          exp_avg_sq[i].mutable_data_ptr<T>(), grad[i].const_data_ptr(),
                          format_of(kOp, grad[i].scalar_type()), q[i].const_data_ptr<T>(), a[i].size(0),
                          static_cast<int>(a[i].size(1)), static_cast<int>(q[i].size(1)),
                          static_cast<T>(lr[i]), on_host ? nullptr : count, on_host ? *count : 0});
    }
    const int count = static_cast<int>(n);
    Tensor workspace =
        torch::stable::new_empty(a[0], {projected_adamw_workspace(problems.data(), count)}, ScalarType::Byte);
    check_launch(kOp, projected_adamw(problems.data(), count, {beta1, beta2, eps, weight_decay},
                                      leak.mutable_data_ptr<T>(), workspace.mutable_data_ptr(),
                                      current_stream(a[0].get_device_index())));
  });
  return leak;
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("projected_adamw", TORCH_BOX(&projected_adamw_cuda));
}

}  // namespace
}  // namespace keeplora
