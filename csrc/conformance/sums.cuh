// Warp and block sums, shared arrays, tensor cores. Inputs are small integers, so every result is exact and
// must be equal.
#pragma once
#include "conformance/machine.h"
#include "kernels/primitives/block.cuh"
#include "kernels/primitives/mma.cuh"
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

// ---- tensor cores: C = A B + C of 16 x 8 x 8, dealt out to the lanes as primitives/mma.cuh says
enum class Way { kPlain, kSplit };

template <typename T, Way kWay>
__global__ void mma_kernel(const T* a, const T* b, T* c) {
  const int row = threadIdx.x / 4, col = threadIdx.x % 4;
  const T mine_a[4] = {a[row * 8 + col], a[(row + 8) * 8 + col], a[row * 8 + col + 4],
                       a[(row + 8) * 8 + col + 4]};
  const T mine_b[2] = {b[col * 8 + row], b[(col + 4) * 8 + row]};
  const int at[4] = {row * 8 + 2 * col, row * 8 + 2 * col + 1, (row + 8) * 8 + 2 * col,
                     (row + 8) * 8 + 2 * col + 1};
  T sum[4] = {c[at[0]], c[at[1]], c[at[2]], c[at[3]]};
  if constexpr (kWay == Way::kSplit) {
    gpu::Fragment<T, 4, false> left;
    gpu::Fragment<T, 2, false> right;
    for (int i = 0; i < 4; ++i)
      left.set(i, mine_a[i]);
    for (int i = 0; i < 2; ++i)
      right.set(i, mine_b[i]);
    gpu::multiply_add(sum, left, right);
  } else if constexpr (sizeof(T) == 8) {
    gpu::mma_f64(sum, mine_a, mine_b);
  } else {
    // The lower 13 bits are set, and must not count.
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i)
      left[i] = gpu::bits_of(mine_a[i]) | 0x1fffu;
    for (int i = 0; i < 2; ++i)
      right[i] = gpu::bits_of(mine_b[i]) | 0x1fffu;
    gpu::mma_tf32(sum, left, right);
  }
  for (int i = 0; i < 4; ++i)
    c[at[i]] = sum[i];
}

template <typename T, Way kWay>
std::string check_mma() {
  auto a = digits<T>(16 * 8, 2), b = digits<T>(8 * 8, 3), c = digits<T>(16 * 8, 4);
  // Numbers of 21 bits need both parts of a split float; their products are not exact.
  if (kWay == Way::kSplit)
    for (size_t i = 0; i < a.size(); ++i)
      a[i] += static_cast<T>(digit(static_cast<unsigned>(i) + 99)) / 32768;
  std::vector<double> expected(16 * 8), size(16 * 8);
  for (int i = 0; i < 16 * 8; ++i) {
    expected[i] = c[i];
    for (int k = 0; k < 8; ++k) {
      const double product = static_cast<double>(a[i / 8 * 8 + k]) * b[k * 8 + i % 8];
      expected[i] += product;
      size[i] += product < 0 ? -product : product;
    }
  }
  const Memory<T> left(a), right(b), sum(c);
  const std::string failed =
      problem(gpu::launch(mma_kernel<T, kWay>, {dim3(1), dim3(gpu::kWarp)}, static_cast<const T*>(left.get()),
                          static_cast<const T*>(right.get()), sum.get()));
  if (!failed.empty()) return failed;
  const auto values = sum.values();
  // What a split leaves out and what three sums of eight products round: 2^-22 and a few times 2^-23 of the
  // products.
  const double allowed = kWay == Way::kSplit && sizeof(T) == 4 ? 1.0 / (1 << 19) : 0;
  for (int i = 0; i < 16 * 8; ++i) {
    const double error = values[i] > expected[i] ? values[i] - expected[i] : expected[i] - values[i];
    if (!(error <= allowed * size[i]))
      return "element " + std::to_string(i) + " is " + std::to_string(values[i]) + ", must be " +
             std::to_string(expected[i]);
  }
  return "";
}

}  // namespace conformance
