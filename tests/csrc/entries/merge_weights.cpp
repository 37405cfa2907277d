// C functions through which the tests call the emulated merge_weights:
// the launcher's arguments as parallel arrays.
#include <cstdint>
#include <vector>

#include "kernels/merge_weights.h"

namespace {

template <typename T>
int merge_weights(int count, const void* const* w, const void* const* a, const void* const* b,
                  const void* const* origin, void* const* out, const int64_t* shapes, const int64_t* formats,
                  const T* scale) {
  std::vector<keeplora::MergeWeightsProblem<T>> problems;
  for (int i = 0; i < count; ++i) {
    const auto size = [&](int j) { return static_cast<int>(shapes[4 * i + j]); };
    const auto format = [&](int j) { return static_cast<gpu::Format>(formats[5 * i + j]); };
    problems.push_back({w[i], a[i], b[i], origin[i], out[i], shapes[4 * i + 3], size(0), size(1), size(2),
                        scale[i], format(0), format(1), format(2), format(3), format(4)});
  }
  return keeplora::merge_weights(problems.data(), count, nullptr);
}

}  // namespace

extern "C" {

// shapes: rows, cols, r, pitch of W of each problem; formats: of w, a, b, origin (which may be
// null), out. Returns 0 or a cudaError_t.
int emulate_merge_weights_float(int count, const void* const* w, const void* const* a, const void* const* b,
                                const void* const* origin, void* const* out, const int64_t* shapes,
                                const int64_t* formats, const float* scale) {
  return merge_weights(count, w, a, b, origin, out, shapes, formats, scale);
}

int emulate_merge_weights_double(int count, const void* const* w, const void* const* a, const void* const* b,
                                 const void* const* origin, void* const* out, const int64_t* shapes,
                                 const int64_t* formats, const double* scale) {
  return merge_weights(count, w, a, b, origin, out, shapes, formats, scale);
}

}  // extern "C"
