#include "kernels/project_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "bind/check.h"
#include "bind/cuda/stream.h"
#include "bind/dispatch.h"

namespace keeplora {
namespace {

std::tuple<std::vector<Tensor>, Tensor> project_rows_cuda(std::vector<Tensor> g, std::vector<Tensor> q,
                                                          std::vector<double> scale, int64_t passes) {
  // The dispatcher comes here only with a tensor on a GPU, so there is one problem at least.
  const size_t n = g.size();
  STD_TORCH_CHECK(n > 0 && q.size() == n && scale.size() == n,
                  "project_rows: g, q and scale must have one length, got ", n, ", ", q.size(), " and ",
                  scale.size());
  STD_TORCH_CHECK(passes >= 1 && passes <= 2, "project_rows: passes must be 1 or 2, got ", passes);
  for (size_t i = 0; i < n; ++i) {
    check_matrix("project_rows", "g", g[i], g[0]);
    check_matrix("project_rows", "q", q[i], g[0]);
    STD_TORCH_CHECK(q[i].size(0) == g[i].size(1), "project_rows: q must have ", g[i].size(1), " rows, got ",
                    q[i].size(0), " in problem ", i);
    g[i] = torch::stable::contiguous(g[i]);
    q[i] = torch::stable::contiguous(q[i]);
  }

  const torch::stable::accelerator::DeviceGuard guard(g[0].get_device_index());
  std::vector<Tensor> rows;
  for (const Tensor& matrix : g)
    rows.push_back(torch::stable::new_empty(matrix, matrix.sizes()));
  Tensor leak = torch::stable::new_empty(g[0], {static_cast<int64_t>(n)});
  for_master_dtype("project_rows", g[0].scalar_type(), [&](auto* tag) {
    using T = ElementOf<decltype(tag)>;
    std::vector<ProjectRowsProblem<T>> problems;
    for (size_t i = 0; i < n; ++i)
      problems.push_back({g[i].const_data_ptr<T>(), q[i].const_data_ptr<T>(), rows[i].mutable_data_ptr<T>(),
                          g[i].size(0), static_cast<int>(q[i].size(0)), static_cast<int>(q[i].size(1)),
                          static_cast<T>(scale[i])});
    const int count = static_cast<int>(n);
    const int rounds = static_cast<int>(passes);
    Tensor workspace = torch::stable::new_empty(
        g[0], {project_rows_workspace(problems.data(), count, rounds)}, ScalarType::Byte);
    check_launch("project_rows",
                 project_rows(problems.data(), count, rounds, leak.mutable_data_ptr<T>(),
                              workspace.mutable_data_ptr(), current_stream(g[0].get_device_index())));
  });
  return {rows, leak};
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CUDA, m) {
  m.impl("project_rows", TORCH_BOX(&project_rows_cuda));
}

}  // namespace
}  // namespace keeplora
