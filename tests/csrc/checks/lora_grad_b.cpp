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
  int first, r, start, stop;
};

struct Case {
  int tokens, ranks, out, gap;  // gap: elements between the rows of dy and of t
  Format dy, t;
  std::vector<Adapter> adapters;
  bool misaligned;
  bool infinite =
      false;  // the first element of dy that the first adapter has, which is what it makes of that row only
};

Numbers rows(Format format, int height, int width, int gap, bool misaligned, std::mt19937_64& random) {
  const size_t last = height > 0 ? static_cast<size_t>(height - 1) * (width + gap) + width : 0;
  return Numbers::random(format, last, misaligned, random);
}

// The sum of |dy t| decides what rounding may do to dB.
template <typename T>
bool check_case(const char* name, const Case& c) {
  std::mt19937_64 random(3);
  const Numbers dy = rows(c.dy, c.tokens, c.out, c.gap, c.misaligned, random),
                t = rows(c.t, c.tokens, c.ranks, c.gap, c.misaligned, random);
  if (c.infinite) dy.set(c.adapters[0].start, INFINITY);
  std::vector<Array<T>> db;
  std::vector<keeplora::LoraGradBAdapter<T>> adapters;
  for (const auto& [first, r, start, stop] : c.adapters) {
    db.push_back(
        Array<T>::filled(static_cast<size_t>(stop - start) * r, c.misaligned, [](size_t) { return NAN; }));
    adapters.push_back({db.back().data(), first, r, start, stop, static_cast<T>(0.5 + adapters.size())});
  }
  const keeplora::LoraGradBProblem problem{dy.data(), t.data(), c.out + c.gap, c.ranks + c.gap, c.tokens,
                                           c.dy,      c.t};
  const int count = static_cast<int>(adapters.size());
  if (keeplora::lora_grad_b(problem, adapters.data(), count, nullptr) != cudaSuccess) {
    std::printf("%s: %s\n", name, emulate::last_error().c_str());
    return false;
  }

  const double eps = std::numeric_limits<T>::epsilon();
  for (int i = 0; i < count; ++i) {
    const auto [first, r, start, stop] = c.adapters[i];
    for (int row = start; row < stop; ++row)
      for (int rank = 0; rank < r; ++rank) {
        double sum = 0, size = 1;
        for (int token = 0; token < c.tokens; ++token) {
          const double product = dy[static_cast<size_t>(token) * (c.out + c.gap) + row] *
                                 t[static_cast<size_t>(token) * (c.ranks + c.gap) + first + rank];
          sum += product;
          size += std::fabs(product);
        }
        const double scale = 0.5 + i, actual = db[i][static_cast<size_t>(row - start) * r + rank];
        if (std::isinf(size) ? std::isfinite(actual)
                             : !(std::fabs(actual - scale * sum) <= 4 * eps * scale * size)) {
          std::printf("%s: dB(%d, %d) of adapter %d: %.9g, exact %.9g\n", name, row, rank, i, actual,
                      scale * sum);
          return false;
        }
      }
  }
  return true;
}

// The last tile of a dB with more elements than an int counts, from rows of dy and t that begin behind as many, and
// columns behind as many bytes; and tiles that no grid has room for.
bool check_large() {
  const int tokens = 33, first = 1 << 29, columns = (1 << 21) + 64, r = 1024, tile = 64;
  const int64_t pitch = int64_t{first} + 2 * columns;
  bool good = true;
  for (const Format t_format : {kF32, kBf16}) {
    const check::Sparse<uint16_t> dy(tokens * pitch);
    const check::Sparse<float> t(tokens * pitch), db(int64_t{columns} * r);
    const auto set_t = [&](int64_t at, float x) {
      if (t_format == kF32)
        t[at] = x;
      else
        reinterpret_cast<gpu::Bfloat16*>(t.data())[at] = gpu::narrow<gpu::Bfloat16>(x);
    };
    for (int token = 0; token < tokens; ++token)
      for (int i = 0; i < tile; ++i) {
        dy[token * pitch + first + columns - tile + i] =
            gpu::narrow<gpu::Bfloat16>(static_cast<float>(i - token)).bits;
        set_t(token * pitch + first + r - tile + i, static_cast<float>(i + 2 * token));
      }
    const keeplora::LoraGradBProblem problem{dy.data(), t.data(), pitch, pitch, tokens, kBf16, t_format};
    keeplora::LoraGradBAdapter<float> adapter{db.data(), first, r, first, first + columns, 1.0f};
    emulate::set_schedule({.last_blocks = 1});
    good = good && keeplora::lora_grad_b(problem, &adapter, 1, nullptr) == cudaSuccess;
    emulate::set_schedule({});
    for (int i = 0; good && i < tile * tile; ++i) {
      const int column = i / tile, rank = i % tile;
      float exact = 0;
      for (int token = 0; token < tokens; ++token)
        exact += static_cast<float>((column - token) * (rank + 2 * token));
      const float actual = db[int64_t{columns - tile + column} * r + r - tile + rank];
      good = actual == exact;
      if (!good)
        std::printf("large, dB(%d, %d) of the last: %.9g, exact %.9g\n", column, rank, actual, exact);
    }
    adapter.r = adapter.stop = 1 << 30;
    adapter.start = 0;
    if (good && keeplora::lora_grad_b(problem, &adapter, 1, nullptr) != cudaErrorInvalidValue) {
      std::printf("2^48 tiles are taken\n");
      good = false;
    }
  }
  return good;
}

}  // namespace

int main() {
  // Several tiles in each direction, a cluster of one block and of several, some of them without tokens;
  // empty, overlapping and odd ranges, columns of t that nobody asks for; no rank, one, the sizes of tile there
  // are, and two of the largest.
  const std::vector<Adapter> fused = {
      {0, 4, 0, 70}, {4, 0, 0, 5}, {6, 7, 70, 90}, {3, 1, 33, 33}, {13, 3, 5, 10}};
  const Case single{150, 17, 90, 0, kF32, kF32, fused, false};
  Case half = single, other = single, odd = single, mixed = single, none = single;
  half.dy = kBf16;
  half.gap = 7;
  half.infinite = true;
  half.adapters = {{0, 17, 8, 80}};
  other.dy = kF16;
  other.t = kBf16;
  other.ranks = 93;
  other.adapters = {{0, 40, 0, 90}, {3, 90, 80, 81}};
  odd.misaligned = true;
  odd.gap = 3;
  odd.tokens = 65;
  mixed.dy = kBf16;
  mixed.tokens = 30;
  none.tokens = 0;
  Case wide{70, 19, 70, 0, kF64, kF32, {{0, 17, 0, 66}, {17, 2, 60, 70}}, false};
  Case long_range{1300, 8, 64, 0, kBf16, kF32, {{0, 8, 0, 64}}, false};
  Case chunks{3, 66, 5, 0, kF32, kF32, {}, false};
  for (int i = 0; i < 33; ++i)
    chunks.adapters.push_back({2 * i, 2, 1, 4});
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 13});
    good = check_case<float>("float", single) && check_case<float>("bfloat16", half) &&
           check_case<float>("float16", other) && check_case<float>("misaligned", odd) &&
           check_case<float>("two formats", mixed) && check_case<float>("no tokens", none) &&
           check_case<double>("double", wide);
  }
  good = good && check_case<float>("many tokens", long_range) &&
         check_case<float>("more adapters than a launch takes", chunks) && check_large();
  std::printf(good ? "lora_grad_b: as the definition says\n" : "lora_grad_b: WRONG\n");
  return good ? 0 : 1;
}
