// lora_grad_b: dB_i = c_i dy_i^T t_i for all adapters of a layer, from one read of dy in its own dtype.
//
// Tiles of kVectors vectors along dy's columns by kSteps columns of t, kBlock tokens at a time: with more,
// rows that lie 2^n bytes apart push each other out of the first cache. Every sum is formed by one thread in
// one order. What a prefetch asks for may lie beyond dy: that is no access.
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
constexpr int kVectors = 2;        // in a tile
constexpr int64_t kBlock = 16;     // tokens
constexpr int64_t kMostSteps = 8;  // t is packed in multiples of it, or of kTileRanks
constexpr int64_t kTileRanks = 16, kTileTokens = 32;
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

// An adapter's columns of t.
template <typename S>
struct Slice {
  const S* data;
  int64_t tokens, r, stride, step;  // from token to token, from rank to rank

  const S& at(int64_t token, int64_t rank) const { return data[token * stride + rank * step]; }
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
      const T* from = sums.get() + row / kStrip * steps * kStrip + place_in_pairs<kBytes, T, S>(row % kStrip);
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
            const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pairs[i])));
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

#ifdef KEEPLORA_AMX
// As dot_columns, in products of tiles: 16 ranks x 32 tokens by 32 tokens x 16 columns.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
};

__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))) void
tile_columns(const Piece<Bfloat16, Bfloat16, float>& piece) {
  constexpr int64_t kStrip = 64, kTiles = kStrip / 16, kBlocks = 4;  // a block: kTileTokens
  constexpr int64_t kTile = 16 * 16;
  const int64_t groups = piece.steps / kTileRanks, strips = padded(piece.columns, kStrip) / kStrip;
  const Buffer<float> sums(strips * groups * kTiles *
                           kTile);  // [strips][groups][kTiles][16 ranks][16 columns]
  std::fill(sums.get(), sums.get() + strips * groups * kTiles * kTile, 0.0f);
  alignas(64) uint32_t pairs[kBlocks][kTiles][kTile];  // of tokens: [16 pairs][16 columns]
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  for (int64_t first = 0; first < piece.tokens; first += kBlocks * kTileTokens) {
    const int64_t depth = std::min(kBlocks * kTileTokens, piece.tokens - first);
    const int64_t blocks = padded(depth, kTileTokens) / kTileTokens;
    for (int64_t s = 0; s < strips; ++s) {
      const Bfloat16* from = piece.dy + first * piece.stride + s * kStrip;
      const int64_t next = std::min(kBlocks * kTileTokens, piece.tokens - first - depth);
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t valid = std::clamp<int64_t>(piece.columns - s * kStrip - 32 * half, 0, 32);
        const __mmask32 mask = valid == 32 ? 0xffffffffu : (1u << valid) - 1;
        for (int64_t k = 0; k < blocks * kTileTokens; k += 2) {
          const Bfloat16* at = from + k * piece.stride + 32 * half;
          const __m512i a = k < depth ? _mm512_maskz_loadu_epi16(mask, at) : _mm512_setzero_si512();
          const __m512i b =
              k + 1 < depth ? _mm512_maskz_loadu_epi16(mask, at + piece.stride) : _mm512_setzero_si512();
          uint32_t* to = pairs[k / kTileTokens][2 * half] + k % kTileTokens / 2 * 16;
          _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
          _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(a, b));
          if (k < next) {
            __builtin_prefetch(at + kBlocks * kTileTokens * piece.stride, 0, 2);
            __builtin_prefetch(at + (kBlocks * kTileTokens + 1) * piece.stride, 0, 2);
          }
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        float* own = sums.get() + (s * groups + g) * kTiles * kTile;
        _tile_loadd(0, own, 64);
        _tile_loadd(1, own + kTile, 64);
        _tile_loadd(2, own + 2 * kTile, 64);
        _tile_loadd(3, own + 3 * kTile, 64);
        for (int64_t k = 0; k < blocks; ++k) {
          const int64_t block = first / kTileTokens + k;
          _tile_loadd(4, piece.t + (block * groups + g) * kTileRanks * kTileTokens, 64);
          _tile_loadd(5, pairs[k][0], 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_loadd(5, pairs[k][1], 64);
          _tile_dpbf16ps(1, 4, 5);
          _tile_loadd(5, pairs[k][2], 64);
          _tile_dpbf16ps(2, 4, 5);
          _tile_loadd(5, pairs[k][3], 64);
          _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, own, 64);
        _tile_stored(1, own + kTile, 64);
        _tile_stored(2, own + 2 * kTile, 64);
        _tile_stored(3, own + 3 * kTile, 64);
      }
    }
  }
  _tile_release();
  for (int64_t row = 0; row < piece.columns; ++row) {
    const int64_t i = row % 32, tile = row % kStrip / 32 * 2 + i % 8 / 4;  // as unpack deals out
    const float* from = sums.get() + (row / kStrip * groups * kTiles + tile) * kTile + i / 8 * 4 + i % 4;
    for (int64_t j = 0; j < piece.r; ++j)
      piece.out[row * piece.r + j] =
          piece.scale * from[j / kTileRanks * kTiles * kTile + j % kTileRanks * 16];
  }
}

