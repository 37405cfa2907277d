// C functions through which the tests call the emulated lora_grad_b:
// the launcher's arguments as parallel arrays.
#include <cstdint>
#include <vector>

#include "kernels/lora_grad_b.h"

namespace {

template <typename T>
int lora_grad_b(const void* dy, const void* t, const int64_t* sizes, const int64_t* formats, int count,
                T* const* db, const int64_t* places, const T* scale) {
  const keeplora::LoraGradBProblem problem{dy,
                                           t,
                                           sizes[1],
                                           sizes[2],
                                           static_cast<int>(sizes[0]),
                                           static_cast<gpu::Format>(formats[0]),
                                           static_cast<gpu::Format>(formats[1])};
  std::vector<keeplora::LoraGradBAdapter<T>> adapters;
  for (int i = 0; i < count; ++i) {
    const auto number = [&](int j) { return static_cast<int>(places[4 * i + j]); };
    adapters.push_back({db[i], number(0), number(1) - number(0), number(2), number(3), scale[i]});
  }
  return keeplora::lora_grad_b(problem, adapters.data(), count, nullptr);
}

}  // namespace

extern "C" {

// sizes: tokens, pitch of dy, pitch of t; formats: of dy, t; places: of each adapter its first column of t,
// the one after its last, the same of dy. Returns 0 or a cudaError_t.
int emulate_lora_grad_b_float(const void* dy, const void* t, const int64_t* sizes, const int64_t* formats,
                              int count, float* const* db, const int64_t* places, const float* scale) {
  return lora_grad_b(dy, t, sizes, formats, count, db, places, scale);
}

int emulate_lora_grad_b_double(const void* dy, const void* t, const int64_t* sizes, const int64_t* formats,
                               int count, double* const* db, const int64_t* places, const double* scale) {
  return lora_grad_b(dy, t, sizes, formats, count, db, places, scale);
}

}  // extern "C"
