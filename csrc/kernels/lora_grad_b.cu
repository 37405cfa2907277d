// The outputs are few and the tokens many, so a tile of dB is the work of a cluster: each of its blocks sums
// over a range of the tokens, and then adds up its share of the tile from all of them, in shared memory.
#include "kernels/lora_grad_b.h"

#include <type_traits>

#include "kernels/any_matrix.cuh"
#include "kernels/group.cuh"
#include "kernels/primitives/cluster.cuh"

namespace keeplora {
namespace {

using gpu::ceil_div;
using gpu::Format;
using gpu::kColumns;
using gpu::kDepth;
using gpu::kProductThreads;
using gpu::kStages;
using gpu::Matrix;

constexpr int kAdapters = 32;   // per launch
constexpr int kFewTokens = 64;  // a block more is not worth fewer

template <typename T>
struct Entry {
  const void* dy;
  const void* t;
  T* db;
  int r, columns;  // dB is [columns, r]
  int first_tile;  // tiles of dB of all entries before
  T scale;
};

template <int kRankTiles>
constexpr int kTile = 16 * kRankTiles * kColumns;  // of dB^T

// S names the format of dy, or is void where it is known at run time only.
template <typename T, typename S>
using Gradient = std::conditional_t<std::is_void_v<S>, gpu::AnyMatrix<T, false>, Matrix<S, false>>;

template <typename T, typename S, int kRankTiles>
struct Shared {
  using Stored = typename Gradient<T, S>::Stored;
  static constexpr int kGradient = kStages * Gradient<T, S>::template kTile<kColumns>,
                       kNarrow = kStages * gpu::AnyMatrix<T, false>::template kTile<16 * kRankTiles>;

  Stored* gradient;  // tiles of dy
  T* narrow;         // of t
  T* sums;           // the tile of dB^T over this block's tokens

