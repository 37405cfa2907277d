// Dynamic shared memory, handed out array by array. On the CPU each array is an allocation of its own, so
// that a sanitizer sees an access past its end; see tests/csrc/emulate.
#pragma once
#include <cstddef>

#include "kernels/launch.h"

namespace gpu {

constexpr size_t kSharedAlign = 16;

// Bytes that `count` elements of T take in the arena; the host sums these to size the launch.
template <typename T>
__host__ __device__ constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + kSharedAlign - 1) / kSharedAlign * kSharedAlign;
}

// Every thread of a block makes the same calls of take() in the same order.
class SharedArena {
 public:
  template <typename T>
  __device__ T* take(size_t count) {
#ifdef KEEPLORA_EMULATE
    return static_cast<T*>(emulate::take_shared(taken_++, count * sizeof(T), shared_bytes<T>(count)));
#else
    extern __shared__ __align__(16) unsigned char arena[];
    T* array = reinterpret_cast<T*>(arena + taken_);
    taken_ += shared_bytes<T>(count);
    return array;
#endif
  }

 private:
  size_t taken_ = 0;  // bytes on the GPU, arrays on the CPU
};

}  // namespace gpu
