#include "kernels/orthonormalize.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

std::tuple<std::vector<Tensor>, Tensor> orthonormalize_cuda(std::vector<Tensor> y, std::vector<Tensor> q) {
  // The dispatcher comes here only with a tensor on a GPU, so there is one problem at least.
  const size_t n = y.size();
  STD_TORCH_CHECK(n > 0 && q.size() == n, "orthonormalize: y and q must have one length, got ", n, " and ",
                  q.size());
  for (size_t i = 0; i < n; ++i) {
    check_matrix("orthonormalize", "y", y[i], y[0]);
    check_matrix("orthonormalize", "q", q[i], y[0]);
    STD_TORCH_CHECK(q[i].size(0) == y[i].size(0), "orthonormalize: q must have ", y[i].size(0), " rows, got ",
                    q[i].size(0), " in problem ", i);
    y[i] = torch::stable::contiguous(y[i]);
    q[i] = torch::stable::contiguous(q[i]);
  }

  const torch::stable::accelerator::DeviceGuard guard(y[0].get_device_index());
  std::vector<Tensor> z;
  for (const Tensor& matrix : y)
    z.push_back(torch::stable::new_empty(matrix, matrix.sizes()));
  Tensor rank = torch::stable::new_empty(y[0], {static_cast<int64_t>(n)}, ScalarType::Long);
  for_master_dtype("orthonormalize", y[0].scalar_type(), [&](auto* tag) {
    using T = ElementOf<decltype(tag)>;
    std::vector<OrthonormalizeProblem<T>> problems;
    for (size_t i = 0; i < n; ++i)
      problems.push_back({y[i].const_data_ptr<T>(), q[i].const_data_ptr<T>(), z[i].mutable_data_ptr<T>(),
                          static_cast<int>(y[i].size(0)), static_cast<int>(y[i].size(1)),
                          static_cast<int>(q[i].size(1))});
    const int count = static_cast<int>(n);
    Tensor workspace =
        torch::stable::new_empty(y[0], {orthonormalize_workspace(problems.data(), count)}, ScalarType::Byte);
    check_launch("orthonormalize",
                 orthonormalize(problems.data(), count, rank.mutable_data_ptr<int64_t>(),
                                workspace.mutable_data_ptr(), current_stream(y[0].get_device_index())));
  });
  return {z, rank};
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("orthonormalize", TORCH_BOX(&orthonormalize_cuda));
}

}  // namespace
}  // namespace keeplora
