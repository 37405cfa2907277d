// C functions through which the tests call the emulated lora_grad_b:
// the launcher's arguments as parallel arrays.
#include <cstdint>
#include <vector>

#include "kernels/lora_grad_b.h"

namespace {

template <typename T>
int lora_grad_b(const void* x, const void* dy, T* t, const int64_t* sizes, const int64_t* formats, int count,
                const void* const* a, T* const* db, const int64_t* ranges, const T* scale) {
  const auto format = [&](int i) { return static_cast<gpu::Format>(formats[i]); };
  const keeplora::LoraGradBProblem<T> problem{x,
                                              dy,
                                              t,
                                              sizes[2],
                                              sizes[3],
                                              static_cast<int>(sizes[0]),
                                              static_cast<int>(sizes[1]),
                                              format(0),
                                              format(1),
                                              format(2)};
  std::vector<keeplora::LoraGradBAdapter<T>> adapters;
  for (int i = 0; i < count; ++i) {
    const auto number = [&](int j) { return static_cast<int>(ranges[3 * i + j]); };
    adapters.push_back({a[i], db[i], number(0), number(1), number(2), scale[i]});
  }
  std::vector<unsigned char> workspace(keeplora::lora_grad_b_workspace(problem, adapters.data(), count),
                                       0xff);
  return keeplora::lora_grad_b(problem, adapters.data(), count, workspace.data(), nullptr);
}

}  // namespace

extern "C" {

// sizes: tokens, in, pitch of x, pitch of dy; formats: of x, dy, a; ranges: r, start, stop of each adapter.
// Returns 0 or a cudaError_t.
int emulate_lora_grad_b_float(const void* x, const void* dy, float* t, const int64_t* sizes,
                              const int64_t* formats, int count, const void* const* a, float* const* db,
                              const int64_t* ranges, const float* scale) {
  return lora_grad_b(x, dy, t, sizes, formats, count, a, db, ranges, scale);
}

int emulate_lora_grad_b_double(const void* x, const void* dy, double* t, const int64_t* sizes,
                               const int64_t* formats, int count, const void* const* a, double* const* db,
                               const int64_t* ranges, const double* scale) {
  return lora_grad_b(x, dy, t, sizes, formats, count, a, db, ranges, scale);
}

}  // extern "C"
