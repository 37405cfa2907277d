// Arrays whose format is known at run time only: as an operand of the product, and for code that has to know
// the type. One kernel then serves every mixture of formats.
#pragma once
#include "kernels/product.cuh"

namespace gpu {

template <typename T>
constexpr Format kFormatOf = sizeof(T) == 4 ? Format::kFloat32 : Format::kFloat64;

__host__ __device__ constexpr int size_of(Format format) {
  return format == Format::kFloat64 ? 8 : format == Format::kFloat32 ? 4 : 2;
}

// Calls f with a value of the type that `format` names.
template <typename F>
__device__ void with_format(Format format, F&& f) {
  switch (format) {
    case Format::kFloat32:
      return f(float{});
    case Format::kFloat64:
      return f(double{});
    case Format::kBfloat16:
      return f(Bfloat16{});
    default:
      return f(Float16{});
  }
}

// As Matrix<T, kAlong>. Numbers that are not T become T on their way to shared memory, and the thread waits
// for them.
template <typename T, bool kAlong>
struct AnyMatrix {
  using Same = Matrix<T, kAlong>;
  using Stored = T;
  static constexpr bool kExact = false;
  template <int kLines>
  static constexpr int kTile = Same::template kTile<kLines>;

  const void* data;
  Format format;
  int64_t pitch;
  int lines;

  template <int kLines>
  __device__ void fetch(T* tile, int line, int depth, int end) const {
    if (format == kFormatOf<T>) {
      Same{static_cast<const T*>(data), pitch, lines}.template fetch<kLines>(tile, line, depth, end);
      return;
    }
    constexpr int kHeight = kAlong ? kLines : kDepth, kWidth = kAlong ? kDepth : kLines;
    const int first_row = kAlong ? line : depth, first_column = kAlong ? depth : line;
    const int rows = kAlong ? lines : end, columns = kAlong ? end : lines;
#pragma unroll 4
    for (int i = threadIdx.x; i < kHeight * kWidth; i += kProductThreads) {
      const int row = first_row + i / kWidth, column = first_column + i % kWidth;
      tile[i / kWidth * Same::template kTilePitch<kLines> + i % kWidth] =
          row < rows && column < columns ? load<T>(data, format, row * pitch + column) : T(0);
    }
  }

  template <int kLines>
  static __device__ T at(const T* tile, int line, int depth) {
    return Same::template at<kLines>(tile, line, depth);
  }
};

}  // namespace gpu
