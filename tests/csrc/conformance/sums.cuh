// Warp and block sums, shared arrays. Inputs are small integers, so every result is exact and must be equal.
#pragma once
#include "conformance/machine.h"
#include "kernels/primitives/block.cuh"
#include "kernels/primitives/shared.cuh"
#include "kernels/primitives/warp.cuh"

namespace conformance {

// A small integer that looks random: -32 ... 31.
inline int digit(unsigned i) {
  return static_cast<int>((i * 2654435761u >> 24) % 64) - 32;
}

template <typename T>
std::vector<T> digits(size_t count, unsigned seed = 0) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i)
    values[i] = static_cast<T>(digit(static_cast<unsigned>(i) + 7919 * seed));
  return values;
}

constexpr int kBlocks = 3, kSumWarps = 4;

template <typename T>
__global__ void sum_kernel(const T* values, T* of_warp, T* of_block) {
  gpu::SharedArena arena;
  T* scratch = arena.take<T>(kSumWarps);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  of_warp[i] = gpu::warp_sum(values[i]);
  of_block[i] = gpu::block_sum<kSumWarps>(values[i], scratch);
}

template <typename T>
std::string check_sums() {
  constexpr int block = kSumWarps * gpu::kWarp, count = kBlocks * block;
  const auto values = digits<T>(count);
  std::vector<T> warps(count), blocks(count);
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < gpu::kWarp; ++j)
      warps[i] += values[i / gpu::kWarp * gpu::kWarp + j];
    for (int j = 0; j < block; ++j)
      blocks[i] += values[i / block * block + j];
  }
  const Memory<T> from(values), of_warp(std::vector<T>(count, T(-1))), of_block(std::vector<T>(count, T(-1)));
  const std::string failed =
      problem(gpu::launch(sum_kernel<T>, {dim3(kBlocks), dim3(block), gpu::shared_bytes<T>(kSumWarps)},
                          static_cast<const T*>(from.get()), of_warp.get(), of_block.get()));
  if (!failed.empty()) return failed;
  const std::string differs = difference(of_warp.values(), warps);
  return differs.empty() ? difference(of_block.values(), blocks) : differs;
}

template <typename T>
__global__ void transposed_kernel(const T* values, T* sums) {
  T mine[gpu::kWarp];
#pragma unroll
  for (int i = 0; i < gpu::kWarp; ++i)
    mine[i] = values[threadIdx.x * gpu::kWarp + i];
  sums[threadIdx.x] = gpu::warp_sum_transposed(mine, static_cast<int>(threadIdx.x));
}

template <typename T>
std::string check_transposed() {
  const auto values = digits<T>(gpu::kWarp * gpu::kWarp, 1);
  std::vector<T> expected(gpu::kWarp);
  for (size_t i = 0; i < values.size(); ++i)
    expected[i % gpu::kWarp] += values[i];
  const Memory<T> from(values), sums(std::vector<T>(gpu::kWarp, T(-1)));
  const std::string failed = problem(gpu::launch(transposed_kernel<T>, {dim3(1), dim3(gpu::kWarp)},
                                                 static_cast<const T*>(from.get()), sums.get()));
  return failed.empty() ? difference(sums.values(), expected) : failed;
}

// Arrays of odd sizes and different types, the last beyond the 48 KB that a launch gets without asking.
constexpr int kBytes = 5, kDoubles = 3, kFloats = 15000;

__global__ void arena_kernel(int* found) {
  gpu::SharedArena arena;
  auto* bytes = arena.take<unsigned char>(kBytes);
  auto* doubles = arena.take<double>(kDoubles);
  auto* floats = arena.take<float>(kFloats);
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int i = thread; i < kBytes; i += threads)
    bytes[i] = static_cast<unsigned char>(i + 1);
  for (int i = thread; i < kDoubles; i += threads)
    doubles[i] = i + 10;
  for (int i = thread; i < kFloats; i += threads)
    floats[i] = static_cast<float>(i + 100);
  __syncthreads();
  int wrong = 0;
  for (int i = 0; i < kBytes; ++i)
    wrong += bytes[i] != i + 1;
  for (int i = 0; i < kDoubles; ++i)
    wrong += doubles[i] != i + 10;
  for (int i = thread; i < kFloats; i += threads)
    wrong += floats[i] != static_cast<float>(i + 100);
  for (const void* array :
       {static_cast<const void*>(bytes), static_cast<const void*>(doubles), static_cast<const void*>(floats)})
    wrong += reinterpret_cast<uintptr_t>(array) % gpu::kSharedAlign != 0;
  found[blockIdx.x * threads + thread] = wrong;
}

inline std::string check_arena() {
  constexpr int count = kBlocks * 64;
  const Memory<int> found(std::vector<int>(count, -1));
  const size_t bytes = gpu::shared_bytes<unsigned char>(kBytes) + gpu::shared_bytes<double>(kDoubles) +
                       gpu::shared_bytes<float>(kFloats);
  const std::string failed =
      problem(gpu::launch(arena_kernel, {dim3(kBlocks), dim3(64), bytes}, found.get()));
  return failed.empty() ? difference(found.values(), std::vector<int>(count, 0)) : failed;
}

}  // namespace conformance
