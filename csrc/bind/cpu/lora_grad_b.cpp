// lora_grad_b: dB_i = c_i dy_i^T t_i for all adapters of a layer, from one read of dy in its own dtype.
//
// Tiles of kVectors vectors along dy's columns by kSteps columns of t, kBlock tokens at a time: with more, rows
// that lie 2^n bytes apart push each other out of the first cache. Every sum is formed by one thread in one
// order. What a prefetch asks for may lie beyond dy: that is no access.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "bind/cpu/levels.h"
#include "bind/cpu/matrix.h"
#include "bind/dispatch.h"
#include "bind/spans.h"
#ifdef KEEPLORA_X86
#include <immintrin.h>
#endif

namespace keeplora {
namespace {

using cpu::Bfloat16;
using cpu::Buffer;
using cpu::padded;
using cpu::Wide;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "lora_grad_b";
constexpr int kVectors = 2;  // in a tile
constexpr int64_t kBlock = 16;         // tokens
constexpr int64_t kMostSteps = 8;      // t is packed in multiples of it
constexpr int64_t kColumnGrain = 384;  // of dy, for one thread

// What one thread forms: the rows of a dB that are `columns` of dy from `dy` on. T: what t was packed as.
template <typename S, typename T, typename R>
struct Piece {
  const S* dy;
  int64_t stride, tokens, columns, r, steps;
  const T* t;  // [tokens][steps], zeros from r on
  R* out;      // [columns][r]
  R scale;
};

// Numbers 2i of a run of 2 kBytes / 4 to `even`, 2i + 1 to `odd`: cheaper than in order.
template <int kBytes>
KEEPLORA_INLINE void load_pairs(Wide<float, kBytes>& even, Wide<float, kBytes>& odd, const Bfloat16* from) {
  using Bits = Wide<uint32_t, kBytes>;
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  const Bits low = bits << 16, high = bits & 0xffff0000u;
  even = (Wide<float, kBytes>)low;
  odd = (Wide<float, kBytes>)high;
}
template <int kBytes, typename T>
KEEPLORA_INLINE void load_pairs(Wide<T, kBytes>& first, Wide<T, kBytes>& second, const T* from) {
  cpu::load<kBytes>(first, from);
  cpu::load<kBytes>(second, from + kBytes / sizeof(T));
}
// Where load_pairs puts number i of a run.
template <int kBytes, typename T, typename S>
constexpr int64_t place_in_pairs(int64_t i) {
  return sizeof(S) == sizeof(T) ? i : i % 2 * (kBytes / static_cast<int64_t>(sizeof(T))) + i / 2;
}

template <typename S, typename T>
struct Columns {
  template <int kBytes>
  KEEPLORA_INLINE static void run(const Piece<S, T, T>& piece) {
    constexpr int kLanes = kBytes / sizeof(T), kSteps = kBytes == 64 ? 8 : 4;  // 16 or 8 vectors of sums
    constexpr int64_t kStrip = kVectors * kLanes;
    const int64_t strips = padded(piece.columns, kStrip) / kStrip, steps = piece.steps;
    const Buffer<T> sums(strips * steps * kStrip);  // [strips][steps][kStrip]
    std::fill(sums.get(), sums.get() + strips * steps * kStrip, T(0));
    alignas(64) S edge[kBlock * kStrip] = {};
    for (int64_t first = 0; first < piece.tokens; first += kBlock) {
      const int64_t depth = std::min(kBlock, piece.tokens - first);
      const T* t = piece.t + first * steps;
      for (int64_t s = 0; s < strips; ++s) {
        const S* from = piece.dy + first * piece.stride + s * kStrip;
        int64_t stride = piece.stride;
        const int64_t left = piece.columns - s * kStrip;
        if (left < kStrip) {  // nothing is read beyond a strip that is not whole
          for (int64_t k = 0; k < depth; ++k)
            std::copy(from + k * stride, from + k * stride + left, edge + k * kStrip);
          from = edge, stride = kStrip;
        } else {
          const int64_t next = std::min(kBlock, piece.tokens - first - depth);
          for (int64_t k = depth; k < depth + next; ++k) {
            __builtin_prefetch(from + k * stride, 0, 2);
            __builtin_prefetch(from + k * stride + kStrip - 1, 0, 2);
          }
        }
        for (int64_t j = 0; j < steps; j += kSteps)
          tile<kBytes, kSteps>(from, stride, t + j, steps, depth, sums.get() + (s * steps + j) * kStrip);
      }
    }
    for (int64_t row = 0; row < piece.columns; ++row) {
      const T* from =
          sums.get() + row / kStrip * steps * kStrip + place_in_pairs<kBytes, T, S>(row % kStrip);
      for (int64_t j = 0; j < piece.r; ++j)
        piece.out[row * piece.r + j] = piece.scale * from[j * kStrip];
    }
  }

