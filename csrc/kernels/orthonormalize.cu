#include "kernels/orthonormalize.h"

#include "kernels/gram_factor.cuh"
#include "kernels/group.cuh"
#include "kernels/primitives/jobs.cuh"
#include "kernels/product.cuh"

namespace keeplora {
namespace {

using gpu::ceil_div;
using gpu::kProductThreads;
using gpu::Matrix;

// Columns are made orthonormal panel by panel. A panel goes through these phases, each a set of tiles; it is
// column [next, next + kPanel) of Y until its columns are decided, and then column [rank, rank + kept) of Z.
enum class Phase {
  kStart,
  kMultiply0,  // T = [Q Z]^T Y, Z the columns kept before
  kSubtract0,  // W = Y - [Q Z] T
  kMultiply1,
  kSubtract1,
  kGram0,   // W^T W and, by the block that ends it, the decision and the transform
  kApply0,  // W transform: orthonormal up to what rounding makes of small remainders
  kMultiply2,
  kSubtract2,
  kGram1,
  kApply1,  // orthonormal to rounding
  kClear,   // the columns of Z behind all kept ones
  kOver
};

struct Progress {
  Phase phase;
  int next, rank;     // columns of Y that are decided, columns of Z that are done
  int decided, kept;  // of the panel
};

struct State : gpu::Job {
  Progress progress;
};

template <typename T>
struct Entry {
  const T* y;
  const T* q;
  T* z;
  T* products;   // T, [k + l, pitch]
  T* transform;  // [pitch, pitch]
  double* gram;  // [pitch + 1, pitch], the last row for the squared lengths of columns of Y
  int d, l, k, pitch;
};

template <typename T>
constexpr int kRowTiles = sizeof(T) == 4 ? 4 : 1;  // doubles would take the registers of four blocks

template <typename T>
constexpr int kRows = 16 * kRowTiles<T>;

constexpr int kSlice = 16;  // rows of the Gram matrix per tile

constexpr int larger(int a, int b) {
  return a > b ? a : b;
}

template <typename T>
constexpr int kLeftTile =
    larger(Matrix<T, true>::template kTile<kRows<T>>, Matrix<T, false>::template kTile<kRows<T>>);

template <typename T>
using Tiles = gpu::Tiles<T, kLeftTile<T>, Matrix<T, false>::template kTile<kPanel>>;

template <typename T>
struct Shared {
  Tiles<T> tiles;
  FactorSpace space;

