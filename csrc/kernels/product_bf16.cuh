// The tiled product of bfloat16 numbers with sums in float: one tensor-core instruction where product.cuh
// needs three at half the speed, and twice the columns per block.
// For results that need no more than the precision of bfloat16.
#pragma once
#include "kernels/primitives/ldmatrix.cuh"
#include "kernels/product.cuh"

namespace gpu {

// An operand; what shared memory holds of it reaches the lanes 16 lines and 16 depths at a time.
template <bool kAlong>
struct Bfloat16Matrix : Matrix<Bfloat16, kAlong> {
  // The left operand's numbers for mma_bf16.
  template <int kLines>
  static __device__ void left(uint32_t (&a)[4], const Bfloat16* tile, int line, int depth) {
    static_assert(kAlong);
    const int lane = threadIdx.x % kWarp;
    load_matrices<false>(a, address<kLines>(tile, line + lane % 16, depth + lane / 16 * 8));
  }

  // The right operand's, for the first 8 columns and for the last.
  template <int kLines>
  static __device__ void right(uint32_t (&first)[2], uint32_t (&last)[2], const Bfloat16* tile, int line,
                               int depth) {
    const int lane = threadIdx.x % kWarp;
    const int along = lane % 8 + (kAlong ? lane / 16 : lane / 8 % 2) * 8;
    const int across = (kAlong ? lane / 8 % 2 : lane / 16) * 8;
    uint32_t b[4];
    load_matrices<!kAlong>(b, kAlong ? address<kLines>(tile, line + along, depth + across)
                                     : address<kLines>(tile, line + across, depth + along));
    first[0] = b[0], first[1] = b[1], last[0] = b[2], last[1] = b[3];
  }

 private:
  template <int kLines>
  static __device__ const Bfloat16* address(const Bfloat16* tile, int line, int depth) {
    constexpr int pitch = Matrix<Bfloat16, kAlong>::template kTilePitch<kLines>;
    return tile + (kAlong ? line * pitch + depth : depth * pitch + line);
  }
};

// A tile of C, 16 kRowTiles x 128.
template <int kRowTiles>
struct Bfloat16Sum : Elements<float, kRowTiles, 4> {
  using Base = Elements<float, kRowTiles, 4>;
  using Base::kColumns, Base::kRows, Base::value;

  // As Sum::add_product, with operands that have left() and right(). Tiles are zero beyond their depth, so
  // all of them is multiplied.
  template <typename Left, typename Right, typename SL, typename SR>
  __device__ void add_product(const Left& left, int row, const Right& right, int column, int from, int to,
                              SL* left_tiles, SR* right_tiles) {
    stream_tiles<kRows, kColumns>(left, row, right, column, from, to, left_tiles, right_tiles,
                                  [&](const auto* left_tile, const auto* right_tile, int) {
                                    add_tile<Left, Right>(left_tile, right_tile);
                                  });
  }

 private:
  template <typename Left, typename Right>
  __device__ void add_tile(const typename Left::Stored* left_tile, const typename Right::Stored* right_tile) {
    const int first = threadIdx.x / kWarp * 32;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t b[4][2];
#pragma unroll
      for (int n = 0; n < 4; n += 2)
        Right::template right<kColumns>(b[n], b[n + 1], right_tile, first + 8 * n, k);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t a[4];
        Left::template left<kRows>(a, left_tile, 16 * m, k);
#pragma unroll
        for (int n = 0; n < 4; ++n)
          mma_bf16(value[m][n], a, b[n]);
      }
    }
  }
};

}  // namespace gpu
