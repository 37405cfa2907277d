// C functions through which the tests call the emulated orthonormalize:
// the launcher's arguments as parallel arrays.
#include <cstdint>
#include <vector>

#include "kernels/orthonormalize.h"

namespace {

template <typename T>
int orthonormalize(int count, const T* const* y, const T* const* q, T* const* z, const int64_t* shapes,
                   int64_t* rank) {
  std::vector<keeplora::OrthonormalizeProblem<T>> problems;
  for (int i = 0; i < count; ++i)
    problems.push_back({y[i], q[i], z[i], static_cast<int>(shapes[3 * i]),
                        static_cast<int>(shapes[3 * i + 1]), static_cast<int>(shapes[3 * i + 2])});
  std::vector<unsigned char> workspace(keeplora::orthonormalize_workspace(problems.data(), count), 0xff);
  return keeplora::orthonormalize(problems.data(), count, rank, workspace.data(), nullptr);
}

}  // namespace

extern "C" {

// shapes: d, l, k of each problem, one after the other. Returns 0 or a cudaError_t.
int emulate_orthonormalize_float(int count, const float* const* y, const float* const* q, float* const* z,
                                 const int64_t* shapes, int64_t* rank) {
  return orthonormalize(count, y, q, z, shapes, rank);
}

int emulate_orthonormalize_double(int count, const double* const* y, const double* const* q, double* const* z,
                                  const int64_t* shapes, int64_t* rank) {
  return orthonormalize(count, y, q, z, shapes, rank);
}

}  // extern "C"