  static constexpr size_t bytes() { return Tiles<T>::bytes() + FactorSpace::bytes(); }
  __device__ explicit Shared(gpu::SharedArena& arena) : tiles(arena), space(arena) {}
};

// The columns a phase works on.
struct Panel {
  int first, count;
};

template <typename T>
__device__ Panel panel_of(const Entry<T>& entry, const Progress& at) {
  if (at.phase <= Phase::kApply0) return {at.next, min(kPanel, entry.l - at.next)};
  return {at.rank, at.kept};
}

// T = [Q Z]^T X for one tile of rows of T.
template <typename T>
__device__ void multiply(const Entry<T>& entry, const Progress& at, int tile, const Shared<T>& shared) {
  const Panel panel = panel_of(entry, at);
  const T* x = at.phase == Phase::kMultiply0 ? entry.y : entry.z;
  const int tiles_of_q = ceil_div(entry.k, kRows<T>);
  const bool with_q = tile < tiles_of_q;
  const Matrix<T, false> left{with_q ? entry.q : entry.z, with_q ? entry.k : entry.l,
                              with_q ? entry.k : at.rank};
  const Matrix<T, false> right{x + panel.first, entry.l, panel.count};
  const int row = (with_q ? tile : tile - tiles_of_q) * kRows<T>;
  gpu::Sum<T, kRowTiles<T>> sum;
  sum.add_product(left, row, right, 0, 0, entry.d, shared.tiles.left, shared.tiles.right);
  T* products = entry.products + (with_q ? 0 : static_cast<int64_t>(entry.k) * entry.pitch);
  sum.for_each([&](int r, int c, T value) {
    if (row + r < left.lines && c < panel.count)
      products[static_cast<int64_t>(row + r) * entry.pitch + c] = value;
  });
}

// X - [Q Z] T, or X transform, for one tile of rows; in place where X lies in Z.
template <typename T>
__device__ void replace(const Entry<T>& entry, const Progress& at, int tile, const Shared<T>& shared) {
  const bool applies = at.phase == Phase::kApply0 || at.phase == Phase::kApply1;
  const Panel panel = panel_of(entry, at);
  const int row = tile * kRows<T>;
  gpu::Sum<T, kRowTiles<T>> sum;
  for (int part = 0; part < (applies ? 1 : 2); ++part) {
    const bool with_q = !applies && part == 0;
    const Matrix<T, true> left{applies  ? entry.z + panel.first
                               : with_q ? entry.q
                                        : entry.z,
                               with_q ? entry.k : entry.l, entry.d};
    const T* right = applies  ? entry.transform
                     : with_q ? entry.products
                              : entry.products + static_cast<int64_t>(entry.k) * entry.pitch;
    const int depth = applies ? panel.count : with_q ? entry.k : at.rank;
    sum.add_product(left, row, Matrix<T, false>{right, entry.pitch, applies ? at.kept : panel.count}, 0, 0,
                    depth, shared.tiles.left, shared.tiles.right);
    __syncthreads();  // the tiles have been used
  }
  const T* x = at.phase == Phase::kSubtract0 ? entry.y : entry.z;
  sum.for_each([&](int r, int c, T value) {
    if (row + r >= entry.d || c >= (applies ? at.kept : panel.count)) return;
    const int64_t line = static_cast<int64_t>(row + r) * entry.l;
    if (applies)
      entry.z[line + at.rank + c] = value;
    else
      entry.z[line + panel.first + c] = x[line + panel.first + c] - value;
  });
}

// Squared lengths of kSlice columns of Y, from `first` on.
template <typename T>
__device__ void measure(const Entry<T>& entry, int first, int count, double* scratch, double* lengths) {
  constexpr int kLines = kProductThreads / kSlice;
  const int column = threadIdx.x % kSlice;
  double square = 0;
  if (column < count)
#pragma unroll 4
    for (int row = threadIdx.x / kSlice; row < entry.d; row += kLines) {
      const double value = entry.y[static_cast<int64_t>(row) * entry.l + first + column];
      square += value * value;
    }
  square += __shfl_xor_sync(gpu::kAllLanes, square, kSlice);
  if (threadIdx.x % gpu::kWarp < kSlice) scratch[threadIdx.x / gpu::kWarp * kSlice + column] = square;
  __syncthreads();  // every warp has written its sums
  if (threadIdx.x < kSlice && column < count) {
    double sum = 0;
    for (int warp = 0; warp < gpu::kProductWarps; ++warp)
      sum += scratch[warp * kSlice + column];
    lengths[column] = sum;
  }
}

// kSlice rows of the panel's Gram matrix.
template <typename T>
__device__ void gram(const Entry<T>& entry, const Progress& at, int tile, const Shared<T>& shared) {
  const Panel panel = panel_of(entry, at);
  const int row = tile * kSlice;
  const Matrix<T, false> columns{entry.z + panel.first, entry.l, panel.count};
  gpu::Sum<double, kSlice / 16> sum;
  sum.add_product(columns, row, columns, 0, 0, entry.d, shared.tiles.left, shared.tiles.right);
  sum.for_each([&](int r, int c, double value) {
    if (c < panel.count) entry.gram[(row + r) * entry.pitch + c] = value;  // which has room for all rows
  });
  if (at.phase == Phase::kGram0)
    measure(entry, panel.first + row, panel.count - row, shared.space.scale,
            entry.gram + kPanel * entry.pitch + row);
}

template <typename T>
__device__ void clear(const Entry<T>& entry, const Progress& at, int tile) {
  const int row = tile * kRows<T>, rows = min(kRows<T>, entry.d - row), width = entry.l - at.rank;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(rows) * width; i += kProductThreads)
    entry.z[(row + i / width) * entry.l + at.rank + i % width] = 0;
}

template <typename T>
__device__ unsigned tiles_of(const Entry<T>& entry, const Progress& at) {
  const unsigned bases = ceil_div(entry.k, kRows<T>) + ceil_div(at.rank, kRows<T>);
  const unsigned rows = ceil_div(entry.d, kRows<T>);
  switch (at.phase) {
    case Phase::kMultiply0:
    case Phase::kMultiply1:
      return bases;
    case Phase::kSubtract0:
      return rows;  // it copies Y to Z at least
    case Phase::kSubtract1:
      return bases > 0 ? rows : 0;
    case Phase::kMultiply2:
      return at.kept > 0 ? bases : 0;
    case Phase::kSubtract2:
      return at.kept > 0 && bases > 0 ? rows : 0;
    case Phase::kGram0:
    case Phase::kGram1:
      return ceil_div(panel_of(entry, at).count, kSlice);
    case Phase::kApply0:
    case Phase::kApply1:
      return at.kept > 0 ? rows : 0;
    case Phase::kClear:
      return at.rank < entry.l ? rows : 0;
    default:
      return 0;
  }
}

// The next phase that has tiles. By one thread.
template <typename T>
__device__ void advance(const Entry<T>& entry, Progress& at, gpu::Worker<State>& worker, int64_t* rank) {
  unsigned tiles = 0;
  while (tiles == 0 && at.phase != Phase::kOver) {
    if (at.phase == Phase::kStart || at.phase == Phase::kApply1) {
      at.next += at.decided;
      at.rank += at.kept;
      at.decided = at.kept = 0;
      at.phase = at.next < entry.l ? Phase::kMultiply0 : Phase::kClear;
    } else {
      at.phase = static_cast<Phase>(static_cast<int>(at.phase) + 1);
    }
    tiles = tiles_of(entry, at);
  }
  if (tiles > 0) {
    worker.open(tiles);
  } else {
    *rank = at.rank;
    worker.close();
  }
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kProductThreads, 3)
    kernel(const __grid_constant__ gpu::Table<Entry<T>, kCapacity> table, gpu::Pool* pool, State* states,
           int64_t* rank) {
  gpu::SharedArena arena;
  const Shared<T> shared(arena);
  gpu::Worker<State> worker(pool, states, table.count, arena);
  while (worker.take()) {
    const int i = worker.job(), tile = static_cast<int>(worker.tile());
    const Entry<T>& entry = table.entry[i];
    const Progress at = states[i].progress;
    switch (at.phase) {
      case Phase::kMultiply0:
      case Phase::kMultiply1:
      case Phase::kMultiply2:
        multiply(entry, at, tile, shared);
        break;
      case Phase::kSubtract0:
      case Phase::kSubtract1:
      case Phase::kSubtract2:
      case Phase::kApply0:
      case Phase::kApply1:
        replace(entry, at, tile, shared);
        break;
      case Phase::kGram0:
      case Phase::kGram1:
        gram(entry, at, tile, shared);
        break;
      case Phase::kClear:
        clear(entry, at, tile);
        break;
      default:
        break;
    }
    if (!worker.end()) continue;

    const bool decides = at.phase == Phase::kGram0;
    if (decides || at.phase == Phase::kGram1) {
      // The roundings of a sum of d numbers, kDepth at a time, and of the factor's sums: of either sign.
      const double noise = 4 * sqrt(entry.d / gpu::kDepth + double{kPanel}) * 0x1p-53;
      const Decided done = factor(
          entry.gram, decides ? entry.gram + kPanel * entry.pitch : nullptr, panel_of(entry, at).count,
          entry.pitch, noise, reinterpret_cast<double*>(shared.tiles.right), shared.space, entry.transform);
      __syncthreads();  // the transform is there
      if (decides && threadIdx.x == 0) {
        states[i].progress.decided = done.columns;
        states[i].progress.kept = done.kept;
      }
    }
    if (threadIdx.x == 0) advance(entry, states[i].progress, worker, rank + i);
  }
}

// ---- on the host

template <typename T, int kCapacity>
cudaError_t run_table(const OrthonormalizeProblem<T>* problems, int count, int64_t* rank,
                      gpu::Workspace& workspace, cudaStream_t stream) {
  static_assert(Matrix<T, false>::template kTile<kPanel> * gpu::kStages * sizeof(T) >=
                kPacked * sizeof(double));
  gpu::Table<Entry<T>, kCapacity> table{};
  table.count = count;
  workspace.reuse();
  auto* pool = workspace.take<gpu::Pool>(1);
  auto* states = workspace.take<State>(count);
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) {
    Entry<T>& entry = table.entry[i];
    entry.y = problems[i].y;
    entry.q = problems[i].q;
    entry.z = problems[i].z;
    entry.d = problems[i].d;
    entry.l = problems[i].l;
    entry.k = problems[i].k;
    const int64_t pitch = ceil_div(entry.l < kPanel ? entry.l : kPanel, 4) * 4;  // rows of whole 16 bytes
    entry.pitch = static_cast<int>(pitch);
    entry.products = workspace.take<T>((static_cast<int64_t>(entry.k) + entry.l) * pitch);
    entry.transform = workspace.take<T>(pitch * pitch);
    entry.gram = workspace.take<double>((kPanel + 1) * pitch);
    const int64_t rows = ceil_div(entry.d, kRows<T>),
                  bases = ceil_div(entry.k, kRows<T>) + ceil_div(entry.l, kRows<T>);
    tiles += rows > bases ? rows : bases;
  }
  if (workspace.counts_only()) return cudaSuccess;

