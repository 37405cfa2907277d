// Device helpers shared by the kernels: index arithmetic and loads of four elements.
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

// Elements [i, i + 4) of an array of length n, zero from n on. kVector asks for one 16-byte access: `array`
// must then be aligned to 16 bytes and i and n be multiples of 4.
template <bool kVector, typename T>
__device__ inline Four<T> load_four(const T* array, int i, int n) {
  Four<T> four{};
  if constexpr (kVector) {
    if (i < n) four = *reinterpret_cast<const Four<T>*>(array + i);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j < n) four.at[j] = array[i + j];
  }
  return four;
}

__host__ __device__ inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace gpu
