// Small kernels, right and with one mistake each. table.txt says which build finds which.
#pragma once
#include "kernels/device.cuh"
#include "kernels/primitives/async.cuh"
#include "kernels/primitives/atomic.cuh"
#include "kernels/primitives/cluster.cuh"
#include "kernels/primitives/shared.cuh"
#include "kernels/primitives/warp.cuh"

namespace selftest {

using gpu::kWarp;

// out = 36 times the sum of x, through shared memory that is used twice. 256 threads.
enum class Sum {
  kClean,
  kNoBarrier,       // partial sums read before all are written
  kReuseNoBarrier,  // written again while others still read
  kReadsPastEnd,    // one element of x too many
  kDivergent,       // halves of the block at different barriers
  kLaneMissing,     // 31 lanes come to a shuffle
  kMisaligned,      // 16 bytes at an odd address
  kNeverWritten,    // nobody writes the last partial sum
  kSharedPastEnd,   // partial sums one place too far
};

template <Sum kDefect>
__global__ void sum_kernel(const float* x, int n, float* out) {
  gpu::SharedArena arena;
  float* partial = arena.take<float>(8);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum = 0;
  for (int i = threadIdx.x; i < n + (kDefect == Sum::kReadsPastEnd); i += blockDim.x)
    sum += x[i];
  if (kDefect == Sum::kMisaligned) sum += 0 * reinterpret_cast<const gpu::Four<float>*>(x + 1)->at[0];
  if (kDefect != Sum::kLaneMissing || lane < 31) sum = gpu::warp_sum(sum);
  if (lane == 0 && (kDefect != Sum::kNeverWritten || warp < 7))
    partial[warp + (kDefect == Sum::kSharedPastEnd)] = sum;
  if (kDefect == Sum::kDivergent) {
    if (threadIdx.x < 128)
      __syncthreads();
    else
      __syncthreads();
  } else if (kDefect != Sum::kNoBarrier) {
    __syncthreads();
  }
  float total = 0;
  for (int w = 0; w < 8; ++w)
    total += partial[w];
  if (kDefect != Sum::kReuseNoBarrier) __syncthreads();
  if (lane == 0) partial[warp] = total * (warp + 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    *out = 0;
    for (int w = 0; w < 8; ++w)
      *out += partial[w];
  }
}

// y = x backwards, by one warp.
enum class Reverse { kClean, kNoBarrier };

template <Reverse kDefect>
__global__ void reverse_kernel(const float* x, float* y) {
  gpu::SharedArena arena;
  float* shared = arena.take<float>(kWarp);
  shared[threadIdx.x] = x[threadIdx.x];
  if (kDefect != Reverse::kNoBarrier) __syncwarp();
  y[threadIdx.x] = shared[kWarp - 1 - threadIdx.x];
}

// total = the sum of x over all blocks, by the block that took the last ticket.
// counters: tickets, announcements.
enum class Grid {
  kClean,
  kNoAwait,
  kNoAnnounce,
  kEarlyAnnounce,  // before the partial sum is written
  kNoTicket,       // the block of the last number instead: it may run first
  kPlainAdd,       // all blocks add to one number
};

template <Grid kDefect>
__global__ void grid_kernel(const float* x, float* partial, float* total, unsigned* counters) {
  gpu::SharedArena arena;
  unsigned* slot = arena.take<unsigned>(1);
  const unsigned ticket = gpu::take_ticket(&counters[0], slot);
  const unsigned number = kDefect == Grid::kNoTicket ? blockIdx.x : ticket;
  const float sum = gpu::warp_sum(x[number * kWarp + threadIdx.x]);
  if (kDefect == Grid::kPlainAdd) {
    if (threadIdx.x == 0) *total += sum;
    return;
  }
  if (kDefect == Grid::kEarlyAnnounce) gpu::announce(&counters[1]);
  if (threadIdx.x == 0) partial[number] = sum;
  if (kDefect != Grid::kNoAnnounce && kDefect != Grid::kEarlyAnnounce) gpu::announce(&counters[1]);
  if (number != gridDim.x - 1) return;
  if (kDefect != Grid::kNoAwait) gpu::await(&counters[1], gridDim.x);
  if (threadIdx.x != 0) return;
  *total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b)
    *total += partial[b];
}

// y = each tile of x backwards, tiles copied two at a time while the last is used. A last tile may be short:
// what is missing counts as zeros.
enum class Copy {
  kClean,
  kNoWait,
  kWaitsForTooFew,
  kNoBarrier,       // after the wait: sees its own bytes only
  kReuseNoBarrier,  // the next copy overwrites what others still read
  kMisaligned,
  kReadsPastEnd,   // copies whole pieces of the short tile
  kSourceChanged,  // writes what a copy under way reads
};

