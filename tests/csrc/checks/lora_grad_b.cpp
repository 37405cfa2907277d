// lora_grad_b on exact-size allocations, against double precision from the definition,
// under several schedules.
#include <cstdio>
#include <limits>

#include "checks/formats.h"
#include "emulate/block.h"
#include "kernels/lora_grad_b.h"

namespace {

using check::Array;
using check::Numbers;
using gpu::Format;

constexpr Format kF32 = Format::kFloat32, kF64 = Format::kFloat64, kBf16 = Format::kBfloat16,
                 kF16 = Format::kFloat16;

struct Adapter {
  int r, start, stop;
};

struct Case {
  int tokens, in, out, gap;  // gap: elements between the rows of x and of dy
  Format x, dy, a;
  std::vector<Adapter> adapters;
  bool misaligned;
};

Numbers rows(Format format, int height, int width, int gap, bool misaligned, std::mt19937_64& random) {
  const size_t last = height > 0 ? static_cast<size_t>(height - 1) * (width + gap) + width : 0;
  return Numbers::random(format, last, misaligned, random);
}

// Largest sum of |x a| decides what rounding may do to t, of |dy t| to dB.
template <typename T>
bool check_case(const char* name, const Case& c) {
  std::mt19937_64 random(3);
  const Numbers x = rows(c.x, c.tokens, c.in, c.gap, c.misaligned, random),
                dy = rows(c.dy, c.tokens, c.out, c.gap, c.misaligned, random);
  std::vector<Numbers> a;
  std::vector<Array<T>> db;
  std::vector<keeplora::LoraGradBAdapter<T>> adapters;
  int ranks = 0;
  for (const auto& [r, start, stop] : c.adapters) {
    a.push_back(rows(c.a, r, c.in, 0, c.misaligned, random));
    db.push_back(
        Array<T>::filled(static_cast<size_t>(stop - start) * r, c.misaligned, [](size_t) { return NAN; }));
    adapters.push_back(
        {a.back().data(), db.back().data(), r, start, stop, static_cast<T>(0.5 + adapters.size())});
    ranks += r;
  }
  const auto t =
      Array<T>::filled(static_cast<size_t>(c.tokens) * ranks, c.misaligned, [](size_t) { return NAN; });
  const keeplora::LoraGradBProblem<T> problem{x.data(), dy.data(), t.data(), c.in + c.gap, c.out + c.gap,
                                              c.tokens, c.in,      c.x,      c.dy,         c.a};
  const int count = static_cast<int>(adapters.size());
  const auto workspace = Array<unsigned char>::filled(
      keeplora::lora_grad_b_workspace(problem, adapters.data(), count), false, [](size_t) { return 0xff; });
  if (keeplora::lora_grad_b(problem, adapters.data(), count, workspace.data(), nullptr) != cudaSuccess) {
    std::printf("%s: %s\n", name, emulate::last_error().c_str());
    return false;
  }

  const double eps = std::numeric_limits<T>::epsilon();
  int first = 0;
  for (int i = 0; i < count; first += c.adapters[i++].r) {
    const auto [r, start, stop] = c.adapters[i];
    std::vector<double> exact(static_cast<size_t>(c.tokens) * r);
    for (int token = 0; token < c.tokens; ++token)
      for (int rank = 0; rank < r; ++rank) {
        double& sum = exact[static_cast<size_t>(token) * r + rank];
        for (int k = 0; k < c.in; ++k)
          sum +=
              x[static_cast<size_t>(token) * (c.in + c.gap) + k] * a[i][static_cast<size_t>(rank) * c.in + k];
        const double actual = t[static_cast<size_t>(token) * ranks + first + rank];
        if (!(std::fabs(actual - sum) <= eps * (2 * c.in + 4))) {
          std::printf("%s: t(%d, %d) of adapter %d: %.9g, exact %.9g\n", name, token, rank, i, actual, sum);
          return false;
        }
      }
    for (int row = start; row < stop; ++row)
      for (int rank = 0; rank < r; ++rank) {
        double sum = 0, size = 1;
        for (int token = 0; token < c.tokens; ++token) {
          const double product = dy[static_cast<size_t>(token) * (c.out + c.gap) + row] *
                                 exact[static_cast<size_t>(token) * r + rank];
          sum += product;
          size += std::fabs(product);
        }
        const double scale = 0.5 + i, actual = db[i][static_cast<size_t>(row - start) * r + rank];
        if (!(std::fabs(actual - scale * sum) <= 4 * eps * scale * (size + c.in))) {
          std::printf("%s: dB(%d, %d) of adapter %d: %.9g, exact %.9g\n", name, row, rank, i, actual,
                      scale * sum);
          return false;
        }
      }
  }
  return true;
}

}  // namespace

int main() {
  // Several tiles in each direction, ranges of tokens of one and of two tiles of t, the last one short;
  // empty, overlapping and odd ranges; no rank, one, and the sizes of tile there are.
  const std::vector<Adapter> fused = {{4, 0, 70}, {0, 0, 5}, {7, 70, 90}, {1, 33, 33}, {3, 5, 10}};
  const Case single{150, 70, 90, 0, kF32, kF32, kF32, fused, false};
  Case half = single, other = single, odd = single, mixed = single, none = single;
  half.x = half.dy = kBf16;
  half.gap = 6;
  half.in = 64;
  half.adapters = {{20, 8, 80}};
  other.x = other.dy = kF16;
  other.a = kBf16;
  other.adapters = {{40, 0, 90}, {33, 80, 81}};
  odd.misaligned = true;
  odd.gap = 3;
  odd.tokens = 65;
  mixed.x = kBf16;
  mixed.tokens = 30;
  mixed.in = 5;
  none.tokens = 0;
  Case wide{37, 33, 70, 0, kF64, kF32, kF64, {{17, 0, 66}, {2, 60, 70}}, false};
  Case long_range{1300, 1, 64, 0, kBf16, kBf16, kF32, std::vector<Adapter>(32, {1, 0, 64}), false};
  Case chunks{3, 4, 5, 0, kF32, kF32, kF32, std::vector<Adapter>(33, {2, 1, 4}), false};
  Case no_input{70, 0, 5, 0, kF32, kF32, kF32, {{2, 0, 5}}, false};
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 13});
    good = check_case<float>("float", single) && check_case<float>("bfloat16", half) &&
           check_case<float>("float16", other) && check_case<float>("misaligned", odd) &&
           check_case<float>("two formats", mixed) && check_case<float>("no tokens", none) &&
           check_case<double>("double", wide);
  }
  good = good && check_case<float>("ranges of several tiles", long_range) &&
         check_case<float>("more adapters than a launch takes", chunks) &&
         check_case<float>("no input", no_input);
  std::printf(good ? "lora_grad_b: as the definition says\n" : "lora_grad_b: WRONG\n");
  return good ? 0 : 1;
}
