// Three phases of tiles in one launch: t = x A^T; sums of dy^T t over a range of tokens each, because the
// outputs are few and the tokens many; and dB, the sums of those. A block takes a ticket, which names a tile;
// tickets go through the phases in order.
#include "kernels/lora_grad_b.h"

#include <type_traits>

#include "kernels/any_matrix.cuh"
#include "kernels/group.cuh"
#include "kernels/primitives/atomic.cuh"

namespace keeplora {
namespace {

using gpu::ceil_div;
using gpu::Format;
using gpu::kColumns;
using gpu::kDepth;
using gpu::kProductThreads;
using gpu::kStages;
using gpu::Matrix;

constexpr int kAdapters = 32;       // per launch
constexpr int kTargetBlocks = 512;  // that add up over tokens, for GPUs of 80 to 160 multiprocessors
constexpr int kTokenMultiple = 64;  // of the range of tokens of one such block

template <typename T>
struct Entry {
  const void* a;
  const void* dy;
  T* db;
  int r, columns;              // dB is [columns, r]
  int first_rank, first_tile;  // ranks, and tiles of dB, of all entries before
  T scale;
};

template <typename T>
struct Plan {
  LoraGradBProblem<T> problem;  // t: where this launch's ranks begin
  int64_t t_pitch;
  int ranks;            // of all entries
  int range, ranges;    // tokens are divided into `ranges` ranges of `range`, the last one shorter
  int products, tiles;  // tiles of t, of dB
  T* partial;           // [tiles][ranges][kPartial]: a tile's sums over a range
  // Zero: the next ticket, then for each range how many tiles of t are done, then for each tile of dB how
  // many of its ranges.
  unsigned* counters;
};

template <typename T>
constexpr int kTokenTiles = sizeof(T) == 4 ? 4 : 1;  // doubles would take the registers of four blocks

template <typename T>
constexpr int kTokens = 16 * kTokenTiles<T>;  // of a tile of t

template <int kRankTiles>
constexpr int kPartial = 16 * kRankTiles * kColumns;

// x or dy: S names the format, or is void where the format is known at run time only.
template <typename T, typename S, bool kAlong>
using Input = std::conditional_t<std::is_void_v<S>, gpu::AnyMatrix<T, kAlong>, Matrix<S, kAlong>>;

template <typename T, typename S, bool kAlong>
__device__ Input<T, S, kAlong> input(const void* data, Format format, int64_t pitch, int lines) {
  if constexpr (std::is_void_v<S>)
    return {data, format, pitch, lines};
  else
    return {static_cast<const S*>(data), pitch, lines};
}

// [A_1; ..; A_n] as the right operand: the lines of one tile, each a row of some A.
template <typename T>
struct Stacked {
  using Stored = T;
  static constexpr bool kExact = false;
  template <int kLines>
  static constexpr int kTile = Matrix<T, true>::template kTile<kLines>;

  const void* const* rows;  // null where there are no more
  Format format;

  template <int kLines>
  __device__ void fetch(T* tile, int, int depth, int end) const {
    constexpr int kStep = 16 / sizeof(T), kSteps = kDepth / kStep;
#pragma unroll 4
    for (int i = threadIdx.x; i < kLines * kSteps; i += kProductThreads) {
      const int line = i / kSteps, column = i % kSteps * kStep;
      const void* row = rows[line];
      const int valid = row != nullptr ? min(kStep, end - depth - column) : 0;
      T* to = tile + line * Matrix<T, true>::template kTilePitch<kLines> + column;
      const T* from = static_cast<const T*>(row) + depth + column;
      if (valid > 0 && format == gpu::kFormatOf<T> && gpu::aligned16(from)) {
        gpu::copy_async<16>(to, from, valid * static_cast<int>(sizeof(T)));
      } else {
#pragma unroll
        for (int j = 0; j < kStep; ++j)
          to[j] = j < valid ? gpu::load<T>(row, format, depth + column + j) : T(0);
      }
    }
  }

