// Blocks of a cluster (Config::cluster; from sm_90 on) run together and reach each other's shared memory. A
// block must not exit before the others have finished with its memory: end with a cluster_sync().
// In code for older GPUs a block is alone in its cluster; largest_cluster() tells the host.
#pragma once
#include <cstdint>

#include "kernels/launch.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KEEPLORA_CLUSTERS 1
#else
#define KEEPLORA_CLUSTERS 0
#endif

namespace gpu {

// A barrier of all threads of the cluster; orders their accesses to memory.
__device__ inline void cluster_sync() {
#ifdef KEEPLORA_EMULATE
  emulate::cluster_barrier(EMULATE_SITE);
#else
#if KEEPLORA_CLUSTERS
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
#endif
}

// This block's number in its cluster.
__device__ inline unsigned cluster_rank() {
#ifdef KEEPLORA_EMULATE
  return emulate::cluster_rank();
#else
#if KEEPLORA_CLUSTERS
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
#endif
}

// Where the block of that rank has what lies at `mine` in this block's shared memory.
template <typename T>
__device__ inline T* cluster_map(T* mine, unsigned rank) {
#ifdef KEEPLORA_EMULATE
  return static_cast<T*>(emulate::cluster_address(mine, rank, EMULATE_SITE));
#else
#if KEEPLORA_CLUSTERS
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return rank == 0 ? mine : nullptr;
#endif
#endif
}

}  // namespace gpu
