// Copies from global to shared memory that run beside the computation.
//
// A thread waits for its own copies; for those of other threads it needs a barrier after their waits. Copies
// of fewer than 16 bytes go through L1 and may find lines there from before another block of the same launch
// wrote them; await() (primitives/atomic.cuh) drops such lines.
#pragma once
#include <cstdint>

#include "kernels/launch.h"

#ifdef KEEPLORA_EMULATE
#include "emulate/copies.h"
#endif

namespace gpu {

#ifndef KEEPLORA_EMULATE
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Starts a copy of `valid_bytes` bytes, 0 to kBytes, and makes the rest of the kBytes zero. Both addresses
// are multiples of kBytes; with valid_bytes == 0 nothing is read.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef KEEPLORA_EMULATE
  emulate::start_copy({shared, global, kBytes, valid_bytes}, EMULATE_SITE);
#else
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid_bytes)
                 : "memory");
#endif
}

// The copies started since the last call become a group.
__device__ inline void copy_commit() {
#ifdef KEEPLORA_EMULATE
  emulate::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last kLeft groups of this thread are under way.
template <int kLeft>
__device__ inline void copy_wait() {
#ifdef KEEPLORA_EMULATE
  emulate::finish_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace gpu
