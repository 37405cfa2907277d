#include "kernels/sketch_rows.h"

#include <cmath>

#include "kernels/group.cuh"
#include "kernels/primitives/atomic.cuh"
#include "kernels/product_bf16.cuh"

namespace keeplora {
namespace {

using gpu::ceil_div;
using gpu::kProductThreads;

constexpr int kTokens = 16384;     // of a launch: bounds what S takes, and keeps it in L2
constexpr int kLeastTokens = 256;  // of a part of the tokens
constexpr int kBlocks = 264;       // that a phase should have: two for each multiprocessor of an H200
constexpr int kReduced = 8;        // elements of Z per thread that adds up the parts

__host__ __device__ constexpr uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return h ^ h >> 16;
}

// The signs of Psi as a left operand: shared memory holds the 32 bits of a line. Lines and depths beyond the
// matrix are there too, and meet zeros or rows that nobody writes.
struct Signs {
  using Stored = uint32_t;
  static constexpr bool kExact = true;
  static_assert(gpu::kDepth == 32);

  uint32_t state;  // after the seed

  template <int kLines>
  static constexpr int kTile = kLines;

  template <int kLines>
  __device__ void fetch(uint32_t* tile, int line, int depth, int) const {
    for (int i = threadIdx.x; i < kLines; i += kProductThreads)
      tile[i] = mix(mix(state ^ static_cast<uint32_t>(line + i)) ^ static_cast<uint32_t>(depth / 32));
  }

  template <int kLines>
  static __device__ float at(const uint32_t* tile, int line, int depth) {
    return gpu::float_of(0x3f800000u | tile[line] >> depth << 31);
  }

  // As Bfloat16Matrix::left.
  template <int kLines>
  static __device__ void left(uint32_t (&a)[4], const uint32_t* tile, int line, int depth) {
    const int lane = threadIdx.x % gpu::kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = tile[line + lane / 4 + i % 2 * 8] >> lane % 4 * 2 >> (depth + i / 2 * 8);
      a[i] = 0x3f803f80u | (bits << 15 & 0x8000u) | (bits << 30 & 0x80000000u);
    }
  }
};

// How the numbers are multiplied: in the precision of T, whatever the formats of x and delta.
template <typename T>
struct Full {
  using Number = T;
  using Sketched = T;  // of S = Psi delta^T
  using Sum = gpu::Sum<T, sizeof(T) == 8 ? 1 : 4>;
  template <typename S, bool kAlong>
  using Operand = gpu::Matrix<S, kAlong>;
  static constexpr int kResident = 2;

  // Calls f<S>() with the type of the format's numbers.
  template <typename F>
  static __device__ void with_format(gpu::Format format, F&& f) {
    switch (format) {
      case gpu::Format::kFloat64:
        if constexpr (sizeof(T) == 8) f.template operator()<double>();
        return;
      case gpu::Format::kFloat32:
        return f.template operator()<float>();
      case gpu::Format::kBfloat16:
        return f.template operator()<gpu::Bfloat16>();
      case gpu::Format::kFloat16:
        return f.template operator()<gpu::Float16>();
    }
  }
};

// For bfloat16 inputs: S is rounded to bfloat16 as well.
struct Short {
  using Number = float;
  using Sketched = gpu::Bfloat16;
  using Sum = gpu::Bfloat16Sum<4>;
  template <typename S, bool kAlong>
  using Operand = gpu::Bfloat16Matrix<kAlong>;
  static constexpr int kResident = 3;

  template <typename F>
  static __device__ void with_format(gpu::Format, F&& f) {
    f.template operator()<gpu::Bfloat16>();
  }
};

template <typename Path>
constexpr int kLeftTile = gpu::Matrix<typename Path::Sketched, true>::template kTile<Path::Sum::kRows>;

template <typename Path>
constexpr int kRightTile =
    gpu::Matrix<typename Path::Sketched, true>::template kTile<Path::Sum::kColumns> >
            gpu::Matrix<typename Path::Sketched, false>::template kTile<Path::Sum::kColumns>
        ? gpu::Matrix<typename Path::Sketched, true>::template kTile<Path::Sum::kColumns>
        : gpu::Matrix<typename Path::Sketched, false>::template kTile<Path::Sum::kColumns>;

template <typename Path>
using Tiles = gpu::Tiles<typename Path::Sketched, kLeftTile<Path>, kRightTile<Path>>;

