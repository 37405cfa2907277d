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

// ---- from sm_90 on: barriers in shared memory, and copies by an engine that report to them

// Counts the arrivals of threads and the bytes of copies. Its phases end when all have come, and their
// parities alternate, starting with 0.
struct Mbarrier {
  uint64_t word;
};

#ifdef KEEPLORA_EMULATE
// Touched in the thread's own name, so that a barrier missing after the initialization is a race.
inline uint64_t* mbarrier_word(Mbarrier* mbarrier) {
  static_cast<void>(__atomic_load_n(&mbarrier->word, __ATOMIC_RELAXED));
  return &mbarrier->word;
}
#endif

// By one thread; the others need a block barrier (in a cluster, a cluster barrier) before they use it.
__device__ inline void mbarrier_init(Mbarrier* mbarrier, unsigned arrivals) {
#ifdef KEEPLORA_EMULATE
  *static_cast<volatile uint64_t*>(&mbarrier->word) = 0;
  emulate::mbarrier_init(&mbarrier->word, arrivals, EMULATE_SITE);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(mbarrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// What this thread has read and written happens before the end of the phase.
__device__ inline void mbarrier_arrive(Mbarrier* mbarrier) {
#ifdef KEEPLORA_EMULATE
  emulate::mbarrier_arrive(mbarrier_word(mbarrier), 0, EMULATE_SITE);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(mbarrier)) : "memory");
#endif
}

// Arrives, and lets the phase wait for `bytes` bytes of copies too.
__device__ inline void mbarrier_arrive_expect(Mbarrier* mbarrier, unsigned bytes) {
#ifdef KEEPLORA_EMULATE
  emulate::mbarrier_arrive(mbarrier_word(mbarrier), bytes, EMULATE_SITE);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Waits until the phase of this parity is over.
__device__ inline void mbarrier_wait(Mbarrier* mbarrier, unsigned parity) {
#ifdef KEEPLORA_EMULATE
  emulate::mbarrier_wait(mbarrier_word(mbarrier), parity, EMULATE_SITE);
#else
  asm volatile(
      "{ .reg .pred p; L_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D_%=; bra L_%=; "
      "D_%=: }" ::"r"(shared_address(mbarrier)),
      "r"(parity)
      : "memory");
#endif
}

// Starts a copy of `bytes` bytes; addresses and size are multiples of 16. One thread calls and expects them.
__device__ inline void bulk_copy(void* shared, const void* global, int bytes, Mbarrier* mbarrier) {
#ifdef KEEPLORA_EMULATE
  emulate::start_bulk_copy(shared, global, bytes, mbarrier_word(mbarrier), EMULATE_SITE);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(mbarrier))
      : "memory");
#endif
}

}  // namespace gpu
