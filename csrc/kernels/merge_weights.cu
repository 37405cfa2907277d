#include "kernels/merge_weights.h"

#include "kernels/any_matrix.cuh"
#include "kernels/group.cuh"

namespace keeplora {
namespace {

using gpu::ceil_div;
using gpu::kColumns;
using gpu::kColumnTiles;
using gpu::kDepth;
using gpu::kProductThreads;
using gpu::kStages;
using gpu::kWarp;

template <typename T>
struct Entry : MergeWeightsProblem<T> {
  int first_tile;  // tiles of all entries before
};

template <typename T>
constexpr int kRowTiles = sizeof(T) == 4 ? 4 : 1;  // doubles would take the registers of four blocks

template <typename T>
constexpr int kRows = 16 * kRowTiles<T>;

// A thread owns four neighbours in each of these many rows, 8 rows apart.
template <typename T>
constexpr int kRuns = 2 * kRowTiles<T>;

// A, its columns dealt out so that a lane's elements of a row of C are neighbours. (Those are columns 2 lane,
// 2 lane + 1 of two tiles of 8.)
template <typename T>
struct Down : gpu::AnyMatrix<T, false> {
  static_assert(kColumnTiles == 2);

  template <int kLines>
  static __device__ T at(const T* tile, int line, int depth) {
    const int neighbour = line / 16 * 16 + line / 2 % 4 * 4 + line / 8 % 2 * 2 + line % 2;
    return gpu::AnyMatrix<T, false>::template at<kLines>(tile, neighbour, depth);
  }
};

// B, or B - B0: a thread that subtracts waits for both, which is little beside W.
template <typename T>
struct Up : gpu::AnyMatrix<T, true> {
  const void* origin;
  gpu::Format origin_format;

  template <int kLines>
  __device__ void fetch(T* tile, int line, int depth, int end) const {
    using Same = gpu::AnyMatrix<T, true>;
    if (origin == nullptr) {
      Same::template fetch<kLines>(tile, line, depth, end);
      return;
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < kLines * kDepth; i += kProductThreads) {
      const int row = line + i / kDepth, column = depth + i % kDepth;
      T value(0);
      if (row < this->lines && column < end) {
        const int64_t at = row * this->pitch + column;
        value = gpu::load<T>(this->data, this->format, at) - gpu::load<T>(origin, origin_format, at);
      }
      tile[i / kDepth * gpu::Matrix<T, true>::template kTilePitch<kLines> + i % kDepth] = value;
    }
  }
};

// An operand of floats whose numbers become TF32: one product then, where a float takes three.
template <typename Operand>
struct Rounded : Operand {
  static constexpr bool kExact = true;

  template <int kLines>
  static __device__ float at(const float* tile, int line, int depth) {
    return gpu::nearest_tf32(Operand::template at<kLines>(tile, line, depth));
  }
};

template <typename T>
constexpr int kUpTile = Up<T>::template kTile<kRows<T>>;

template <typename T>
constexpr int kDownTile = Down<T>::template kTile<kColumns>;

// This thread's elements of W, in shared memory of its own; the element [i][j] is the j-th of the i-th run.
template <typename T>
class Runs {
 public:
  static constexpr int kElements = kRuns<T> * 4 * kProductThreads;
  __device__ explicit Runs(T* slots) : slots_(slots + 4 * threadIdx.x) {}

  // Starts reading W from (row, column) on.
  template <typename S>
  __device__ void fetch(const Entry<T>& entry, int row, int column) const {
    const S* w = static_cast<const S*>(entry.w);
    const bool vector = gpu::aligned16(w) && entry.pitch * sizeof(S) % 16 == 0;
#pragma unroll
    for (int i = 0; i < kRuns<T>; ++i) {
      const int count = row + 8 * i < entry.rows ? min(4, entry.cols - column) : 0;
      const S* from = w + (row + 8 * i) * entry.pitch + column;
      if (vector) {
        constexpr int kStep = sizeof(S) == 8 ? 2 : 4;
#pragma unroll
        for (int j = 0; j < 4; j += kStep)
          gpu::copy_async<kStep * sizeof(S)>(at<S>(i) + j, from + j,
                                             max(0, min(kStep, count - j)) * static_cast<int>(sizeof(S)));
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j < count) at<S>(i)[j] = from[j];
      }
    }
    gpu::copy_commit();
  }

  template <typename S>
  __device__ S* at(int i) const {
    return reinterpret_cast<S*>(slots_ + i * 4 * kProductThreads);
  }

