// Sums across a block, in a fixed order.
#pragma once
#include "kernels/primitives/warp.cuh"

namespace gpu {

// Sum of `value` over the block's kWarps warps, given to every thread. `scratch` holds kWarps numbers that
// nobody else uses before the next barrier. The whole block must call.
template <int kWarps, typename T>
__device__ inline T block_sum(T value, T* scratch) {
  const T sum = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = sum;
  __syncthreads();  // every warp has written its sum
  T total = 0;
  for (int w = 0; w < kWarps; ++w)
    total += scratch[w];
  return total;
}

}  // namespace gpu
