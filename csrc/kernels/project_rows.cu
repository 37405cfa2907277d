#include "kernels/project_rows.h"

#include "kernels/projection.cuh"

namespace keeplora {
namespace {

template <typename T>
struct ProjectRows {
  using Number = T;
  static constexpr bool kPrepares = false;
  struct Entry : projection::Problem<T> {
    const T* g;
    T* out;
    T scale;
  };
  struct Common {};
  int passes;

  __device__ Common common(const Entry&, int) const { return {}; }

  __device__ const T* source(const Entry& entry, int round) const { return round == 0 ? entry.g : entry.out; }

  // The scale belongs to the last pass; the leak does not change with it.
  __device__ T finish(const Entry& entry, int round, int64_t at, T inside, Common) const {
    const T left = source(entry, round)[at] - inside;
    return entry.out[at] = round == passes - 1 ? entry.scale * left : left;
  }
};

template <typename T>
cudaError_t run(const ProjectRowsProblem<T>* problems, int count, int passes, T* leak,
                gpu::Workspace& workspace, cudaStream_t stream) {
  const auto fill = [&](typename ProjectRows<T>::Entry& entry, int i, gpu::Workspace&) {
    const ProjectRowsProblem<T>& problem = problems[i];
    entry.q = problem.q;
    entry.rows = static_cast<int>(problem.rows);
    entry.d = problem.d;
    entry.k = problem.k;
    entry.g = problem.g;
    entry.out = problem.out;
    entry.scale = problem.scale;
  };
  return projection::run(ProjectRows<T>{passes}, fill, count, passes, false, leak, workspace, stream);
}

}  // namespace

template <typename T>
int64_t project_rows_workspace(const ProjectRowsProblem<T>* problems, int count, int passes) {
  gpu::Workspace counted;
  run<T>(problems, count, passes, nullptr, counted, nullptr);
  return counted.needed();
}

template <typename T>
cudaError_t project_rows(const ProjectRowsProblem<T>* problems, int count, int passes, T* leak,
                         void* workspace, cudaStream_t stream) {
  gpu::Workspace memory(workspace);
  return run(problems, count, passes, leak, memory, stream);
}

#define INSTANTIATE(T)                                                                \
  template int64_t project_rows_workspace<T>(const ProjectRowsProblem<T>*, int, int); \
  template cudaError_t project_rows<T>(const ProjectRowsProblem<T>*, int, int, T*, void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace keeplora