  const auto* begin = reinterpret_cast<const unsigned char*>(pool);
  const auto* end = reinterpret_cast<const unsigned char*>(states + count);
  cudaError_t error = gpu::clear(pool, static_cast<size_t>(end - begin), stream);
  if (error != cudaSuccess) return error;
  gpu::Config config;
  config.grid = dim3(gpu::worker_blocks(tiles));
  config.block = dim3(kProductThreads);
  config.shared_bytes = Shared<T>::bytes() + gpu::Worker<State>::bytes();
  config.stream = stream;
  return gpu::launch(kernel<T, kCapacity>, config, table, pool, states, rank);
}

template <typename T>
cudaError_t run(const OrthonormalizeProblem<T>* problems, int count, int64_t* rank, gpu::Workspace& workspace,
                cudaStream_t stream) {
  constexpr int kLarge = gpu::kTableCapacity<Entry<T>>;
  for (int first = 0; first < count; first += kLarge) {
    const int now = count - first < kLarge ? count - first : kLarge;
    const cudaError_t error =
        now <= gpu::kSmallTable
            ? run_table<T, gpu::kSmallTable>(problems + first, now, rank + first, workspace, stream)
            : run_table<T, kLarge>(problems + first, now, rank + first, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <typename T>
int64_t orthonormalize_workspace(const OrthonormalizeProblem<T>* problems, int count) {
  gpu::Workspace counted;
  run<T>(problems, count, nullptr, counted, nullptr);
  return counted.needed();
}

template <typename T>
cudaError_t orthonormalize(const OrthonormalizeProblem<T>* problems, int count, int64_t* rank,
                           void* workspace, cudaStream_t stream) {
  gpu::Workspace memory(workspace);
  return run(problems, count, rank, memory, stream);
}

#define INSTANTIATE(T)                                                                \
  template int64_t orthonormalize_workspace<T>(const OrthonormalizeProblem<T>*, int); \
  template cudaError_t orthonormalize<T>(const OrthonormalizeProblem<T>*, int, int64_t*, void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace keeplora
