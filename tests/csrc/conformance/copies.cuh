// Asynchronous copies, order between blocks, clusters, and rings of mbarriers.
#pragma once
#include "conformance/machine.h"
#include "kernels/primitives/async.cuh"
#include "kernels/primitives/atomic.cuh"
#include "kernels/primitives/cluster.cuh"
#include "kernels/primitives/shared.cuh"

namespace conformance {

// Is this code compiled for GPUs with clusters and mbarrier copies?
#if defined(KEEPLORA_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define CONFORMANCE_SM_90 1
#else
#define CONFORMANCE_SM_90 0
#endif

// ---- copy_async: thread t copies t % (kSize + 1) valid bytes, in two groups that are awaited one by one
constexpr int kCopyThreads = 64;

template <int kSize>
__global__ void copy_kernel(const unsigned char* from, unsigned char* to) {
  gpu::SharedArena arena;
  auto* first = arena.take<unsigned char>(kCopyThreads * kSize);
  auto* second = arena.take<unsigned char>(kCopyThreads * kSize);
  const int thread = threadIdx.x, valid = thread % (kSize + 1), other = (thread + 1) % kCopyThreads;
  gpu::copy_async<kSize>(first + thread * kSize, from + thread * kSize, valid);
  gpu::copy_commit();
  gpu::copy_async<kSize>(second + thread * kSize, from + thread * kSize);
  gpu::copy_commit();
  gpu::copy_wait<1>();
  __syncthreads();
  for (int i = 0; i < kSize; ++i)
    to[thread * kSize + i] = first[other * kSize + i];
  gpu::copy_wait<0>();
  __syncthreads();
  for (int i = 0; i < kSize; ++i)
    to[(kCopyThreads + thread) * kSize + i] = second[other * kSize + i];
}

template <int kSize>
std::string check_copy() {
  constexpr int count = kCopyThreads * kSize;
  std::vector<unsigned char> values(count), expected(2 * count);
  for (int i = 0; i < count; ++i)
    values[i] = static_cast<unsigned char>(i % 255 + 1);
  for (int i = 0; i < count; ++i) {
    const int other = (i / kSize + 1) % kCopyThreads;
    expected[i] = i % kSize < other % (kSize + 1) ? values[other * kSize + i % kSize] : 0;
    expected[count + i] = values[other * kSize + i % kSize];
  }
  const Memory<unsigned char> from(values), to(std::vector<unsigned char>(2 * count, 0xee));
  const gpu::Config config{dim3(1), dim3(kCopyThreads), 2 * gpu::shared_bytes<unsigned char>(count)};
  const std::string failed = problem(
      gpu::launch(copy_kernel<kSize>, config, static_cast<const unsigned char*>(from.get()), to.get()));
  if (!failed.empty()) return failed;
  return difference(to.values(), expected);
}

// ---- tickets: block n adds 1 to what block n - 1 wrote, each thread from its neighbour's place
constexpr int kChain = 400, kChainThreads = 64;

__global__ void chain_kernel(unsigned* tickets, unsigned* done, int* rows) {
  gpu::SharedArena arena;
  auto* slot = arena.take<unsigned>(1);
  const unsigned number = gpu::take_ticket(tickets, slot);
  const int thread = threadIdx.x;
  if (number > 0) gpu::await(&done[number - 1], 1);
  const int before = number > 0 ? rows[(number - 1) * kChainThreads + (thread + 1) % kChainThreads] : thread;
  rows[number * kChainThreads + thread] = before + 1;
  gpu::announce(&done[number]);
}

inline std::string check_chain() {
  std::vector<int> expected(kChain * kChainThreads);
  for (int i = 0; i < kChain * kChainThreads; ++i) {
    const int number = i / kChainThreads;
    expected[i] = (i % kChainThreads + number) % kChainThreads + number + 1;
  }
  const Memory<unsigned> tickets({0}), done(std::vector<unsigned>(kChain, 0));
  const Memory<int> rows(std::vector<int>(kChain * kChainThreads, -1));
  const gpu::Config config{dim3(kChain), dim3(kChainThreads), gpu::shared_bytes<unsigned>(1)};
  const std::string failed =
      problem(gpu::launch(chain_kernel, config, tickets.get(), done.get(), rows.get()));
  if (!failed.empty()) return failed;
  const std::string differs = difference(rows.values(), expected);
  return differs.empty() ? difference(tickets.values(), {kChain}) : differs;
}

// ---- clusters: a block reads what the next one of its cluster holds, and writes to the one after that
constexpr int kCluster = 4, kClusterThreads = 64;

__global__ void cluster_kernel(int* read, int* written) {
#if CONFORMANCE_SM_90
  gpu::SharedArena arena;
  auto* mine = arena.take<int>(kClusterThreads);
  auto* inbox = arena.take<int>(kClusterThreads);
  const int thread = threadIdx.x;
  const unsigned rank = gpu::cluster_rank();
  mine[thread] = static_cast<int>(blockIdx.x) * 1000 + thread;
  gpu::cluster_sync();
  read[blockIdx.x * kClusterThreads + thread] =
      gpu::cluster_map(mine, (rank + 1) % kCluster)[kClusterThreads - 1 - thread];
  gpu::cluster_map(inbox, (rank + 2) % kCluster)[thread] = mine[thread];
  gpu::cluster_sync();
  written[blockIdx.x * kClusterThreads + thread] = inbox[thread];
#else
  static_cast<void>(read);
  static_cast<void>(written);
#endif
}

inline std::string check_cluster() {
  constexpr int blocks = 3 * kCluster, count = blocks * kClusterThreads;
  const auto neighbour = [](int block, int steps) {
    return block / kCluster * kCluster + (block + steps) % kCluster;
  };
  std::vector<int> expected_read(count), expected_written(count);
  for (int i = 0; i < count; ++i) {
    const int block = i / kClusterThreads, thread = i % kClusterThreads;
    expected_read[i] = neighbour(block, 1) * 1000 + kClusterThreads - 1 - thread;
    expected_written[i] = neighbour(block, kCluster - 2) * 1000 + thread;
  }
  const Memory<int> read(std::vector<int>(count, -1)), written(std::vector<int>(count, -1));
  gpu::Config config{dim3(blocks), dim3(kClusterThreads), 2 * gpu::shared_bytes<int>(kClusterThreads)};
  config.cluster = kCluster;
  const std::string failed = problem(gpu::launch(cluster_kernel, config, read.get(), written.get()));
  if (!failed.empty()) return failed;
  const std::string differs = difference(read.values(), expected_read);
  return differs.empty() ? difference(written.values(), expected_written) : differs;
}

// ---- a ring: one thread fills kStages buffers by bulk copies, 64 others empty them, kTiles times in all
constexpr int kStages = 3, kTiles = 20, kTile = 256, kConsumers = 64;

__global__ void ring_kernel(const int* from, int* to) {
#if CONFORMANCE_SM_90
  gpu::SharedArena arena;
  auto* ring = arena.take<int>(kStages * kTile);
  auto* full = arena.take<gpu::Mbarrier>(kStages);
  auto* empty = arena.take<gpu::Mbarrier>(kStages);
  const int thread = threadIdx.x;
  if (thread == 0)
    for (int stage = 0; stage < kStages; ++stage) {
      gpu::mbarrier_init(&full[stage], 1);
      gpu::mbarrier_init(&empty[stage], kConsumers);
    }
  __syncthreads();
  if (thread == kConsumers) {
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages, round = tile / kStages;
      if (round > 0) gpu::mbarrier_wait(&empty[stage], static_cast<unsigned>(round - 1) % 2);
      gpu::mbarrier_arrive_expect(&full[stage], kTile * sizeof(int));
      gpu::bulk_copy(ring + stage * kTile, from + tile * kTile, kTile * sizeof(int), &full[stage]);
    }
  } else if (thread < kConsumers) {
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages, round = tile / kStages;
      gpu::mbarrier_wait(&full[stage], static_cast<unsigned>(round) % 2);
      for (int i = thread; i < kTile; i += kConsumers)
        to[tile * kTile + i] = ring[stage * kTile + kTile - 1 - i];
      gpu::mbarrier_arrive(&empty[stage]);
    }
  }
#else
  static_cast<void>(from);
  static_cast<void>(to);
#endif
}

inline std::string check_ring() {
  std::vector<int> values(kTiles * kTile), expected(kTiles * kTile);
  for (int i = 0; i < kTiles * kTile; ++i) {
    values[i] = 3 * i + 1;
    expected[i] = 3 * (i / kTile * kTile + kTile - 1 - i % kTile) + 1;
  }
  const Memory<int> from(values), to(std::vector<int>(kTiles * kTile, -1));
  const size_t shared =
      gpu::shared_bytes<int>(kStages * kTile) + 2 * gpu::shared_bytes<gpu::Mbarrier>(kStages);
  const std::string failed = problem(gpu::launch(ring_kernel, {dim3(1), dim3(kConsumers + 32), shared},
                                                 static_cast<const int*>(from.get()), to.get()));
  return failed.empty() ? difference(to.values(), expected) : failed;
}

}  // namespace conformance
