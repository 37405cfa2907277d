// C function through which the tests call the emulated sketch_rows.
#include <cstdint>
#include <vector>

#include "kernels/sketch_rows.h"

extern "C" {

// shape: tokens, d_in, d_out, width. Returns 0 or a cudaError_t.
int emulate_sketch_rows(const void* x, int x_format, const void* delta, int delta_format, void* out,
                        const int64_t* shape, int64_t seed) {
  const keeplora::SketchRowsProblem problem{x,
                                            static_cast<gpu::Format>(x_format),
                                            delta,
                                            static_cast<gpu::Format>(delta_format),
                                            out,
                                            shape[0],
                                            static_cast<int>(shape[1]),
                                            static_cast<int>(shape[2]),
                                            static_cast<int>(shape[3]),
                                            static_cast<uint64_t>(seed)};
  std::vector<unsigned char> workspace(keeplora::sketch_rows_workspace(problem), 0xff);
  return keeplora::sketch_rows(problem, workspace.data(), nullptr);
}

}  // extern "C"