  __device__ explicit Shared(gpu::SharedArena& arena)
      : gradient(arena.take<Stored>(kGradient)),
        narrow(arena.take<T>(kNarrow)),
        sums(arena.take<T>(kTile<kRankTiles>)) {}
  static constexpr size_t bytes() {
    return gpu::shared_bytes<Stored>(kGradient) + gpu::shared_bytes<T>(kNarrow) +
           gpu::shared_bytes<T>(kTile<kRankTiles>);
  }
};

template <typename T, typename S, int kRankTiles>
__global__ void __launch_bounds__(kProductThreads, 3)
    kernel(const __grid_constant__ gpu::Table<Entry<T>, kAdapters> table,
           const __grid_constant__ LoraGradBProblem problem, int cluster) {
  gpu::SharedArena arena;
  const Shared<T, S, kRankTiles> shared(arena);
  const int tile = static_cast<int>(blockIdx.x) / cluster, block = static_cast<int>(gpu::cluster_rank());
  const Entry<T>& entry = table.entry[gpu::entry_of_tile<&Entry<T>::first_tile>(table, tile)];
  const int local = tile - entry.first_tile, rank_tiles = ceil_div(entry.r, 16 * kRankTiles);
  const int rank = local % rank_tiles * 16 * kRankTiles, column = local / rank_tiles * kColumns;

  const int64_t tokens = problem.tokens, range = ceil_div(ceil_div(tokens, cluster), kDepth) * kDepth;
  const int from = static_cast<int>(min(tokens, block * range)),
            to = static_cast<int>(min(tokens, (block + 1) * range));
  const gpu::AnyMatrix<T, false> t{entry.t, problem.t_format, problem.t_pitch, entry.r};
  gpu::Sum<T, kRankTiles> sum;
  if constexpr (std::is_void_v<S>) {
    const gpu::AnyMatrix<T, false> dy{entry.dy, problem.dy_format, problem.dy_pitch, entry.columns};
    sum.add_product(t, rank, dy, column, from, to, shared.narrow, shared.gradient);
  } else {
    const Matrix<S, false> dy{static_cast<const S*>(entry.dy), problem.dy_pitch, entry.columns};
    sum.add_product(t, rank, dy, column, from, to, shared.narrow, shared.gradient);
  }
  sum.for_each([&](int r, int c, T value) { shared.sums[r * kColumns + c] = value; });
  gpu::cluster_sync();  // all sums are there

  const int share = kTile<kRankTiles> / cluster;  // both are powers of two
  for (int i = block * share + static_cast<int>(threadIdx.x); i < (block + 1) * share; i += kProductThreads) {
    const int r = rank + i / kColumns, c = column + i % kColumns;
    if (r >= entry.r || c >= entry.columns) continue;
    T total(0);
    for (int other = 0; other < cluster; ++other)
      total += *gpu::cluster_map(shared.sums + i, other);
    entry.db[static_cast<int64_t>(c) * entry.r + r] = entry.scale * total;
  }
  gpu::cluster_sync();  // the others are done with this block's
}

template <typename T, typename S, int kRankTiles>
cudaError_t run_chunk(const LoraGradBProblem& problem, const LoraGradBAdapter<T>* adapters, int count,
                      cudaStream_t stream) {
  gpu::Table<Entry<T>, kAdapters> table{};
  table.count = count;
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) {
    const LoraGradBAdapter<T>& adapter = adapters[i];
    Entry<T>& entry = table.entry[i];
    const auto at = [](const void* data, Format format, int column) {
      return static_cast<const char*>(data) + static_cast<int64_t>(column) * gpu::size_of(format);
    };
    entry.dy = at(problem.dy, problem.dy_format, adapter.start);
    entry.t = at(problem.t, problem.t_format, adapter.first);
    entry.db = adapter.db;
    entry.r = adapter.r;
    entry.columns = adapter.stop - adapter.start;
    entry.first_tile = static_cast<int>(tiles);
    entry.scale = adapter.scale;
    tiles += static_cast<int64_t>(ceil_div(entry.r, 16 * kRankTiles)) * ceil_div(entry.columns, kColumns);
  }
  if (tiles == 0) return cudaSuccess;
  const auto largest = static_cast<int>(gpu::largest_cluster(kernel<T, S, kRankTiles>));
  int cluster = 1;
  while (cluster < largest && cluster * kFewTokens < problem.tokens)
    cluster *= 2;
  if (tiles * cluster > 0x7fffffff) return cudaErrorInvalidValue;
  gpu::Config config;
  config.grid = dim3(static_cast<unsigned>(tiles * cluster));
  config.block = dim3(kProductThreads);
  config.shared_bytes = Shared<T, S, kRankTiles>::bytes();
  config.stream = stream;
  config.cluster = static_cast<unsigned>(cluster);
  return gpu::launch(kernel<T, S, kRankTiles>, config, table, problem, cluster);
}

}  // namespace

template <typename T>
cudaError_t lora_grad_b(const LoraGradBProblem& problem, const LoraGradBAdapter<T>* adapters, int count,
                        cudaStream_t stream) {
  for (int first = 0; first < count; first += kAdapters) {
    const LoraGradBAdapter<T>* chunk = adapters + first;
    const int now = count - first < kAdapters ? count - first : kAdapters;
    int largest = 0;
    for (int i = 0; i < now; ++i)
      largest = chunk[i].r > largest ? chunk[i].r : largest;
    const auto go = [&]<typename S, int kRankTiles>() {
      return run_chunk<T, S, kRankTiles>(problem, chunk, now, stream);
    };
    const auto of_format = [&]<typename S>() {
      return largest <= 16   ? go.template operator()<S, 1>()
             : largest <= 32 ? go.template operator()<S, 2>()
                             : go.template operator()<S, 4>();
    };
    cudaError_t error;
    if constexpr (sizeof(T) == 8)
      error = go.template operator()<void, 1>();
    else if (problem.dy_format == Format::kBfloat16)
      error = of_format.template operator()<gpu::Bfloat16>();
    else if (problem.dy_format == Format::kFloat16)
      error = of_format.template operator()<gpu::Float16>();
    else
      error = of_format.template operator()<float>();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t lora_grad_b<float>(const LoraGradBProblem&, const LoraGradBAdapter<float>*, int,
                                        cudaStream_t);
template cudaError_t lora_grad_b<double>(const LoraGradBProblem&, const LoraGradBAdapter<double>*, int,
                                         cudaStream_t);

}  // namespace keeplora