  // sums[kSteps][kStrip] += t[k][t_stride]^T x[k][stride] over `depth` of k.
  template <int kBytes, int kSteps>
  KEEPLORA_INLINE static void tile(const S* x, int64_t stride, const T* t, int64_t t_stride, int64_t depth,
                                   T* sums) {
    constexpr int kLanes = kBytes / sizeof(T);
    Wide<T, kBytes> sum[kSteps][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Wide<T, kBytes> part[kVectors];
      load_pairs<kBytes>(part[0], part[1], x + k * stride);
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j)
        for (int v = 0; v < kVectors; ++v)
          sum[j][v] += t[k * t_stride + j] * part[v];
    }
#pragma GCC unroll 8
    for (int j = 0; j < kSteps; ++j)
      for (int v = 0; v < kVectors; ++v) {
        T* to = sums + (j * kVectors + v) * kLanes;
        Wide<T, kBytes> total;
        cpu::load<kBytes>(total, to);
        total += sum[j][v];
        cpu::store<kBytes>(to, total);
      }
  }
};

#ifdef KEEPLORA_X86
// As Columns, two tokens in an instruction: products of bfloat16 are exact, their sums are formed in float.
constexpr int64_t kDotSteps = 8, kDotStrip = 32, kDotBlock = 32;

__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))) void dot_columns(
    const Piece<Bfloat16, uint32_t, float>& piece) {
  const int64_t strips = padded(piece.columns, kDotStrip) / kDotStrip, steps = piece.steps;
  const Buffer<float> sums(strips * steps * kDotStrip);
  std::fill(sums.get(), sums.get() + strips * steps * kDotStrip, 0.0f);
  for (int64_t first = 0; first < piece.tokens; first += kDotBlock) {
    const int64_t depth = std::min(kDotBlock, piece.tokens - first);
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t valid = std::min(kDotStrip, piece.columns - s * kDotStrip);
      const __mmask32 mask = valid == 32 ? 0xffffffffu : (1u << valid) - 1;
      const Bfloat16* from = piece.dy + first * piece.stride + s * kDotStrip;
      const int64_t next = std::min(kDotBlock, piece.tokens - first - depth);
      for (int64_t k = depth; k < depth + next; ++k)
        __builtin_prefetch(from + k * piece.stride, 0, 2);
      for (int64_t j = 0; j < steps; j += kDotSteps) {
        float* own = sums.get() + (s * steps + j) * kDotStrip;
        const uint32_t* pairs = piece.t + first / 2 * steps + j;
        __m512 low[kDotSteps], high[kDotSteps];
#pragma GCC unroll 8
        for (int i = 0; i < kDotSteps; ++i)
          low[i] = high[i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < depth; k += 2, pairs += steps) {
          const __m512i a = _mm512_maskz_loadu_epi16(mask, from + k * piece.stride);
          const __m512i b = k + 1 < depth ? _mm512_maskz_loadu_epi16(mask, from + (k + 1) * piece.stride)
                                          : _mm512_setzero_si512();
          const __m512bh front = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
          const __m512bh back = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
#pragma GCC unroll 8
          for (int i = 0; i < kDotSteps; ++i) {
            const __m512bh pair =
                reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pairs[i])));
            low[i] = _mm512_dpbf16_ps(low[i], front, pair);
            high[i] = _mm512_dpbf16_ps(high[i], back, pair);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kDotSteps; ++i) {
          float* to = own + i * kDotStrip;
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), low[i]));
          _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), high[i]));
        }
      }
    }
  }
  for (int64_t row = 0; row < piece.columns; ++row) {
    const int64_t i = row % kDotStrip, place = i % 8 / 4 * 16 + i / 8 * 4 + i % 4;  // as unpack deals out
    const float* from = sums.get() + row / kDotStrip * steps * kDotStrip + place;
    for (int64_t j = 0; j < piece.r; ++j)
      piece.out[row * piece.r + j] = piece.scale * from[j * kDotStrip];
  }
}
#endif

template <typename T, typename S>
T widened(const S& number) {
  if constexpr (std::is_same_v<S, Bfloat16>) {
    const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  } else {
    return number;
  }
}