  template <int kLines>
  static __device__ T at(const T* tile, int line, int depth) {
    return Matrix<T, true>::template at<kLines>(tile, line, depth);
  }
};

// The tiles in shared memory of both products.
template <typename T, typename S, int kRankTiles>
struct Shared {
  using Stored = typename Input<T, S, true>::Stored;
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  static constexpr int kInput = kStages * larger(Input<T, S, true>::template kTile<kTokens<T>>,
                                                 Input<T, S, false>::template kTile<kColumns>);
  static constexpr int kOwn = kStages * larger(Stacked<T>::template kTile<kColumns>,
                                               Matrix<T, false>::template kTile<16 * kRankTiles>);

  Stored* input;      // of x or dy
  T* own;             // of A or t
  const void** rows;  // of A, one per column of a tile of t
  unsigned* ticket;

  __device__ explicit Shared(gpu::SharedArena& arena)
      : input(arena.take<Stored>(kInput)),
        own(arena.take<T>(kOwn)),
        rows(arena.take<const void*>(kColumns)),
        ticket(arena.take<unsigned>(1)) {}
  static constexpr size_t bytes() {
    return gpu::shared_bytes<Stored>(kInput) + gpu::shared_bytes<T>(kOwn) +
           gpu::shared_bytes<const void*>(kColumns) + gpu::shared_bytes<unsigned>(1);
  }
};

// A tile of t.
template <typename T, typename S, int kRankTiles>
__device__ void multiply(const gpu::Table<Entry<T>, kAdapters>& table, const Plan<T>& plan,
                         const Shared<T, S, kRankTiles>& shared, int tile) {
  const LoraGradBProblem<T>& problem = plan.problem;
  const int rank_tiles = ceil_div(plan.ranks, kColumns);
  const int token = tile / rank_tiles * kTokens<T>, rank = tile % rank_tiles * kColumns;
  for (int i = threadIdx.x; i < kColumns; i += kProductThreads) {
    const Entry<T>& entry = table.entry[gpu::entry_of_tile<&Entry<T>::first_rank>(table, rank + i)];
    const int64_t skipped = static_cast<int64_t>(rank + i - entry.first_rank) * problem.in;
    shared.rows[i] = rank + i < plan.ranks
                         ? static_cast<const char*>(entry.a) + skipped * gpu::size_of(problem.a_format)
                         : nullptr;
  }
  __syncthreads();  // every thread copies parts of all rows

  const auto x = input<T, S, true>(problem.x, problem.x_format, problem.x_pitch, problem.tokens);
  gpu::Sum<T, kTokenTiles<T>> sum;
  sum.add_product(x, token, Stacked<T>{shared.rows, problem.a_format}, rank, 0, problem.in, shared.input,
                  shared.own);
  sum.for_each([&](int row, int column, T value) {
    if (token + row < problem.tokens && rank + column < plan.ranks)
      problem.t[(token + row) * plan.t_pitch + rank + column] = value;
  });
  gpu::announce(plan.counters + 1 + token / plan.range);
}

// Where a tile of dB^T lies; its columns are those of dy.
template <typename T>
struct Place {
  const Entry<T>& entry;
  int rank, column;
};

template <typename T, int kRankTiles>
__device__ Place<T> place_of(const gpu::Table<Entry<T>, kAdapters>& table, int tile) {
  const Entry<T>& entry = table.entry[gpu::entry_of_tile<&Entry<T>::first_tile>(table, tile)];
  const int local = tile - entry.first_tile, rank_tiles = ceil_div(entry.r, 16 * kRankTiles);
  return {entry, local % rank_tiles * 16 * kRankTiles, local / rank_tiles * kColumns};
}

// A tile of dB^T summed over one range of tokens.
template <typename T, typename S, int kRankTiles>
__device__ void contract(const gpu::Table<Entry<T>, kAdapters>& table, const Plan<T>& plan,
                         const Shared<T, S, kRankTiles>& shared, int range, int tile) {
  const auto [entry, rank, column] = place_of<T, kRankTiles>(table, tile);
  const LoraGradBProblem<T>& problem = plan.problem;
  const int from = range * plan.range, to = min(problem.tokens, from + plan.range);
  gpu::await(plan.counters + 1 + range, ceil_div(to - from, kTokens<T>) * ceil_div(plan.ranks, kColumns));
  const Matrix<T, false> t{problem.t + entry.first_rank, plan.t_pitch, entry.r};
  const auto dy = input<T, S, false>(entry.dy, problem.dy_format, problem.dy_pitch, entry.columns);
  gpu::Sum<T, kRankTiles> sum;
  sum.add_product(t, rank, dy, column, from, to, shared.own, shared.input);
  T* partial =
      plan.partial + (static_cast<int64_t>(tile) * plan.ranges + range) * kPartial<kRankTiles> + threadIdx.x;
  sum.for_each([&](int, int, T value) {
    *partial = value;
    partial += kProductThreads;
  });
  gpu::announce(plan.counters + 1 + plan.ranges + tile);
}

// A tile of dB from its ranges.
template <typename T, int kRankTiles>
__device__ void reduce(const gpu::Table<Entry<T>, kAdapters>& table, const Plan<T>& plan, int tile) {
  const auto [entry, rank, column] = place_of<T, kRankTiles>(table, tile);
  gpu::await(plan.counters + 1 + plan.ranges + tile, plan.ranges);
  gpu::Sum<T, kRankTiles> sum;
  const T* partial =
      plan.partial + static_cast<int64_t>(tile) * plan.ranges * kPartial<kRankTiles> + threadIdx.x;
  for (int range = 0; range < plan.ranges; ++range)
#pragma unroll
    for (auto& row : sum.value)
#pragma unroll
      for (auto& part : row)
#pragma unroll
        for (T& value : part) {
          value += *partial;
          partial += kProductThreads;
        }
  sum.for_each([&](int r, int c, T value) {
    if (rank + r < entry.r && column + c < entry.columns)
      entry.db[static_cast<int64_t>(column + c) * entry.r + rank + r] = entry.scale * value;
  });
}

template <typename T, typename S, int kRankTiles>
__global__ void __launch_bounds__(kProductThreads, 3)
    kernel(const __grid_constant__ gpu::Table<Entry<T>, kAdapters> table,
           const __grid_constant__ Plan<T> plan) {
  gpu::SharedArena arena;
  const Shared<T, S, kRankTiles> shared(arena);
  const int ticket = static_cast<int>(gpu::take_ticket(plan.counters, shared.ticket));
  const int contraction = ticket - plan.products, last = contraction - plan.ranges * plan.tiles;
  if (contraction < 0)
    multiply(table, plan, shared, ticket);
  else if (last < 0)  // the tiles of one range follow one another: its part of t stays in L2
    contract(table, plan, shared, contraction / plan.tiles, contraction % plan.tiles);
  else
    reduce<T, kRankTiles>(table, plan, last);
}

template <typename T, typename S, int kRankTiles>
cudaError_t run_chunk(const LoraGradBProblem<T>& problem, const LoraGradBAdapter<T>* adapters, int count,
                      int64_t t_pitch, int64_t t_column, gpu::Workspace& workspace, cudaStream_t stream) {
  gpu::Table<Entry<T>, kAdapters> table{};
  table.count = count;
  int64_t ranks = 0, tiles = 0;
  for (int i = 0; i < count; ++i) {
    const LoraGradBAdapter<T>& adapter = adapters[i];
    Entry<T>& entry = table.entry[i];
    entry.a = adapter.a;
    entry.dy = static_cast<const char*>(problem.dy) +
               static_cast<int64_t>(adapter.start) * gpu::size_of(problem.dy_format);
    entry.db = adapter.db;
    entry.r = adapter.r;
    entry.columns = adapter.stop - adapter.start;
    entry.first_rank = static_cast<int>(ranks);
    entry.first_tile = static_cast<int>(tiles);
    entry.scale = adapter.scale;
    ranks += adapter.r;
    tiles += static_cast<int64_t>(ceil_div(entry.r, 16 * kRankTiles)) * ceil_div(entry.columns, kColumns);
  }

  Plan<T> plan{};
  plan.problem = problem;
  plan.t_pitch = t_pitch;
  const int pieces = ceil_div(problem.tokens, kTokenMultiple);
  const int wanted = static_cast<int>(tiles >= kTargetBlocks || tiles == 0 ? 1 : kTargetBlocks / tiles);
  plan.range = kTokenMultiple * (pieces > wanted ? ceil_div(pieces, wanted) : 1);
  plan.ranges = pieces > 0 ? ceil_div(problem.tokens, plan.range) : 1;  // of no tokens: dB = 0
  const int64_t products =
      static_cast<int64_t>(ceil_div(problem.tokens, kTokens<T>)) * ceil_div(ranks, kColumns);
  const int64_t blocks = products + (plan.ranges + 1) * tiles;
  if (ranks > 0x7fffffff || blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  plan.ranks = static_cast<int>(ranks);
  plan.products = static_cast<int>(products);
  plan.tiles = static_cast<int>(tiles);
  workspace.reuse();
  const int64_t counters = 1 + plan.ranges + tiles;
  plan.counters = workspace.take<unsigned>(counters);
  plan.partial = workspace.take<T>(tiles * plan.ranges * kPartial<kRankTiles>);
  if (workspace.counts_only()) return cudaSuccess;
  plan.problem.t += t_column;

  const cudaError_t error = gpu::clear(plan.counters, counters * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  gpu::Config config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(kProductThreads);
  config.shared_bytes = Shared<T, S, kRankTiles>::bytes();
  config.stream = stream;
  return gpu::launch(kernel<T, S, kRankTiles>, config, table, plan);
}

template <typename T>
cudaError_t run(const LoraGradBProblem<T>& problem, const LoraGradBAdapter<T>* adapters, int count,
                gpu::Workspace& workspace, cudaStream_t stream) {
  int64_t ranks = 0, column = 0;
  for (int i = 0; i < count; ++i)
    ranks += adapters[i].r;
  for (int first = 0; first < count; first += kAdapters) {
    const LoraGradBAdapter<T>* chunk = adapters + first;
    const int now = count - first < kAdapters ? count - first : kAdapters;
    int largest = 0;
    int64_t of_chunk = 0;
    for (int i = 0; i < now; ++i) {
      largest = chunk[i].r > largest ? chunk[i].r : largest;
      of_chunk += chunk[i].r;
    }
    const auto go = [&]<typename S, int kRankTiles>() {
      return run_chunk<T, S, kRankTiles>(problem, chunk, now, ranks, column, workspace, stream);
    };
    const auto of_format = [&]<typename S>() {
      return largest <= 16   ? go.template operator()<S, 1>()
             : largest <= 32 ? go.template operator()<S, 2>()
                             : go.template operator()<S, 4>();
    };
    cudaError_t error;
    if constexpr (sizeof(T) == 8)
      error = go.template operator()<void, 1>();
    else if (problem.x_format != problem.dy_format)
      error = go.template operator()<void, 4>();
    else if (problem.x_format == Format::kBfloat16)
      error = of_format.template operator()<gpu::Bfloat16>();
    else if (problem.x_format == Format::kFloat16)
      error = of_format.template operator()<gpu::Float16>();
    else
      error = of_format.template operator()<float>();
    if (error != cudaSuccess) return error;
    column += of_chunk;
  }
  return cudaSuccess;
}

}  // namespace

template <typename T>
int64_t lora_grad_b_workspace(const LoraGradBProblem<T>& problem, const LoraGradBAdapter<T>* adapters,
                              int count) {
  gpu::Workspace counted;
  run(problem, adapters, count, counted, nullptr);
  return counted.needed();
}

template <typename T>
cudaError_t lora_grad_b(const LoraGradBProblem<T>& problem, const LoraGradBAdapter<T>* adapters, int count,
                        void* workspace, cudaStream_t stream) {
  gpu::Workspace memory(workspace);
  return run(problem, adapters, count, memory, stream);
}

#define INSTANTIATE(T)                                                                                    \
  template int64_t lora_grad_b_workspace<T>(const LoraGradBProblem<T>&, const LoraGradBAdapter<T>*, int); \
  template cudaError_t lora_grad_b<T>(const LoraGradBProblem<T>&, const LoraGradBAdapter<T>*, int, void*, \
                                      cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace keeplora