 private:
  T* slots_;
};

// Rounds `sum` to the output's format.
template <typename S, typename T>
__device__ void write(const gpu::Sum<T, kRowTiles<T>>& sum, const Entry<T>& entry, int row, int column) {
  S* out = static_cast<S*>(entry.out);
  const bool vector = gpu::aligned16(out) && entry.cols % 4 == 0;
#pragma unroll
  for (int i = 0; i < kRuns<T>; ++i) {
    if (row + 8 * i >= entry.rows) break;
    S* to = out + static_cast<int64_t>(row + 8 * i) * entry.cols + column;
    gpu::Four<S> four;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      four.at[j] = gpu::narrow<S>(sum.value[i / 2][j / 2][i % 2 * 2 + j % 2]);
    if (vector) {
      if (column < entry.cols) *reinterpret_cast<gpu::Four<S>*>(to) = four;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (column + j < entry.cols) to[j] = four.at[j];
    }
  }
}

// A block owns a tile of kRows x 64. W is on its way while the product is computed.
template <typename T, int kCapacity>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 4 ? 3 : 4)
    kernel(const __grid_constant__ gpu::Table<Entry<T>, kCapacity> table, int stages) {
  gpu::SharedArena arena;
  T* up_tiles = arena.take<T>(stages * kUpTile<T>);
  T* down_tiles = arena.take<T>(stages * kDownTile<T>);
  const Runs<T> runs(arena.take<T>(Runs<T>::kElements));
  const Entry<T>& entry =
      table.entry[gpu::entry_of_tile<&Entry<T>::first_tile>(table, static_cast<int>(blockIdx.x))];
  const int tile = static_cast<int>(blockIdx.x) - entry.first_tile;
  const int column_tiles = ceil_div(entry.cols, kColumns);
  const int row = tile / column_tiles * kRows<T>, column = tile % column_tiles * kColumns;
  const int lane = threadIdx.x % kWarp;
  const int own_row = row + lane / 4,
            own_column = column + static_cast<int>(threadIdx.x) / kWarp * 16 + lane % 4 * 4;

  gpu::with_format(entry.w_format, [&](auto like) {
    if constexpr (sizeof(like) <= sizeof(T)) runs.template fetch<decltype(like)>(entry, own_row, own_column);
  });
  gpu::Sum<T, kRowTiles<T>> sum;
  const Up<T> up{{entry.b, entry.b_format, entry.r, entry.rows}, entry.origin, entry.origin_format};
  const Down<T> down{{entry.a, entry.a_format, entry.cols, entry.cols}};
  const auto add = [&](const auto& left, const auto& right) {
    sum.add_product(left, row, right, column, 0, entry.r, up_tiles, down_tiles);
  };
  if constexpr (sizeof(T) == 8)
    add(up, down);
  else if (entry.out_format == gpu::Format::kBfloat16)
    add(Rounded<Up<T>>{up}, Rounded<Down<T>>{down});
  else
    add(up, down);
  gpu::copy_wait<0>();
  gpu::with_format(entry.w_format, [&](auto like) {
    using S = decltype(like);
    if constexpr (sizeof(S) <= sizeof(T)) {
#pragma unroll
      for (int i = 0; i < kRuns<T>; ++i) {
        const auto four = *reinterpret_cast<const gpu::Four<S>*>(runs.template at<S>(i));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          T& value = sum.value[i / 2][j / 2][i % 2 * 2 + j % 2];
          value = entry.scale * value + static_cast<T>(gpu::widen(four.at[j]));
        }
      }
    }
  });
  gpu::with_format(entry.out_format,
                   [&](auto like) { write<decltype(like)>(sum, entry, own_row, own_column); });
}

template <typename T, int kCapacity>
cudaError_t run_table(const MergeWeightsProblem<T>* problems, int count, cudaStream_t stream) {
  gpu::Table<Entry<T>, kCapacity> table{};
  table.count = count;
  int64_t tiles = 0;
  int largest = 0;
  for (int i = 0; i < count; ++i) {
    static_cast<MergeWeightsProblem<T>&>(table.entry[i]) = problems[i];
    table.entry[i].first_tile = static_cast<int>(tiles);
    tiles +=
        static_cast<int64_t>(ceil_div(problems[i].rows, kRows<T>)) * ceil_div(problems[i].cols, kColumns);
    largest = problems[i].r > largest ? problems[i].r : largest;
  }
  if (tiles == 0) return cudaSuccess;
  if (tiles > 0x7fffffff) return cudaErrorInvalidValue;
  // A sum that ends before it comes to a stage needs no memory for it, and more blocks fit.
  const int steps = ceil_div(largest, kDepth);
  const int stages = steps < kStages ? steps : kStages;
  gpu::Config config;
  config.grid = dim3(static_cast<unsigned>(tiles));
  config.block = dim3(kProductThreads);
  config.shared_bytes = gpu::shared_bytes<T>(stages * kUpTile<T>) +
                        gpu::shared_bytes<T>(stages * kDownTile<T>) +
                        gpu::shared_bytes<T>(Runs<T>::kElements);
  config.stream = stream;
  return gpu::launch(kernel<T, kCapacity>, config, table, stages);
}

}  // namespace

template <typename T>
cudaError_t merge_weights(const MergeWeightsProblem<T>* problems, int count, cudaStream_t stream) {
  constexpr int kLarge = gpu::kTableCapacity<Entry<T>>;
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < count && error == cudaSuccess; first += kLarge) {
    const int now = count - first < kLarge ? count - first : kLarge;
    error = now <= gpu::kSmallTable ? run_table<T, gpu::kSmallTable>(problems + first, now, stream)
                                    : run_table<T, kLarge>(problems + first, now, stream);
  }
  return error;
}

template cudaError_t merge_weights<float>(const MergeWeightsProblem<float>*, int, cudaStream_t);
template cudaError_t merge_weights<double>(const MergeWeightsProblem<double>*, int, cudaStream_t);

}  // namespace keeplora
