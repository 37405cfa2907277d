// sketch_rows on exact-size allocations, against double precision from the definition,
// under several schedules.
#include <cstdio>
#include <limits>

#include "checks/inputs.h"
#include "emulate/block.h"
#include "kernels/sketch_rows.h"

namespace {

using check::Array;
using gpu::Format;

struct Case {
  int tokens, d_in, d_out, width;
  Format x, delta;
  bool misaligned;
};

// A matrix in a format of its own, and its values.
struct Input {
  Array<double> doubles;
  Array<float> floats;
  Array<uint16_t> shorts;
  const void* data;
  std::vector<double> values;

  Input(size_t size, Format format, bool misaligned, std::mt19937_64& random) : values(size) {
    std::normal_distribution<double> normal;
    if (format == Format::kFloat64) {
      doubles = Array<double>::filled(size, misaligned, [&](size_t i) { return values[i] = normal(random); });
      data = doubles.data();
    } else if (format == Format::kFloat32) {
      floats = Array<float>::filled(size, misaligned,
                                    [&](size_t i) { return values[i] = static_cast<float>(normal(random)); });
      data = floats.data();
    } else {  // sign, exponent and fraction drawn, so that nothing needs to be rounded
      const int fraction_bits = format == Format::kBfloat16 ? 7 : 10;
      const int bias = format == Format::kBfloat16 ? 127 : 15;
      shorts = Array<uint16_t>::filled(size, misaligned, [&](size_t i) {
        const int negative = random() % 2, exponent = static_cast<int>(random() % 5) - 3,
                  fraction = random() % (1 << fraction_bits);
        values[i] = std::ldexp(1 + std::ldexp(fraction, -fraction_bits), exponent) * (negative ? -1 : 1);
        return negative << 15 | (exponent + bias) << fraction_bits | fraction;
      });
      data = shorts.data();
    }
  }
};

uint32_t finalizer(uint64_t h) {
  h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF;
  h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF;
  return static_cast<uint32_t>(h ^ h >> 16);
}

int sign(uint64_t seed, uint32_t i, uint32_t j) {
  const uint32_t state = finalizer(finalizer(seed & 0xFFFFFFFF) ^ seed >> 32);
  return finalizer(finalizer(state ^ i) ^ j / 32) >> j % 32 & 1 ? -1 : 1;
}

template <typename T>
bool check_case(const Case& c) {
  const auto [tokens, d_in, d_out, width, x_format, delta_format, misaligned] = c;
  const uint64_t seed = (uint64_t{5} << 40) + 12;
  std::mt19937_64 random(9);
  const Input x(static_cast<size_t>(tokens) * d_in, x_format, misaligned, random);
  const Input delta(static_cast<size_t>(tokens) * d_out, delta_format, misaligned, random);
  const Array<T> z = Array<T>::normal(static_cast<size_t>(width) * d_in, misaligned, random);
  std::vector<double> exact(z.data(), z.data() + z.size());
  // Of one number S is what it was, up to its sign.
  const bool rounded = x_format == Format::kBfloat16 && delta_format == Format::kBfloat16 && d_out > 1;
  double most = 0;  // of what is added up for one element of Z
  for (int i = 0; i < width; ++i) {
    std::vector<double> all(d_in);
    for (int t = 0; t < tokens; ++t) {
      double s = 0;
      for (int j = 0; j < d_out; ++j)
        s += sign(seed, i, j) * delta.values[static_cast<size_t>(t) * d_out + j];
      for (int k = 0; k < d_in; ++k) {
        const double product = s * x.values[static_cast<size_t>(t) * d_in + k] / std::sqrt(width);
        exact[static_cast<size_t>(i) * d_in + k] += product;
        most = std::fmax(most, all[k] += std::fabs(product));
      }
    }
  }
  const keeplora::SketchRowsProblem problem{x.data, x_format, delta.data, delta_format, z.data(),
                                            tokens, d_in,     d_out,      width,        seed};
  const Array<unsigned char> workspace = Array<unsigned char>::filled(
      keeplora::sketch_rows_workspace(problem), false, [](size_t) { return 0xff; });
  if (keeplora::sketch_rows(problem, workspace.data(), nullptr) != cudaSuccess) {
    std::printf("%d x %d, %d, %d: %s\n", tokens, d_in, d_out, width, emulate::last_error().c_str());
    return false;
  }
  double size = 0;
  for (double value : exact)
    size = std::fmax(size, std::fabs(value));
  const double eps = std::numeric_limits<T>::epsilon();
  const double error = check::worst(z, exact);
  const double allowed =
      2 * (std::sqrt(tokens + d_out) + 4) * eps * size + (rounded ? most * std::ldexp(1, -8) : 0);
  if (error <= allowed) return true;
  std::printf("%d x %d, %d, width %d, formats %d %d: error %.2e, allowed %.2e\n", tokens, d_in, d_out, width,
              static_cast<int>(x_format), static_cast<int>(delta_format), error, allowed);
  return false;
}

// S alone takes 2^34 bytes.
bool check_workspace() {
  const keeplora::SketchRowsProblem problem{
      nullptr, Format::kFloat32, nullptr, Format::kFloat32, nullptr, 16384, 1, 1, 1 << 18, 0};
  const int64_t bytes = keeplora::sketch_rows_workspace(problem);
  if (bytes >= int64_t{1} << 34) return true;
  std::printf("a workspace of %lld bytes for 2^32 numbers\n", static_cast<long long>(bytes));
  return false;
}

}  // namespace

int main() {
  const Format f32 = Format::kFloat32, f64 = Format::kFloat64, bf16 = Format::kBfloat16,
               f16 = Format::kFloat16;
  // Odd, empty, unaligned, several tiles and steps in each direction, several parts of tokens (above 256),
  // a part behind the last whole token tile, more sums of parts than one block has; rows and columns of Psi beyond 256.
  const std::vector<Case> cases = {{1, 1, 1, 1, f32, f32, false},       {70, 70, 40, 5, f32, f32, false},
                                   {300, 20, 33, 66, f32, bf16, false}, {37, 70, 290, 3, f16, f32, true},
                                   {9, 5, 3, 2, bf16, f16, false},      {0, 5, 3, 2, f32, f32, false},
                                   {5, 4, 0, 2, f32, f32, false},       {5, 0, 3, 2, f32, f32, false},
                                   {1, 1, 1, 1, bf16, bf16, false},     {150, 140, 70, 67, bf16, bf16, false},
                                   {300, 9, 33, 5, bf16, bf16, true},   {3, 5, 40, 300, f32, f32, false}};
  const std::vector<Case> wide = {{70, 66, 40, 18, f64, f64, false},
                                  {300, 5, 7, 3, f64, bf16, true},
                                  {6, 5, 7, 3, f16, f64, false},
                                  {6, 5, 7, 3, f32, f64, false}};
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 11});
    for (const Case& c : cases)
      good = good && check_case<float>(c);
    for (const Case& c : wide)
      good = good && check_case<double>(c);
  }
  // More tokens than one launch takes, and as many parts as they may have.
  emulate::set_schedule({});
  good = good && check_case<float>({16385, 1, 1, 1, bf16, bf16, false}) && check_workspace();
  std::printf(good ? "sketch_rows: as the definition says\n" : "sketch_rows: WRONG\n");
  return good ? 0 : 1;
}