// Columns [p, q) of t, one row of `steps` after the other.
template <typename S, typename T>
void pack(const Tensor& t, int64_t p, int64_t q, int64_t steps, T* to) {
  const auto* from = static_cast<const S*>(t.const_data_ptr());
  for (int64_t k = 0; k < t.size(0); ++k, to += steps)
    for (int64_t j = 0; j < steps; ++j)
      to[j] = p + j < q ? widened<T>(from[k * t.stride(0) + (p + j) * t.stride(1)]) : T(0);
}

// The same in pairs of tokens, the second in the upper half.
void pack_pairs(const Tensor& t, int64_t p, int64_t q, int64_t steps, uint32_t* to) {
  const auto* from = static_cast<const uint16_t*>(t.const_data_ptr());
  for (int64_t k = 0; k < t.size(0); k += 2, to += steps)
    for (int64_t j = 0; j < steps; ++j) {
      const uint16_t* at = from + k * t.stride(0) + (p + j) * t.stride(1);
      to[j] = p + j >= q ? 0u : *at | (k + 1 < t.size(0) ? static_cast<uint32_t>(at[t.stride(0)]) << 16 : 0u);
    }
}

// S: of dy and t in memory; T: of t as it is packed by `fill`; R: of the results.
template <typename S, typename T, typename R, typename Fill, typename Form>
void run(const Tensor& dy, const Tensor& t, const std::vector<int64_t>& place,
         const std::vector<double>& scale, std::vector<Tensor>& db, Fill&& fill, Form&& form) {
  std::vector<Buffer<T>> packed;
  std::vector<Piece<S, T, R>> pieces;
  for (size_t i = 0; i < db.size(); ++i) {
    const int64_t p = place[4 * i], q = place[4 * i + 1], s = place[4 * i + 2], e = place[4 * i + 3];
    if (p == q || s == e) continue;
    const int64_t r = q - p, steps = padded(r, kMostSteps);
    const T* own = packed.emplace_back(std::max<int64_t>(1, t.size(0) * steps)).get();
    fill(t, p, q, steps, packed.back().get());
    for (int64_t column = s; column < e; column += kColumnGrain)
      pieces.push_back({static_cast<const S*>(dy.const_data_ptr()) + column, dy.stride(0), dy.size(0),
                        std::min(kColumnGrain, e - column), r, steps, own,
                        db[i].template mutable_data_ptr<R>() + (column - s) * r, static_cast<R>(scale[i])});
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      form(pieces[i]);
  });
}

std::vector<Tensor> lora_grad_b_cpu(Tensor dy, Tensor t, std::vector<int64_t> place,
                                    std::vector<double> scale) {
  STD_TORCH_CHECK(dy.dim() == 2 && t.dim() == 2 && dy.size(0) == t.size(0), kOp,
                  ": dy and t must be matrices with equally many rows, got dimensions ", dy.dim(), " and ",
                  t.dim());
  check_spans(kOp, dy, t, place, scale);
  const bool is_double = dy.scalar_type() == ScalarType::Double || t.scalar_type() == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const bool half = dy.scalar_type() == ScalarType::BFloat16 && t.scalar_type() == ScalarType::BFloat16;
  if (!half && dy.scalar_type() != wide) dy = torch::stable::to(dy, wide);
  if (!half && t.scalar_type() != wide) t = torch::stable::to(t, wide);
  if (dy.stride(1) != 1) dy = torch::stable::contiguous(dy);
  std::vector<Tensor> db;
  for (size_t i = 0; i < scale.size(); ++i)
    db.push_back(torch::stable::new_empty(
        dy, {place[4 * i + 3] - place[4 * i + 2], place[4 * i + 1] - place[4 * i]}, wide));
  const int bytes = cpu::vector_bytes();
  const auto as_they_are = [&](auto* s, auto* w) {
    using S = ElementOf<decltype(s)>;
    using T = ElementOf<decltype(w)>;
    run<S, T, T>(dy, t, place, scale, db, pack<S, T>, [&](const Piece<S, T, T>& piece) {
      cpu::on_this_cpu<Columns<S, T>>(bytes, piece);
    });
  };
  constexpr float* kFloat = nullptr;
  constexpr double* kDouble = nullptr;
  if (is_double)
    as_they_are(kDouble, kDouble);
#ifdef KEEPLORA_X86
  else if (half && cpu::level() == 3)
    run<Bfloat16, uint32_t, float>(dy, t, place, scale, db, pack_pairs, dot_columns);
#endif
  else if (half)
    as_they_are(static_cast<Bfloat16*>(nullptr), kFloat);
  else
    as_they_are(kFloat, kFloat);
  return db;
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CPU, m) {
  m.impl("lora_grad_b", TORCH_BOX(&lora_grad_b_cpu));
}

}  // namespace
}  // namespace keeplora
