// Order between the blocks of one launch. A kernel whose blocks use what other blocks wrote takes a ticket
// first and calls the ticket, not blockIdx, its number; it announces what it wrote and awaits what it reads:
//
//   const unsigned number = gpu::take_ticket(tickets, slot);
//   if (number > 0) gpu::await(&done[number - 1], 1);
//   ...
//   gpu::announce(&done[number]);
//
// Why this always ends, although the GPU starts blocks in any order and as many as fit: a ticket is taken by
// a running block, tickets are dense, and running blocks are not suspended for ever. So the holder of the
// lowest unfinished ticket runs, and awaits only lower tickets, all finished.
// A block must await announcements of lower tickets only.
//
// Counters lie in global memory and are 0 when the launch begins. Every thread of the block makes each call.
#pragma once
#include "kernels/launch.h"

namespace gpu {

// 0 for the first block that asks, 1 for the next, and so on. `slot` is shared memory that the block does not
// use otherwise before its next barrier.
__device__ inline unsigned take_ticket(unsigned* counter, unsigned* slot) {
  if (threadIdx.x == 0) {
#ifdef KEEPLORA_EMULATE
    *slot = __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED);
#else
    *slot = atomicAdd(counter, 1u);
#endif
  }
  __syncthreads();
  return *slot;
}

// Adds 1 to the counter. Whoever awaits that finds everything the block's threads wrote before.
__device__ inline void announce(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x != 0) return;
#ifdef KEEPLORA_EMULATE
  emulate::add_announcement(counter);
#else
  __threadfence();  // the barrier has ordered the other threads' writes before it
  atomicAdd(counter, 1u);
#endif
}

// Returns when the counter has reached `target`. What the announcing blocks wrote is then visible to every
// thread of this block: lines of L1 that were read before are stale, and the fence of one thread drops them
// for its whole multiprocessor, as in the grid barrier of cooperative groups.
__device__ inline void await(const unsigned* counter, unsigned target) {
  if (threadIdx.x == 0) {
#ifdef KEEPLORA_EMULATE
    emulate::acquire_announcements(counter, target, EMULATE_SITE);
#else
    unsigned reached;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(reached) : "l"(counter) : "memory");
    } while (reached < target);
    __threadfence();
#endif
  }
  __syncthreads();
}

}  // namespace gpu
