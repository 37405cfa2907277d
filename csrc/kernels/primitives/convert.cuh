// Numbers as they are stored, and as they are computed with.
// 16-bit formats widen exactly, and round to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/format.h"
#include "kernels/launch.h"

namespace gpu {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

__device__ inline uint32_t bits_of(float x) {
#ifdef KEEPLORA_EMULATE
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
#else
  return __float_as_uint(x);
#endif
}

__device__ inline float float_of(uint32_t bits) {
#ifdef KEEPLORA_EMULATE
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#else
  return __uint_as_float(bits);
#endif
}

// The nearest TF32 number, of two equally near ones the larger in size.
__device__ inline float nearest_tf32(float x) {
#ifdef KEEPLORA_EMULATE
  return std::isnan(x) ? x : float_of((bits_of(x) + 0x1000u) & 0xffffe000u);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return float_of(bits);
#endif
}

__device__ inline float widen(Bfloat16 x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}

__device__ inline float widen(Float16 x) {
#ifdef KEEPLORA_EMULATE
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, low = x.bits & 0x7fff;
  if (low >= 0x7c00) return float_of(sign | 0x7f800000 | low << 13);  // infinities and NaNs
  const float size = float_of(low << 13) * 0x1p112f;                  // exact, subnormal numbers too
  return float_of(sign | bits_of(size));
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

__device__ inline float widen(float x) {
  return x;
}

__device__ inline double widen(double x) {
  return x;
}

// `x` rounded to the format of S.
template <typename S>
__device__ inline S narrow(double x) {
  return static_cast<S>(x);
}

template <typename S>
__device__ inline S narrow(float x) {
  return static_cast<S>(x);
}

template <>
__device__ inline Bfloat16 narrow<Bfloat16>(float x) {
#ifdef KEEPLORA_EMULATE
  const uint32_t bits = bits_of(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#else
  Bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

template <>
__device__ inline Float16 narrow<Float16>(float x) {
#ifdef KEEPLORA_EMULATE
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, low = bits_of(x) & 0x7fffffff;
  if (low > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (low >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above
  uint32_t half;
  if (low <
      0x38800000) {  // subnormal: one unit is 2^-24, and adding 1/2 makes the float's last bit that unit
    half = bits_of(float_of(low) + 0.5f) - bits_of(0.5f);
  } else {
    half = (low + 0xfff + (low >> 13 & 1) - 0x38000000) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#else
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

// From double in one rounding: rounding to float to odd first keeps what decides the second rounding.
template <typename S>
__device__ inline S narrow_once(double x) {
  float y = static_cast<float>(x);
  if (static_cast<double>(y) != x && x == x && y - y == 0 && (bits_of(y) & 1) == 0) {
    const bool larger = (y < 0 ? -x : x) > (y < 0 ? -static_cast<double>(y) : static_cast<double>(y));
    if (y != 0) y = float_of(larger ? bits_of(y) + 1 : bits_of(y) - 1);
  }
  return narrow<S>(y);
}

template <>
__device__ inline Bfloat16 narrow<Bfloat16>(double x) {
  return narrow_once<Bfloat16>(x);
}

template <>
__device__ inline Float16 narrow<Float16>(double x) {
  return narrow_once<Float16>(x);
}

// Element `at` of an array whose type is known at run time only, as a T.
template <typename T>
__device__ inline T load(const void* array, Format format, int64_t at) {
  switch (format) {
    case Format::kFloat32:
      return static_cast<T>(static_cast<const float*>(array)[at]);
    case Format::kFloat64:
      return static_cast<T>(static_cast<const double*>(array)[at]);
    case Format::kBfloat16:
      return widen(static_cast<const Bfloat16*>(array)[at]);
    default:
      return widen(static_cast<const Float16*>(array)[at]);
  }
}

}  // namespace gpu
