// C functions through which the tests call the emulated project_rows:
// the launcher's arguments as parallel arrays.
#include <cstdint>
#include <vector>

#include "kernels/project_rows.h"

namespace {

template <typename T>
int project_rows(int count, const T* const* g, const T* const* q, T* const* out, const int64_t* shapes,
                 const T* scale, int passes, T* leak) {
  std::vector<keeplora::ProjectRowsProblem<T>> problems;
  for (int i = 0; i < count; ++i)
    problems.push_back({g[i], q[i], out[i], shapes[3 * i], static_cast<int>(shapes[3 * i + 1]),
                        static_cast<int>(shapes[3 * i + 2]), scale[i]});
  std::vector<unsigned char> workspace(keeplora::project_rows_workspace(problems.data(), count, passes),
                                       0xff);
  return keeplora::project_rows(problems.data(), count, passes, leak, workspace.data(), nullptr);
}

}  // namespace

extern "C" {

// shapes: rows, d, k of each problem, one after the other. Returns 0 or a cudaError_t.
int emulate_project_rows_float(int count, const float* const* g, const float* const* q, float* const* out,
                               const int64_t* shapes, const float* scale, int passes, float* leak) {
  return project_rows(count, g, q, out, shapes, scale, passes, leak);
}

int emulate_project_rows_double(int count, const double* const* g, const double* const* q, double* const* out,
                                const int64_t* shapes, const double* scale, int passes, double* leak) {
  return project_rows(count, g, q, out, shapes, scale, passes, leak);
}

}  // extern "C"
