// The one tiled matrix product of the kernels: a block adds up one tile of C = Left Right on tensor cores, in
// the precision of float or double. Tiles of both operands come through shared memory, fetched asynchronously
// ahead of use.
//
// A block of four warps owns 16 kRowTiles x 64 elements of C; each warp has all of its rows and 16 of its
// columns. An operand is any class with the members of Matrix below, so a kernel can also make up elements.
#pragma once
#include <cstdint>

#include "kernels/device.cuh"
#include "kernels/primitives/async.cuh"
#include "kernels/primitives/mma.cuh"
#include "kernels/primitives/shared.cuh"
#include "kernels/primitives/warp.cuh"

namespace gpu {

constexpr int kDepth = 32;    // of a tile, along the sum
constexpr int kColumns = 64;  // of C per block
constexpr int kStages = 3;    // tiles in shared memory at a time, two of them on their way
constexpr int kProductWarps = 4;
constexpr int kProductThreads = kProductWarps * kWarp;
constexpr int kColumnTiles = kColumns / kProductWarps / 8;  // of a warp

// A matrix in global memory as an operand. Its lines are rows of C (left operand) or columns of C (right
// operand), its depth is what the product sums over. kAlong: element (line, depth) lies at
// data[line * pitch + depth], so a line is contiguous; otherwise at data[depth * pitch + line].
template <typename S, bool kAlong>
struct Matrix {
  using Stored = S;
  static constexpr bool kExact = sizeof(S) == 2;  // its numbers are TF32 numbers

  const S* data;
  int64_t pitch;
  int lines;

  // Elements of shared memory a tile of kLines lines takes. Padding spreads a warp's reads over all banks.
  template <int kLines>
  static constexpr int kTilePitch =
      kAlong ? kDepth + (sizeof(S) == 2 ? 8 : 4) : kLines + (sizeof(S) == 8 ? 4 : 8);
  template <int kLines>
  static constexpr int kTile = (kAlong ? kLines : kDepth) * kTilePitch<kLines>;

  // Queues the copies of lines [line, line + kLines) and depths [depth, depth + kDepth),
  // zero from `lines` and `end` on.
  template <int kLines>
  __device__ void fetch(S* tile, int line, int depth, int end) const {
    const bool vector = aligned16(data) && pitch * sizeof(S) % 16 == 0;
    const S* corner = data + (kAlong ? line * pitch + depth : depth * pitch + line);
    constexpr int kHeight = kAlong ? kLines : kDepth, kWidth = kAlong ? kDepth : kLines;
    const int height = kAlong ? lines - line : end - depth, width = kAlong ? end - depth : lines - line;
    if (vector)
      copy_tile<kHeight, kWidth, 16 / sizeof(S)>(tile, kTilePitch<kLines>, corner, height, width);
    else
      copy_tile<kHeight, kWidth, 1>(tile, kTilePitch<kLines>, corner, height, width);
  }

  // The element at (line, depth) of a tile.
  template <int kLines>
  static __device__ auto at(const S* tile, int line, int depth) {
    return widen(tile[kAlong ? line * kTilePitch<kLines> + depth : depth * kTilePitch<kLines> + line]);
  }

 private:
  template <int kHeight, int kWidth, int kStep>
  __device__ void copy_tile(S* tile, int tile_pitch, const S* corner, int height, int width) const {
#pragma unroll(kStep > 1 ? 4 : 1)
    for (int i = threadIdx.x; i < kHeight * kWidth / kStep; i += kProductThreads) {
      const int row = i / (kWidth / kStep), column = i % (kWidth / kStep) * kStep;
      const int valid = row < height ? max(0, min(kStep, width - column)) : 0;
      const S* from = valid == 0 ? data : corner + row * pitch + column;
      S* to = tile + row * tile_pitch + column;
      if constexpr (kStep * sizeof(S) >= 4)
        copy_async<kStep * sizeof(S)>(to, from, valid * static_cast<int>(sizeof(S)));
      else  // too small for an asynchronous copy
        *to = valid > 0 ? *from : S{};
    }
  }
};

// Shared memory for products of 16 kRowTiles rows: room for every pair of operands a kernel uses.
template <typename S, int kLeft, int kRight>
struct Tiles {
  S *left, *right;  // kStages tiles of kLeft and of kRight elements

