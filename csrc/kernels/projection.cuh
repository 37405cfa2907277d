// Projections of the rows of many matrices onto the complements of bases Q, in one launch: the part that
// project_rows and projected_adamw share.
//
// A round is two phases of tiles: T = X Q (multiply), then X <- X - T Q^T (subtract); after the last round
// one more multiply gives the leak |X Q| / |X|. A block takes a ticket, which names a tile; tickets go
// through the phases in order, and a tile waits until its problem's earlier phases are done. Problems differ,
// so while one finishes a phase others are in the next. No sum's order depends on timing.
#pragma once
#include "kernels/group.cuh"
#include "kernels/primitives/atomic.cuh"
#include "kernels/primitives/block.cuh"
#include "kernels/product.cuh"

namespace keeplora::projection {

using gpu::ceil_div;
using gpu::kColumns;
using gpu::kProductThreads;
using gpu::kProductWarps;
using gpu::Matrix;

// What every entry of a table has; an op derives its own from it.
template <typename T>
struct Problem {
  const T* q;   // [d, k]
  T* products;  // T, [rows, products_pitch(k)]
  int rows, d, k;
  int first_multiply, first_subtract;  // tiles of one phase in all entries before
};

// Rows of T start at multiples of 16 bytes.
__host__ __device__ constexpr int products_pitch(int k) {
  return ceil_div(k, 4) * 4;
}

struct Phases {
  int rounds;
  bool prepares;              // a phase with the tiles of `subtract` before the first round
  int multiplies, subtracts;  // tiles of one phase in all entries
  unsigned*
      counters;  // [1 + entries], zero: the next ticket, then for each entry how many of its tiles are done
  double* squares;  // [multiplies + subtracts]: of each tile's elements of X Q, then of X
};

template <int kRowTiles>
constexpr int kRows = 16 * kRowTiles;

template <typename T, int kRowTiles>
constexpr int kLeftTile = Matrix<T, true>::template kTile<kRows<kRowTiles>>;

template <typename T>
constexpr int kRightTile =
    Matrix<T, true>::template kTile<kColumns> > Matrix<T, false>::template kTile<kColumns>
        ? Matrix<T, true>::template kTile<kColumns>
        : Matrix<T, false>::template kTile<kColumns>;

template <typename T, int kRowTiles>
using Tiles = gpu::Tiles<T, kLeftTile<T, kRowTiles>, kRightTile<T>>;

// An op is a class with
//   Number                               float or double
//   Entry                                derived from Problem<Number>
//   source(entry, round)                 X at the start of a round, [rows, d]; for `rounds` the final X
//   Common, common(entry, round)         what the elements of a tile have in common besides, made once
//   finish(entry, round, at, inside, common)
//                                        takes `inside` from element `at` of X; returns the new element
//   kPrepares, prepare(entry, at)        whether there is a phase that makes X element by element;
//                                        it runs where Phases::prepares asks for it
//
// What a block does: one tile of one phase of one entry.
enum class Phase { kPrepare, kMultiply, kSubtract, kLeak };

struct Place {
  Phase phase;
  int round;
  int tile;  // among the tiles of the phase, of all entries; the entry itself for kLeak
};

__device__ inline Place place_of(const Phases& phases, unsigned ticket) {
  if (phases.prepares) {
    if (ticket < static_cast<unsigned>(phases.subtracts))
      return {Phase::kPrepare, 0, static_cast<int>(ticket)};
    ticket -= phases.subtracts;
  }
  const unsigned per_round = phases.multiplies + phases.subtracts;
  const unsigned leaks = phases.rounds * per_round + phases.multiplies;
  if (ticket >= leaks) return {Phase::kLeak, phases.rounds, static_cast<int>(ticket - leaks)};
  const int round = ticket / per_round, tile = ticket % per_round;
  if (tile < phases.multiplies) return {Phase::kMultiply, round, tile};
  return {Phase::kSubtract, round, tile - phases.multiplies};
}

// The leak of entry i from the squares of its tiles.
template <typename T>
__device__ void write_leak(const Problem<T>& entry, int multiplies, int subtracts, const Phases& phases,
                           double* scratch, T* leak) {
  double inside = 0, whole = 0;
  for (int j = threadIdx.x; j < multiplies; j += kProductThreads)
    inside += phases.squares[entry.first_multiply + j];
  for (int j = threadIdx.x; j < subtracts; j += kProductThreads)
    whole += phases.squares[phases.multiplies + entry.first_subtract + j];
  inside = gpu::block_sum<kProductWarps>(inside, scratch);
  whole = gpu::block_sum<kProductWarps>(whole, scratch + kProductWarps);
  if (threadIdx.x == 0) *leak = whole == 0 ? T(0) : static_cast<T>(sqrt(inside / whole));
}

template <typename Op, int kRowTiles, int kCapacity>
__global__ void __launch_bounds__(kProductThreads, kRowTiles == 4 ? 2 : 3)
    kernel(const __grid_constant__ gpu::Table<typename Op::Entry, kCapacity> table, const Op op,
           const Phases phases, typename Op::Number* leak) {
  using T = typename Op::Number;
  using Entry = typename Op::Entry;
  gpu::SharedArena arena;
  const Tiles<T, kRowTiles> tiles(arena);
  double* scratch = arena.take<double>(2 * kProductWarps);
  const Place place = place_of(phases, gpu::take_ticket(phases.counters, arena.take<unsigned>(1)));
  const Phase phase = place.phase;
  const int round = place.round, tile = place.tile;

  const int i = phase == Phase::kLeak       ? tile
                : phase == Phase::kMultiply ? gpu::entry_of_tile<&Entry::first_multiply>(table, tile)
                                            : gpu::entry_of_tile<&Entry::first_subtract>(table, tile);
  const Entry& entry = table.entry[i];
  unsigned* done = phases.counters + 1 + i;
  const int row_tiles = ceil_div(entry.rows, kRows<kRowTiles>);
  const int multiplies = row_tiles * ceil_div(entry.k, kColumns),
            subtracts = row_tiles * ceil_div(entry.d, kColumns);
  const unsigned before =
      round * multiplies + (round + (phases.prepares && phase != Phase::kPrepare)) * subtracts;
  const unsigned multiplied = before + multiplies;  // announcements, as `before`

  if (phase == Phase::kLeak) {
    gpu::await(done, multiplied);
    write_leak(entry, multiplies, subtracts, phases, scratch, leak + i);
    return;
  }

  // Row tiles that read the same part of Q follow one another.
  const int local = tile - (phase == Phase::kMultiply ? entry.first_multiply : entry.first_subtract);
  const int row = local % row_tiles * kRows<kRowTiles>, column = local / row_tiles * kColumns;
  gpu::Sum<T, kRowTiles> sum;
  double squares = 0;
  if (phase == Phase::kMultiply) {
    gpu::await(done, before);
    const Matrix<T, true> x{op.source(entry, round), entry.d, entry.rows};
    const Matrix<T, false> q{entry.q, entry.k, entry.k};
    sum.add_product(x, row, q, column, 0, entry.d, tiles.left, tiles.right);
    const int64_t pitch = products_pitch(entry.k);
    sum.for_each([&](int r, int c, T value) {
      if (row + r >= entry.rows || column + c >= entry.k) return;
      if (round == phases.rounds)
        squares += static_cast<double>(value) * value;
      else
        entry.products[(row + r) * pitch + column + c] = value;
    });
  } else if (phase == Phase::kSubtract) {
    gpu::await(done, multiplied);
    const Matrix<T, true> products{entry.products, products_pitch(entry.k), entry.rows};
    const Matrix<T, true> q{entry.q, entry.k, entry.d};
    sum.add_product(products, row, q, column, 0, entry.k, tiles.left, tiles.right);
    const typename Op::Common common = op.common(entry, round);
    sum.for_each([&](int r, int c, T inside) {
      if (row + r >= entry.rows || column + c >= entry.d) return;
      const double value =
          op.finish(entry, round, static_cast<int64_t>(row + r) * entry.d + column + c, inside, common);
      squares += value * value;
    });
  } else if constexpr (Op::kPrepares) {
    sum.for_each([&](int r, int c, T) {
      if (row + r >= entry.rows || column + c >= entry.d) return;
      op.prepare(entry, static_cast<int64_t>(row + r) * entry.d + column + c);
    });
  }

  if (round == phases.rounds - (phase == Phase::kSubtract)) {
    squares = gpu::block_sum<kProductWarps>(squares, scratch);
    if (threadIdx.x == 0)
      phases.squares[phase == Phase::kMultiply ? tile : phases.multiplies + tile] = squares;
  }
  gpu::announce(done);
}

// ---- on the host

template <typename Op, int kRowTiles, int kCapacity, typename Fill>
cudaError_t run_table(const Op& op, const Fill& fill, int first, int count, Phases phases,
                      typename Op::Number* leak, gpu::Workspace& workspace, cudaStream_t stream) {
  using T = typename Op::Number;
  gpu::Table<typename Op::Entry, kCapacity> table{};
  table.count = count;
  workspace.reuse();
  phases.counters = workspace.take<unsigned>(1 + count);
  int64_t multiplies = 0, subtracts = 0;
  for (int i = 0; i < count; ++i) {
    auto& entry = table.entry[i];
    fill(entry, first + i, workspace);
    if (entry.d == 0) entry.rows = 0;
    entry.products = workspace.take<T>(static_cast<int64_t>(entry.rows) * products_pitch(entry.k));
    entry.first_multiply = static_cast<int>(multiplies);
    entry.first_subtract = static_cast<int>(subtracts);
    const int64_t row_tiles = ceil_div(entry.rows, kRows<kRowTiles>);
    multiplies += row_tiles * ceil_div(entry.k, kColumns);
    subtracts += row_tiles * ceil_div(entry.d, kColumns);
  }
  phases.squares = workspace.take<double>(multiplies + subtracts);
  if (workspace.counts_only()) return cudaSuccess;
  const int64_t blocks =
      (phases.rounds + 1) * multiplies + (phases.rounds + phases.prepares) * subtracts + count;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  phases.multiplies = static_cast<int>(multiplies);
  phases.subtracts = static_cast<int>(subtracts);

  cudaError_t error = gpu::clear(phases.counters, (1 + count) * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  gpu::Config config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(kProductThreads);
  config.shared_bytes = Tiles<T, kRowTiles>::bytes() + gpu::shared_bytes<double>(2 * kProductWarps) +
                        gpu::shared_bytes<unsigned>(1);
  config.stream = stream;
  return gpu::launch(kernel<Op, kRowTiles, kCapacity>, config, table, op, phases, leak);
}

// Runs `op` on `count` problems; fill(entry, i, workspace) sets an entry's q, rows, d, k and the op's own.
// With a workspace that only counts nothing is launched, and it has counted what a run needs afterwards.
template <typename Op, typename Fill>
cudaError_t run(const Op& op, const Fill& fill, int count, int rounds, bool prepares,
                typename Op::Number* leak, gpu::Workspace& workspace, cudaStream_t stream) {
  constexpr int kLarge = gpu::kTableCapacity<typename Op::Entry>;
  Phases phases{};
  phases.rounds = rounds;
  phases.prepares = prepares;
  for (int first = 0; first < count; first += kLarge) {
    const int now = count - first < kLarge ? count - first : kLarge;
    int tallest = 0;
    for (int i = 0; i < now; ++i) {
      typename Op::Entry entry{};
      gpu::Workspace unused;
      fill(entry, first + i, unused);
      tallest = entry.rows > tallest ? entry.rows : tallest;
    }
    const auto go = [&]<int kRowTiles>() {
      if (now <= gpu::kSmallTable)
        return run_table<Op, kRowTiles, gpu::kSmallTable>(op, fill, first, now, phases, leak + first,
                                                          workspace, stream);
      return run_table<Op, kRowTiles, kLarge>(op, fill, first, now, phases, leak + first, workspace, stream);
    };
    cudaError_t error;
    if constexpr (sizeof(typename Op::Number) == 8)
      error = go.template operator()<1>();  // doubles would take the registers of four blocks
    else
      error = tallest <= 16   ? go.template operator()<1>()
              : tallest <= 32 ? go.template operator()<2>()
                              : go.template operator()<4>();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace keeplora::projection