// t^T in such tiles: [blocks of tokens][groups of ranks][16 ranks][32 tokens].
void pack_tiles(const Slice<Bfloat16>& t, int64_t steps, Bfloat16* to) {
  for (int64_t first = 0; first < t.tokens; first += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, t.tokens - first);
    std::fill(to, to + steps * kTileTokens, Bfloat16{0});
    for (int64_t k = 0; k < tokens; ++k)
      for (int64_t j = 0; j < t.r; ++j)
        to[j * kTileTokens + k] = t.at(first + k, j);
    to += steps * kTileTokens;
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

// One row of `steps` after the other.
template <typename S, typename T>
void pack(const Slice<S>& t, int64_t steps, T* to) {
  for (int64_t k = 0; k < t.tokens; ++k, to += steps) {
    for (int64_t j = 0; j < t.r; ++j)
      to[j] = widened<T>(t.at(k, j));
    std::fill(to + t.r, to + steps, T(0));
  }
}

// The same in pairs of tokens, the second in the upper half.
void pack_pairs(const Slice<Bfloat16>& t, int64_t steps, uint32_t* to) {
  for (int64_t k = 0; k < t.tokens; k += 2, to += steps) {
    for (int64_t j = 0; j < t.r; ++j)
      to[j] = t.at(k, j).bits | (k + 1 < t.tokens ? static_cast<uint32_t>(t.at(k + 1, j).bits) << 16 : 0u);
    std::fill(to + t.r, to + steps, 0u);
  }
}

// S: of dy and t in memory; T: of t as it is packed by `fill`; R: of the results.
template <typename S, typename T, typename R, int64_t kSteps, typename Fill, typename Form>
void run(const Tensor& dy, const Tensor& t, const std::vector<int64_t>& place,
         const std::vector<double>& scale, std::vector<Tensor>& db, Fill&& fill, Form&& form) {
  const auto* from = static_cast<const S*>(t.const_data_ptr());
  std::vector<Buffer<T>> packed;
  std::vector<Piece<S, T, R>> pieces;
  for (size_t i = 0; i < db.size(); ++i) {
    const int64_t p = place[4 * i], q = place[4 * i + 1], s = place[4 * i + 2], e = place[4 * i + 3];
    if (p == q || s == e) continue;
    const int64_t r = q - p, steps = padded(r, kSteps);
    T* own = packed.emplace_back(padded(t.size(0), kTileTokens) * steps).get();
    fill(Slice<S>{from + p * t.stride(1), t.size(0), r, t.stride(0), t.stride(1)}, steps, own);
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
    run<S, T, T, kMostSteps>(dy, t, place, scale, db, pack<S, T>, [&](const Piece<S, T, T>& piece) {
      cpu::on_this_cpu<Columns<S, T>>(bytes, piece);
    });
  };
  constexpr float* kFloat = nullptr;
  constexpr double* kDouble = nullptr;
  if (is_double) as_they_are(kDouble, kDouble);
#ifdef KEEPLORA_AMX
  else if (half && cpu::level() == 4)
    run<Bfloat16, Bfloat16, float, kTileRanks>(dy, t, place, scale, db, pack_tiles, tile_columns);
#endif
#ifdef KEEPLORA_X86
  else if (half && cpu::level() >= 3)
    run<Bfloat16, uint32_t, float, kMostSteps>(dy, t, place, scale, db, pack_pairs, dot_columns);
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
