#include "kernels/projected_adamw.h"

#include <cmath>

#include "kernels/primitives/convert.cuh"
#include "kernels/projection.cuh"

namespace keeplora {
namespace {

constexpr int kRounds = 3;  // one takes Q out of the gradient, two out of the parameter

template <typename T>
constexpr gpu::Format kFormat = sizeof(T) == 4 ? gpu::Format::kFloat32 : gpu::Format::kFloat64;

template <typename T>
struct ProjectedAdamW {
  using Number = T;
  static constexpr bool kPrepares = true;
  struct Entry : projection::Problem<T> {
    T* a;
    T* exp_avg;
    T* exp_avg_sq;
    const void* grad;
    T* gradient;  // grad as numbers of T; in the workspace where they are not
    gpu::Format grad_format;
    T lr;
    float step;
    const float* step_at;
  };
  struct Common {
    T correction1;  // 1 - beta1^step
    T correction2;  // sqrt(1 - beta2^step)
  };
  T new1, beta2, new2, eps, weight_decay;  // new = 1 - beta, not to be had from a rounded beta
  double log_beta1, log_beta2;

  __device__ void prepare(const Entry& entry, int64_t at) const {
    if (entry.gradient != entry.grad) entry.gradient[at] = gpu::load<T>(entry.grad, entry.grad_format, at);
  }

  __device__ const T* source(const Entry& entry, int round) const {
    return round == 0 ? entry.gradient : entry.a;
  }

  __device__ Common common(const Entry& entry, int round) const {
    if (round != 0) return {};
    const double step = entry.step_at ? *entry.step_at : entry.step;
    return {static_cast<T>(-expm1(step * log_beta1)), static_cast<T>(sqrt(-expm1(step * log_beta2)))};
  }

  __device__ T finish(const Entry& entry, int round, int64_t at, T inside, const Common& common) const {
    const T left = source(entry, round)[at] - inside;
    return entry.a[at] = round == 0 ? step(entry, at, left, common) : left;
  }

  // AdamW's new value of element `at`, from its gradient.
  __device__ T step(const Entry& entry, int64_t at, T g, const Common& common) const {
    const T average = entry.exp_avg[at];
    const T m = average + new1 * (g - average);
    const T v = beta2 * entry.exp_avg_sq[at] + new2 * g * g;
    entry.exp_avg[at] = m;
    entry.exp_avg_sq[at] = v;
    const T decayed = entry.a[at] * (T(1) - entry.lr * weight_decay);
    return decayed - entry.lr / common.correction1 * (m / (sqrt(v) / common.correction2 + eps));
  }
};

template <typename T>
cudaError_t run(const ProjectedAdamWProblem<T>* problems, int count, const AdamWOptions& options, T* leak,
                gpu::Workspace& workspace, cudaStream_t stream) {
  bool prepares = false;
  for (int i = 0; i < count; ++i)
    prepares = prepares || problems[i].grad_format != kFormat<T>;
  const auto fill = [&](typename ProjectedAdamW<T>::Entry& entry, int i, gpu::Workspace& memory) {
    const ProjectedAdamWProblem<T>& problem = problems[i];
    entry.q = problem.q;
    entry.rows = static_cast<int>(problem.rows);
    entry.d = problem.d;
    entry.k = problem.k;
    entry.a = problem.a;
    entry.exp_avg = problem.exp_avg;
    entry.exp_avg_sq = problem.exp_avg_sq;
    entry.grad = problem.grad;
    entry.grad_format = problem.grad_format;
    entry.gradient = problem.grad_format == kFormat<T> ? static_cast<T*>(const_cast<void*>(problem.grad))
                                                       : memory.take<T>(problem.rows * problem.d);
    entry.lr = problem.lr;
    entry.step = problem.step;
    entry.step_at = problem.step_at;
  };
  const auto number = [](double value) { return static_cast<T>(value); };
  const ProjectedAdamW<T> op{
      number(1 - options.beta1),    number(options.beta2),   number(1 - options.beta2), number(options.eps),
      number(options.weight_decay), std::log(options.beta1), std::log(options.beta2)};
  return projection::run(op, fill, count, kRounds, prepares, leak, workspace, stream);
}

}  // namespace

template <typename T>
int64_t projected_adamw_workspace(const ProjectedAdamWProblem<T>* problems, int count) {
  gpu::Workspace counted;
  run<T>(problems, count, {}, nullptr, counted, nullptr);
  return counted.needed();
}

template <typename T>
cudaError_t projected_adamw(const ProjectedAdamWProblem<T>* problems, int count, const AdamWOptions& options,
                            T* leak, void* workspace, cudaStream_t stream) {
  gpu::Workspace memory(workspace);
  return run(problems, count, options, leak, memory, stream);
}

#define INSTANTIATE(T)                                                                                   \
  template int64_t projected_adamw_workspace<T>(const ProjectedAdamWProblem<T>*, int);                   \
  template cudaError_t projected_adamw<T>(const ProjectedAdamWProblem<T>*, int, const AdamWOptions&, T*, \
                                          void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace keeplora
