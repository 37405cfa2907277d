// Stands in for the CUDA toolkit's header when kernels are compiled for the CPU: the qualifiers, types and
// built-in names that csrc/kernels uses, and nothing else.
// A name missing here is a compile error, never a wrong meaning.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "emulate/block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

// Set by the scheduler whenever another CUDA thread starts to run.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

#define EMULATE_SITE   \
  emulate::Site {      \
    __FILE__, __LINE__ \
  }

// A function whose accesses are the emulator's own, as those of Unseen are: the race detector skips them, which
// is most of its time in the products.
#define EMULATE_OWN __attribute__((no_sanitize("thread")))

#define __syncthreads() emulate::block_barrier(EMULATE_SITE)
#define __syncwarp() emulate::warp_barrier(0xffffffffu, EMULATE_SITE)
#define __shfl_xor_sync(mask, value, lanes) \
  emulate::shuffle(mask, value, emulate::lane() ^ (lanes), EMULATE_SITE)
#define __shfl_sync(mask, value, source) emulate::shuffle(mask, value, source, EMULATE_SITE)
#define __ballot_sync(mask, predicate) emulate::ballot(mask, predicate, EMULATE_SITE)

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
using std::sqrt;