// One launch. Its tickets go through three phases: tiles of S, tiles of S x over one part of the tokens each,
// and, where there are several parts, their sums.
template <typename Path>
struct Work {
  const void *x, *delta;
  gpu::Format x_format, delta_format;
  typename Path::Number* out;
  typename Path::Sketched* sketched;  // S, [width, pitch]
  typename Path::Number* partial;     // [parts, width, d_in]
  unsigned* counters;  // [2 + parts], zero: the next ticket; tiles of S done of each part; tiles of S x done
  int tokens, d_in, d_out, width, pitch;
  uint32_t state;
  typename Path::Number scale;
  int row_tiles, token_tiles, column_tiles;
  int parts, part_tiles;  // of the tokens; token tiles of a part

  __host__ __device__ int sketches() const { return row_tiles * token_tiles; }
  __host__ __device__ int multiplies() const { return parts * row_tiles * column_tiles; }
};

// Tiles of S that differ in their rows only follow one another: they read the same tokens of delta.
template <typename Path>
__device__ void sketch(const Work<Path>& work, int tile, const Tiles<Path>& tiles) {
  const int row = tile % work.row_tiles * Path::Sum::kRows,
            token = tile / work.row_tiles * Path::Sum::kColumns;
  typename Path::Sum sum;
  Path::with_format(work.delta_format, [&]<typename S>() {
    const typename Path::template Operand<S, true> delta{static_cast<const S*>(work.delta), work.d_out,
                                                         work.tokens};
    sum.add_product(Signs{work.state}, row, delta, token, 0, work.d_out,
                    reinterpret_cast<uint32_t*>(tiles.left), reinterpret_cast<S*>(tiles.right));
  });
  sum.for_each([&](int r, int c, typename Path::Number value) {
    if (row + r < work.width && token + c < work.tokens)
      work.sketched[static_cast<int64_t>(row + r) * work.pitch + token + c] =
          gpu::narrow<typename Path::Sketched>(value);
  });
  gpu::announce(work.counters + 1 + tile / work.row_tiles / work.part_tiles);
}

template <typename Path>
__device__ void multiply(const Work<Path>& work, int tile, const Tiles<Path>& tiles) {
  const int row = tile % work.row_tiles * Path::Sum::kRows;
  const int column = tile / work.row_tiles % work.column_tiles * Path::Sum::kColumns;
  const int part = tile / (work.row_tiles * work.column_tiles);
  const int first = part * work.part_tiles, last = min(work.token_tiles, first + work.part_tiles);
  gpu::await(work.counters + 1 + part, static_cast<unsigned>((last - first) * work.row_tiles));
  typename Path::Sum sum;
  Path::with_format(work.x_format, [&]<typename S>() {
    const typename Path::template Operand<typename Path::Sketched, true> sketched{work.sketched, work.pitch,
                                                                                  work.width};
    const typename Path::template Operand<S, false> x{static_cast<const S*>(work.x), work.d_in, work.d_in};
    sum.add_product(sketched, row, x, column, first * Path::Sum::kColumns,
                    min(work.tokens, last * Path::Sum::kColumns), tiles.left,
                    reinterpret_cast<S*>(tiles.right));
  });
  sum.for_each([&](int r, int c, typename Path::Number value) {
    if (row + r >= work.width || column + c >= work.d_in) return;
    const int64_t at = static_cast<int64_t>(row + r) * work.d_in + column + c;
    if (work.parts == 1)
      work.out[at] += work.scale * value;
    else
      work.partial[static_cast<int64_t>(part) * work.width * work.d_in + at] = value;
  });
  gpu::announce(work.counters + 1 + work.parts);
}

template <typename Path>
__device__ void reduce(const Work<Path>& work, int tile) {
  gpu::await(work.counters + 1 + work.parts, work.multiplies());
  const int64_t size = static_cast<int64_t>(work.width) * work.d_in;
  const int64_t first = static_cast<int64_t>(tile) * kReduced * kProductThreads + threadIdx.x;
  typename Path::Number total[kReduced] = {};
  for (int part = 0; part < work.parts; ++part)
#pragma unroll
    for (int j = 0; j < kReduced; ++j)
      if (first + j * kProductThreads < size)
        total[j] += work.partial[part * size + first + j * kProductThreads];
#pragma unroll
  for (int j = 0; j < kReduced; ++j)
    if (first + j * kProductThreads < size) work.out[first + j * kProductThreads] += work.scale * total[j];
}

