// Device helpers shared by the kernels: index arithmetic, alignment, four elements in one access.
#pragma once
#include <cstdint>

#include "kernels/launch.h"

namespace gpu {

template <typename A, typename B>
__host__ __device__ constexpr A ceil_div(A a, B b) {
  return (a + static_cast<A>(b) - 1) / static_cast<A>(b);
}

template <typename T>
struct alignas(sizeof(T) == 2 ? 8 : 16) Four {
  T at[4];
};

__host__ __device__ inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace gpu
