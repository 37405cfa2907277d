// Conversions to and from 16-bit formats, on every number of a format and around the middle of every gap.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "conformance/machine.h"
#include "kernels/primitives/convert.cuh"

namespace conformance {

// A format from its definition: exponent and fraction bits.
template <typename S>
struct Format;
template <>
struct Format<gpu::Bfloat16> {
  static constexpr int kExponent = 8, kFraction = 7;
};
template <>
struct Format<gpu::Float16> {
  static constexpr int kExponent = 5, kFraction = 10;
};

// Value of the bits without a sign; infinite from the largest exponent on.
template <typename S>
double value_of(int bits) {
  using F = Format<S>;
  constexpr int bias = (1 << (F::kExponent - 1)) - 1;
  const int exponent = bits >> F::kFraction, fraction = bits & ((1 << F::kFraction) - 1);
  if (exponent == (1 << F::kExponent) - 1) return std::numeric_limits<double>::infinity();
  if (exponent == 0) return std::ldexp(fraction, 1 - bias - F::kFraction);
  return std::ldexp((1 << F::kFraction) + fraction, exponent - bias - F::kFraction);
}

template <typename S, typename T>
__global__ void narrow_kernel(const T* from, int* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = gpu::narrow<S>(from[i]).bits;
}

template <typename S>
__global__ void widen_kernel(float* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = gpu::widen(S{static_cast<uint16_t>(i)});
}

// T is float or double: what is rounded.
template <typename S, typename T>
std::string check_narrow() {
  constexpr int infinity = ((1 << Format<S>::kExponent) - 1) << Format<S>::kFraction;
  std::vector<T> from;
  std::vector<int> expected;
  const auto add = [&](T value, int bits) {
    from.insert(from.end(), {value, -value});
    expected.insert(expected.end(), {bits, bits | 0x8000});
  };
  for (int bits = 0; bits < infinity; ++bits) {
    const double low = value_of<S>(bits);
    // Beyond the largest number lies one more step, from whose middle on numbers become infinite.
    const double step = bits + 1 < infinity ? value_of<S>(bits + 1) - low : low - value_of<S>(bits - 1);
    const double middle = low + step / 2;
    add(static_cast<T>(low), bits);
    if (static_cast<double>(static_cast<T>(middle)) != middle) continue;  // below the smallest float
    add(static_cast<T>(middle), bits % 2 == 0 ? bits : bits + 1);
    add(std::nextafter(static_cast<T>(middle), T(0)), bits);
    add(std::nextafter(static_cast<T>(middle), std::numeric_limits<T>::infinity()), bits + 1);
  }
  add(std::numeric_limits<T>::infinity(), infinity);
  const int count = static_cast<int>(from.size());
  from.push_back(std::numeric_limits<T>::quiet_NaN());
  expected.push_back(0);
  const Memory<T> values(from);
  const Memory<int> found(std::vector<int>(count + 1, -1));
  const std::string failed =
      problem(gpu::launch(narrow_kernel<S, T>, {dim3((count + 256) / 256), dim3(256)},
                          static_cast<const T*>(values.get()), found.get(), count + 1));
  if (!failed.empty()) return failed;
  auto bits = found.values();
  if ((bits[count] & 0x7fff) <= infinity) return "a NaN became " + std::to_string(bits[count]);
  bits[count] = 0;
  return difference(bits, expected);
}

__global__ static void tf32_kernel(const float* from, float* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = gpu::nearest_tf32(from[i]);
}

inline float float_from(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Every fraction of TF32 with some exponents, and what lies around the middle of each gap.
inline std::string check_nearest_tf32() {
  std::vector<float> from;
  std::vector<int> expected;
  const auto add = [&](uint32_t bits, uint32_t rounded) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      from.push_back(float_from(bits | sign));
      expected.push_back(static_cast<int>(rounded | sign));
    }
  };
  for (const uint32_t exponent : {1u, 2u, 126u, 127u, 200u, 253u})
    for (uint32_t fraction = 0; fraction < 1024; ++fraction) {
      const uint32_t bits = (exponent << 10 | fraction) << 13, next = bits + (1u << 13);
      add(bits, bits);
      add(bits + 0x0fff, bits);
      add(bits + 0x1000, next);
      add(bits + 0x1001, next);
    }
  add(0, 0);
  add(0x7f800000u, 0x7f800000u);
  const int count = static_cast<int>(from.size());
  from.push_back(std::numeric_limits<float>::quiet_NaN());
  from.push_back(float_from(0x7fffffffu));
  const Memory<float> values(from), found(std::vector<float>(count + 2, -1.0f));
  const std::string failed =
      problem(gpu::launch(tf32_kernel, {dim3((count + 257) / 256), dim3(256)},
                          static_cast<const float*>(values.get()), found.get(), count + 2));
  if (!failed.empty()) return failed;
  const auto numbers = found.values();
  if (!std::isnan(numbers[count]) || !std::isnan(numbers[count + 1])) return "a NaN became a number";
  std::vector<int> bits(count);
  for (int i = 0; i < count; ++i)
    std::memcpy(&bits[i], &numbers[i], sizeof(bits[i]));
  return difference(bits, expected);
}

template <typename S>
std::string check_widen() {
  constexpr int infinity = ((1 << Format<S>::kExponent) - 1) << Format<S>::kFraction;
  const Memory<float> found(std::vector<float>(65536, -1.0f));
  const std::string failed =
      problem(gpu::launch(widen_kernel<S>, {dim3(256), dim3(256)}, found.get(), 65536));
  if (!failed.empty()) return failed;
  const auto values = found.values();
  for (int i = 0; i < 65536; ++i) {
    const double size = value_of<S>(i & 0x7fff), expected = i & 0x8000 ? -size : size;
    const bool good = (i & 0x7fff) > infinity
                          ? std::isnan(values[i])
                          : values[i] == expected && std::signbit(values[i]) == (i >= 0x8000);
    if (!good) return "bits " + std::to_string(i) + " became " + std::to_string(values[i]);
  }
  return "";
}

}  // namespace conformance
