// Tensor cores: matrices are dealt out to the lanes as primitives/mma.cuh says. Inputs are small integers, so
// that sums are exact, but for the split floats.
#pragma once
#include "conformance/sums.cuh"
#include "kernels/primitives/ldmatrix.cuh"
#include "kernels/primitives/mma.cuh"

namespace conformance {

// ---- C = A B + C of 16 x 8 x 8
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
  // What a split leaves out, and what three sums of eight products round:
  // 2^-22 and a few times 2^-23 of the products.
  const double allowed = kWay == Way::kSplit && sizeof(T) == 4 ? 1.0 / (1 << 19) : 0;
  for (int i = 0; i < 16 * 8; ++i) {
    const double error = values[i] > expected[i] ? values[i] - expected[i] : expected[i] - values[i];
    if (!(error <= allowed * size[i]))
      return "element " + std::to_string(i) + " is " + std::to_string(values[i]) + ", must be " +
             std::to_string(expected[i]);
  }
  return "";
}

// ---- 16-bit numbers: 16 x 8 x 16 products, and the loads that deal such matrices out
inline uint16_t bfloat16_of(int value) {  // small integers are exact
  const float x = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

__global__ void mma_bf16_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  const int row = threadIdx.x / 4, col = threadIdx.x % 4;
  const auto pair = [](uint16_t first, uint16_t second) {
    return first | static_cast<uint32_t>(second) << 16;
  };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* from = a + (row + 8 * (i % 2)) * 16 + 2 * col + 8 * (i / 2);
    left[i] = pair(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const uint16_t* from = b + (2 * col + 8 * i) * 8 + row;
    right[i] = pair(from[0], from[8]);
  }
  float* upper = c + row * 8 + 2 * col;
  float* lower = c + (row + 8) * 8 + 2 * col;
  float sum[4] = {upper[0], upper[1], lower[0], lower[1]};
  gpu::mma_bf16(sum, left, right);
  upper[0] = sum[0], upper[1] = sum[1], lower[0] = sum[2], lower[1] = sum[3];
}

inline std::string check_mma_bf16() {
  std::vector<uint16_t> a(16 * 16), b(16 * 8);
  std::vector<float> c = digits<float>(16 * 8, 5), expected = c;
  for (int i = 0; i < 16 * 16; ++i)
    a[i] = bfloat16_of(digit(i + 17));
  for (int i = 0; i < 16 * 8; ++i)
    b[i] = bfloat16_of(digit(i + 1234));
  for (int i = 0; i < 16 * 8; ++i)
    for (int k = 0; k < 16; ++k)
      expected[i] += static_cast<float>(digit(i / 8 * 16 + k + 17) * digit(k * 8 + i % 8 + 1234));
  const Memory<uint16_t> left(a), right(b);
  const Memory<float> sum(c);
  const std::string failed = problem(gpu::launch(mma_bf16_kernel, {dim3(1), dim3(gpu::kWarp)},
                                                 static_cast<const uint16_t*>(left.get()),
                                                 static_cast<const uint16_t*>(right.get()), sum.get()));
  return failed.empty() ? difference(sum.values(), expected) : failed;
}

constexpr int kPitch = 24;  // of the rows in shared memory; only 8 of them are a matrix's

template <bool kTransposed>
__global__ void load_kernel(const uint16_t* from, uint32_t* to) {
  gpu::SharedArena arena;
  auto* rows = arena.take<uint16_t>(gpu::kWarp * kPitch);
  for (int i = threadIdx.x; i < gpu::kWarp * kPitch; i += gpu::kWarp)
    rows[i] = from[i];
  __syncthreads();
  uint32_t mine[4];
  gpu::load_matrices<kTransposed>(mine, rows + threadIdx.x * kPitch);
  for (int i = 0; i < 4; ++i)
    to[4 * threadIdx.x + i] = mine[i];
}

template <bool kTransposed>
std::string check_load() {
  std::vector<uint16_t> values(gpu::kWarp * kPitch);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<uint16_t>(i * 40503u);
  std::vector<uint32_t> expected(4 * gpu::kWarp);
  for (int lane = 0; lane < gpu::kWarp; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) {
        const int line = lane / 4, place = 2 * (lane % 4) + j;
        const int row = 8 * i + (kTransposed ? place : line), column = kTransposed ? line : place;
        expected[4 * lane + i] |= static_cast<uint32_t>(values[row * kPitch + column]) << 16 * j;
      }
  const Memory<uint16_t> from(values);
  const Memory<uint32_t> to(std::vector<uint32_t>(4 * gpu::kWarp, 0xeeeeeeee));
  const gpu::Config config{dim3(1), dim3(gpu::kWarp), gpu::shared_bytes<uint16_t>(gpu::kWarp * kPitch)};
  const std::string failed = problem(
      gpu::launch(load_kernel<kTransposed>, config, static_cast<const uint16_t*>(from.get()), to.get()));
  return failed.empty() ? difference(to.values(), expected) : failed;
}

}  // namespace conformance
