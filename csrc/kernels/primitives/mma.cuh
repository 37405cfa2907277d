// Products of small matrices by one warp on tensor cores, and numbers split so that TF32 products keep the
// precision of float.
//
// A 16 x 8 x 8 product C += A B deals its matrices out to the lanes; with row = lane / 4, col = lane % 4:
//   a[0..3] = A(row, col), A(row + 8, col), A(row, col + 4), A(row + 8, col + 4)
//   b[0..1] = B(col, row), B(col + 4, row)
//   c[0..3] = C(row, 2 col), C(row, 2 col + 1), C(row + 8, 2 col), C(row + 8, 2 col + 1)
// All 32 lanes must call.
#pragma once
#include <cstdint>

#include "kernels/launch.h"
#include "kernels/primitives/convert.cuh"

namespace gpu {

#ifdef KEEPLORA_EMULATE
namespace lanes {

// What one lane brings to a product: rows and columns as above, `kPer` numbers per register.
template <typename T, int kA, int kB>
struct Share {
  T a[kA], b[kB];
};

// C += A B for this lane's four elements: exact products, added in the order of the depth, rounded once to T.
// value(register, i) is the i-th number of a register. (The hardware rounds more often and, for TF32 and
// 16-bit numbers, towards zero.)
template <int kPer = 1, typename T, typename Stored, int kA, int kB, typename Value>
EMULATE_OWN void multiply(T (&c)[4], const Stored (&a)[kA], const Stored (&b)[kB], Value value,
                          emulate::Site site) {
  Share<Stored, kA, kB> mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const auto* all =
      reinterpret_cast<const Share<Stored, kA, kB>*>(emulate::gather(&mine, sizeof(mine), site));
  const int lane = emulate::lane();
  const int row = lane / 4, column = 2 * (lane % 4);  // the first of two each
  constexpr int kDepth = 4 * kPer * kB;
  T rows[2][kDepth], columns[2][kDepth];
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < kDepth; ++k) {
      const int from = k / kPer % 4, at = k / (4 * kPer);
      rows[i][k] = value(all[4 * row + from].a[i + 2 * at], k % kPer);
      columns[i][k] = value(all[4 * (column + i) + from].b[at], k % kPer);
    }
  for (int i = 0; i < 4; ++i) {
    long double sum = c[i];
    for (int k = 0; k < kDepth; ++k)
      sum += static_cast<long double>(rows[i / 2][k]) * columns[i % 2][k];
    c[i] = static_cast<T>(sum);
  }
}

}  // namespace lanes
#endif

// 16 x 8 x 8 of TF32 numbers: floats of which only the upper 19 bits count.
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef KEEPLORA_EMULATE
  lanes::multiply(c, a, b, [](uint32_t bits, int) { return float_of(bits & 0xffffe000u); }, EMULATE_SITE);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// 16 x 8 x 16 of bfloat16 numbers: as above with two numbers per register, those of depths 2 col and
// 2 col + 1 where one number has depth col, and depths 8 further on where it has 4.
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef KEEPLORA_EMULATE
  const auto value = [](uint32_t bits, int i) { return float_of(i ? bits & 0xffff0000u : bits << 16); };
  lanes::multiply<2>(c, a, b, value, EMULATE_SITE);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// 16 x 8 x 8 of doubles: four 8 x 8 x 4 products.
__device__ inline void mma_f64(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#ifdef KEEPLORA_EMULATE
  lanes::multiply(c, a, b, [](double x, int) { return x; }, EMULATE_SITE);
#else
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int upper = 0; upper < 2; ++upper)
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
          : "+d"(c[2 * upper]), "+d"(c[2 * upper + 1])
          : "d"(a[2 * k + upper]), "d"(b[k]));
#endif
}

// One operand's numbers of a 16 x 8 x 8 product, ready for the tensor cores. kExact: the numbers are TF32
// already, as all 16-bit floats are; else a float is the sum of two TF32 numbers up to 2^-23 of its size.
template <typename T, int kCount, bool kExact>
struct Fragment;

template <int kCount, bool kExact>
struct Fragment<float, kCount, kExact> {
  uint32_t large[kCount];
  uint32_t small[kExact ? 1 : kCount];

  __device__ void set(int i, float x) {
    if constexpr (kExact) {
      large[i] = bits_of(x);
    } else {
      large[i] = (bits_of(x) + 0x1000u) & 0xffffe000u;  // nearest TF32 number
      small[i] = bits_of(x - float_of(large[i]));       // a NaN stays one here
    }
  }
};

template <int kCount, bool kExact>
struct Fragment<double, kCount, kExact> {
  double value[kCount];

  __device__ void set(int i, double x) { value[i] = x; }
};

// C += A B in the precision of float: leaves out the products of the small parts, 2^-22 of the whole.
template <bool kExactA, bool kExactB>
__device__ inline void multiply_add(float (&c)[4], const Fragment<float, 4, kExactA>& a,
                                    const Fragment<float, 2, kExactB>& b) {
  if constexpr (!kExactA) mma_tf32(c, a.small, b.large);
  if constexpr (!kExactB) mma_tf32(c, a.large, b.small);
  mma_tf32(c, a.large, b.large);
}

template <bool kExactA, bool kExactB>
__device__ inline void multiply_add(double (&c)[4], const Fragment<double, 4, kExactA>& a,
                                    const Fragment<double, 2, kExactB>& b) {
  mma_f64(c, a.value, b.value);
}

}  // namespace gpu
