// C functions through which the tests call the emulated projected_adamw:
// the launcher's arguments as parallel arrays.
#include <cstdint>
#include <vector>

#include "kernels/projected_adamw.h"

namespace {

template <typename T>
int projected_adamw(int count, T* const* a, T* const* m, T* const* v, const void* const* grad,
                    const int64_t* formats, const T* const* q, const int64_t* shapes, const T* lr,
                    const float* const* steps, const double* hyper, T* leak) {
  std::vector<keeplora::ProjectedAdamWProblem<T>> problems;
  for (int i = 0; i < count; ++i)
    problems.push_back({a[i], m[i], v[i], grad[i], static_cast<gpu::Format>(formats[i]), q[i], shapes[3 * i],
                        static_cast<int>(shapes[3 * i + 1]), static_cast<int>(shapes[3 * i + 2]), lr[i],
                        i % 2 ? steps[i] : nullptr, i % 2 ? 0 : *steps[i]});
  std::vector<unsigned char> workspace(keeplora::projected_adamw_workspace(problems.data(), count), 0xff);
  return keeplora::projected_adamw(problems.data(), count, {hyper[0], hyper[1], hyper[2], hyper[3]}, leak,
                                   workspace.data(), nullptr);
}

}  // namespace

extern "C" {

// shapes: rows, d, k of each problem; steps: every other one is read by the kernel, like one in device
// memory; hyper: beta1, beta2, eps, weight decay. Returns 0 or a cudaError_t.
int emulate_projected_adamw_float(int count, float* const* a, float* const* m, float* const* v,
                                  const void* const* grad, const int64_t* formats, const float* const* q,
                                  const int64_t* shapes, const float* lr, const float* const* steps,
                                  const double* hyper, float* leak) {
  return projected_adamw(count, a, m, v, grad, formats, q, shapes, lr, steps, hyper, leak);
}

int emulate_projected_adamw_double(int count, double* const* a, double* const* m, double* const* v,
                                   const void* const* grad, const int64_t* formats, const double* const* q,
                                   const int64_t* shapes, const double* lr, const float* const* steps,
                                   const double* hyper, double* leak) {
  return projected_adamw(count, a, m, v, grad, formats, q, shapes, lr, steps, hyper, leak);
}

}  // extern "C"