constexpr int kTile = 128;  // floats; a thread copies four of them

template <Copy kDefect>
__global__ void copy_kernel(float* x, int n, float* y) {
  gpu::SharedArena arena;
  float* buffer = arena.take<float>(2 * kTile + 4);
  const int tiles = gpu::ceil_div(n, kTile), mine = 4 * threadIdx.x;
  const auto fetch = [&](int tile) {
    const int at = tile * kTile + mine, left = 4 * (n - at);
    const int valid = kDefect == Copy::kReadsPastEnd || left > 16 ? 16 : left < 0 ? 0 : left;
    if (tile < tiles)
      gpu::copy_async<16>(buffer + tile % 2 * kTile + mine + (kDefect == Copy::kMisaligned),
                          x + (valid ? at : 0), valid);
    gpu::copy_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (kDefect != Copy::kReuseNoBarrier) __syncthreads();
    fetch(tile + 1);
    if (kDefect == Copy::kSourceChanged && tile == 0 && threadIdx.x == 31) x[kTile] = 0;
    if (kDefect != Copy::kNoWait) gpu::copy_wait<kDefect == Copy::kWaitsForTooFew ? 2 : 1>();
    if (kDefect != Copy::kNoBarrier) __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += blockDim.x)
      y[tile * kTile + i] = buffer[tile % 2 * kTile + kTile - 1 - i];
  }
  if (kDefect != Copy::kNoWait) gpu::copy_wait<0>();
}

// out = the sum of x by three warps, from two buffers that a fourth fills by bulk copies.
enum class Ring {
  kClean,
  kNoInitBarrier,  // others may use the mbarriers before they are initialized
  kNoEmptyWait,    // fills a buffer that is still read
  kWrongParity,
  kTooFewBytes,  // expects 16 bytes fewer than come
  kNoArrival,    // one warp never says that it has finished with a buffer
};

template <Ring kDefect>
__global__ void ring_kernel(const float* x, int tiles, float* out) {
  constexpr int kReaders = 96, kFloats = 384;
  gpu::SharedArena arena;
  float* buffer = arena.take<float>(2 * kFloats);
  auto* full = arena.take<gpu::Mbarrier>(2);
  auto* empty = arena.take<gpu::Mbarrier>(2);
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) {
      gpu::mbarrier_init(&full[i], 1);
      gpu::mbarrier_init(&empty[i], kReaders);
    }
  if (kDefect != Ring::kNoInitBarrier) __syncthreads();
  if (threadIdx.x == kReaders)
    for (int t = 0; t < tiles; ++t) {
      if (kDefect != Ring::kNoEmptyWait && t >= 2) gpu::mbarrier_wait(&empty[t % 2], (t / 2 & 1) ^ 1);
      gpu::mbarrier_arrive_expect(&full[t % 2], kFloats * 4 - (kDefect == Ring::kTooFewBytes ? 16 : 0));
      gpu::bulk_copy(buffer + t % 2 * kFloats, x + t * kFloats, kFloats * 4, &full[t % 2]);
    }
  if (threadIdx.x >= kReaders) return;
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    gpu::mbarrier_wait(&full[t % 2], (t / 2 & 1) ^ (kDefect == Ring::kWrongParity));
    for (int i = threadIdx.x; i < kFloats; i += kReaders)
      sum += buffer[t % 2 * kFloats + i];
    if (kDefect != Ring::kNoArrival || threadIdx.x < 64) gpu::mbarrier_arrive(&empty[t % 2]);
  }
  sum = gpu::warp_sum(sum);
  if (threadIdx.x % kWarp == 0) out[threadIdx.x / kWarp] = sum;
}

// Each block of a pair writes what the other has in shared memory.
enum class Pair {
  kClean,
  kNoBarrier,  // reads before the other has written
  kEarlyExit,  // ends while the other may still read
};

template <Pair kDefect>
__global__ void pair_kernel(float* out) {
  gpu::SharedArena arena;
  float* shared = arena.take<float>(64);
  shared[threadIdx.x] = 100 * gpu::cluster_rank() + threadIdx.x;
  if (kDefect == Pair::kNoBarrier)
    __syncthreads();
  else
    gpu::cluster_sync();
  if (kDefect != Pair::kEarlyExit || gpu::cluster_rank() == 1)
    out[blockIdx.x * 64 + threadIdx.x] = gpu::cluster_map(shared, gpu::cluster_rank() ^ 1)[threadIdx.x];
  if (kDefect != Pair::kEarlyExit) gpu::cluster_sync();
}

}  // namespace selftest