template <typename Path>
__global__ void __launch_bounds__(kProductThreads, Path::kResident)
    kernel(const __grid_constant__ Work<Path> work) {
  gpu::SharedArena arena;
  const Tiles<Path> tiles(arena);
  const int number = static_cast<int>(gpu::take_ticket(work.counters, arena.take<unsigned>(1)));
  const int after = number - work.sketches();
  if (after < 0)
    sketch(work, number, tiles);
  else if (after < work.multiplies())
    multiply(work, after, tiles);
  else
    reduce(work, after - work.multiplies());
}

// ---- on the host

int64_t size_of(gpu::Format format) {
  return format == gpu::Format::kFloat64 ? 8 : format == gpu::Format::kFloat32 ? 4 : 2;
}

template <typename Path>
cudaError_t run_chunk(const SketchRowsProblem& problem, int64_t first, gpu::Workspace& workspace,
                      cudaStream_t stream) {
  using T = typename Path::Number;
  Work<Path> work{};
  work.x = static_cast<const char*>(problem.x) + first * problem.d_in * size_of(problem.x_format);
  work.delta =
      static_cast<const char*>(problem.delta) + first * problem.d_out * size_of(problem.delta_format);
  work.x_format = problem.x_format;
  work.delta_format = problem.delta_format;
  work.out = static_cast<T*>(problem.out);
  work.tokens = static_cast<int>(problem.tokens - first < kTokens ? problem.tokens - first : kTokens);
  work.d_in = problem.d_in;
  work.d_out = problem.d_out;
  work.width = problem.width;
  work.pitch = ceil_div(work.tokens, 8) * 8;  // rows of S start at multiples of 16 bytes
  work.state = mix(mix(static_cast<uint32_t>(problem.seed)) ^ static_cast<uint32_t>(problem.seed >> 32));
  work.scale = static_cast<T>(1 / std::sqrt(static_cast<double>(problem.width)));
  work.row_tiles = ceil_div(work.width, Path::Sum::kRows);
  work.token_tiles = ceil_div(work.tokens, Path::Sum::kColumns);
  work.column_tiles = ceil_div(work.d_in, Path::Sum::kColumns);
  const int64_t tiles = static_cast<int64_t>(work.row_tiles) * work.column_tiles;
  const int64_t wanted = ceil_div(int64_t{kBlocks}, tiles), most = ceil_div(work.tokens, kLeastTokens);
  work.part_tiles = ceil_div(work.token_tiles, wanted < most ? wanted : most);
  work.parts = ceil_div(work.token_tiles, work.part_tiles);

  const int64_t size = static_cast<int64_t>(work.width) * work.d_in;
  const size_t counted = (2 + work.parts) * sizeof(unsigned);
  workspace.reuse();
  work.counters = workspace.take<unsigned>(2 + work.parts);
  work.sketched = workspace.take<typename Path::Sketched>(static_cast<int64_t>(work.width) * work.pitch);
  if (work.parts > 1) work.partial = workspace.take<T>(work.parts * size);
  if (workspace.counts_only()) return cudaSuccess;
  const int64_t reduces = work.parts > 1 ? ceil_div(size, kReduced * kProductThreads) : 0;
  const int64_t blocks =
      static_cast<int64_t>(work.row_tiles) * work.token_tiles + work.parts * tiles + reduces;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;

  const cudaError_t error = gpu::clear(work.counters, counted, stream);
  if (error != cudaSuccess) return error;
  gpu::Config config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(kProductThreads);
  config.shared_bytes = Tiles<Path>::bytes() + gpu::shared_bytes<unsigned>(1);
  config.stream = stream;
  return gpu::launch(kernel<Path>, config, work);
}

cudaError_t run(const SketchRowsProblem& problem, gpu::Workspace& workspace, cudaStream_t stream) {
  if (problem.d_in == 0 || problem.width == 0) return cudaSuccess;
  const auto is = [&](gpu::Format format) {
    return (problem.x_format == format) + (problem.delta_format == format);
  };
  const auto chunk = is(gpu::Format::kFloat64) > 0     ? run_chunk<Full<double>>
                     : is(gpu::Format::kBfloat16) == 2 ? run_chunk<Short>
                                                       : run_chunk<Full<float>>;
  for (int64_t first = 0; first < problem.tokens; first += kTokens) {
    const cudaError_t error = chunk(problem, first, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t sketch_rows_workspace(const SketchRowsProblem& problem) {
  gpu::Workspace counted;
  run(problem, counted, nullptr);
  return counted.needed();
}

cudaError_t sketch_rows(const SketchRowsProblem& problem, void* workspace, cudaStream_t stream) {
  gpu::Workspace memory(workspace);
  return run(problem, memory, stream);
}

}  // namespace keeplora
