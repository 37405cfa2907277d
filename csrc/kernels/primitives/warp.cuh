// Sums across the 32 lanes of a warp. All lanes must call.
// The order of additions is fixed, so results repeat bit for bit.
#pragma once
#include "kernels/launch.h"

namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum of `value` over the lanes, given to every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// 32 sums at once: lane i receives the sum over all lanes of their values[i]. 31 shuffles instead of 160:
// at each step a lane keeps the half of the values that its number selects and gives its partner the other.
template <typename T>
__device__ inline T warp_sum_transposed(T (&values)[kWarp], int lane) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < kWarp / 2; ++i) {
      if (i >= half) break;  // a constant bound unrolls fully, so the values stay in registers
      const T kept = upper ? values[i + half] : values[i];
      const T sent = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
  }
  return values[0];
}

}  // namespace gpu