  static constexpr size_t bytes() {
    return shared_bytes<S>(kStages * kLeft) + shared_bytes<S>(kStages * kRight);
  }
  __device__ explicit Tiles(SharedArena& arena)
      : left(arena.take<S>(kStages * kLeft)), right(arena.take<S>(kStages * kRight)) {}
};

// Brings Left [row.., depth] and Right [depth, column..] through shared memory, over depths [from, to), and
// calls use(left tile, right tile, depths in it) on one pair of tiles after the other. The whole block must
// call, and meet at a barrier before it uses the tiles again.
template <int kLeftLines, int kRightLines, typename Left, typename Right, typename SL, typename SR,
          typename Use>
__device__ void stream_tiles(const Left& left, int row, const Right& right, int column, int from, int to,
                             SL* left_tiles, SR* right_tiles, Use&& use) {
  constexpr int kLeft = Left::template kTile<kLeftLines>, kRight = Right::template kTile<kRightLines>;
  const int steps = ceil_div(to - from, kDepth);
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages, depth = from + step * kDepth;
      left.template fetch<kLeftLines>(left_tiles + stage * kLeft, row, depth, to);
      right.template fetch<kRightLines>(right_tiles + stage * kRight, column, depth, to);
    }
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step)
    fetch(step);
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this step's tiles are there for all, and all are done with those fetched over next
    fetch(step + kStages - 1);
    const int stage = step % kStages;
    use(left_tiles + stage * kLeft, right_tiles + stage * kRight, min(kDepth, to - from - step * kDepth));
  }
}

// One block's tile of C, 16 kRowTiles rows and 32 kColumnTiles columns. Element [m][n][i] of this lane lies
// at row(m, i), column(n, i) of the tile.
template <typename T, int kRowTiles, int kColumnTiles>
struct Elements {
  static constexpr int kRows = 16 * kRowTiles, kColumns = 8 * kColumnTiles * kProductWarps;
  T value[kRowTiles][kColumnTiles][4] = {};

  static __device__ int row(int m, int i) { return 16 * m + threadIdx.x % kWarp / 4 + i / 2 * 8; }
  static __device__ int column(int n, int i) {
    return threadIdx.x / kWarp * 8 * kColumnTiles + 8 * n + threadIdx.x % 4 * 2 + i % 2;
  }

  // Calls f(row, column, value) for this lane's elements, rows and columns counted within the tile.
  template <typename F>
  __device__ void for_each(F&& f) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(row(m, i), column(n, i), value[m][n][i]);
  }
};

// A tile of C in the precision of T.
template <typename T, int kRowTiles>
struct Sum : Elements<T, kRowTiles, kColumnTiles> {
  using Elements<T, kRowTiles, kColumnTiles>::kRows;
  using Elements<T, kRowTiles, kColumnTiles>::value;

  // Adds Left [row.., depth] Right [depth, column..] over depths [from, to). The whole block must call, and
  // meet at a barrier before it uses the tiles again.
  template <typename Left, typename Right, typename SL, typename SR>
  __device__ void add_product(const Left& left, int row, const Right& right, int column, int from, int to,
                              SL* left_tiles, SR* right_tiles) {
    stream_tiles<kRows, kColumns>(left, row, right, column, from, to, left_tiles, right_tiles,
                                  [&](const auto* left_tile, const auto* right_tile, int depth) {
                                    add_tile<Left, Right>(left_tile, right_tile, depth);
                                  });
  }

 private:
  // Tensor cores round towards zero; a sum that starts anew with every tile keeps that from adding up.
  template <typename Left, typename Right>
  __device__ void add_tile(const typename Left::Stored* left_tile, const typename Right::Stored* right_tile,
                           int depth) {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 8 * kColumnTiles;
    T part[kRowTiles][kColumnTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      if (k >= depth) break;
      Fragment<T, 4, Left::kExact> a[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m].set(i, Left::template at<kRows>(left_tile, 16 * m + lane / 4 + i % 2 * 8,
                                               k + lane % 4 + i / 2 * 4));
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        Fragment<T, 2, Right::kExact> b;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b.set(i, Right::template at<kColumns>(right_tile, first + 8 * n + lane / 4, k + lane % 4 + i * 4));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
          multiply_add(part[m][n], a[m], b);
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          value[m][n][i] += part[m][n][i];
  }
};

}  // namespace gpu
