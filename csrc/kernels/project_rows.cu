// A block owns 8 rows of one problem and walks over Q twice per pass: T = G Q, then R = G - T Q^T. T (8 rows
// by one panel of Q's columns) stays in shared memory; G and R are re-read from cache. A warp handles four
// rows of Q at a time, so each value of T read from shared memory serves four of them.
#include "kernels/project_rows.h"

#include "kernels/device.cuh"
#include "kernels/primitives/shared.cuh"
#include "kernels/primitives/warp.cuh"

namespace keeplora {
namespace {

using gpu::ceil_div;
using gpu::Four;
using gpu::kWarp;
using gpu::load_four;

constexpr int kRows = 8;   // rows of G per block
constexpr int kStep = 4;   // rows of Q a warp handles at a time
constexpr int kWarps = 8;  // per block
constexpr int kThreads = kWarps * kWarp;
constexpr int kChunk = 4 * kWarp;  // columns of Q a warp covers with four per lane
static_assert(kRows * kStep == kWarp, "warp_sum_transposed gives each lane one sum");

// Columns of Q whose products T are held at once: 32 KB of them.
template <typename T>
constexpr int kPanel = 4096 / sizeof(T);

template <typename T>
struct Entry {
  const T* g;
  const T* q;
  T* out;
  int rows, d, k;
  int first_block;  // in the grid; the next entry's is one past this entry's last
  T scale;
};

// The table of problems travels in the kernel's parameters: no copy to the device, and a captured CUDA graph
// keeps it. Small calls take the small table, because every launch copies all of its parameters.
template <typename T, int kCapacity>
struct Table {
  Entry<T> entry[kCapacity];
  int count;
};
constexpr int kSmall = 80, kLarge = 640;
static_assert(sizeof(Table<double, kLarge>) <= 32764 - 64, "kernel parameters are limited to 32,764 bytes");

template <typename T, int kCapacity>
__device__ int entry_of_block(const Table<T, kCapacity>& table, int block) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entry[middle].first_block <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The rows of one block, and where in shared memory its products go.
template <typename T>
struct Work {
  const Entry<T>& problem;
  int first_row;
  T* products;  // [kRows, panel], one row after the other
  int pitch;    // columns of the panel, a multiple of kChunk
  T* partial;   // [kWarps, kRows, kChunk]

  // Rows beyond the last are read as copies of it, and never counted or written.
  __device__ int64_t offset(int row) const {
    return static_cast<int64_t>(min(first_row + row, problem.rows - 1)) * problem.d;
  }
  __device__ bool owns(int row) const { return first_row + row < problem.rows; }
};

// products = rows of `from` times the panel of Q that starts at `column`. Warps share out the rows of Q;
// their partial sums are added in warp order.
template <bool kVector, typename T>
__device__ void multiply_panel(const Work<T>& work, const T* from, int column) {
  const auto& problem = work.problem;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int chunk = 0; chunk < work.pitch && column + chunk < problem.k; chunk += kChunk) {
    const int mine = column + chunk + 4 * lane;
    T sum[kRows][4] = {};
    for (int d0 = kStep * warp; d0 < problem.d; d0 += kStep * kWarps) {
      Four<T> g[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        g[row] = load_four<kVector>(from + work.offset(row), d0, problem.d);
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        if (d0 + step >= problem.d) break;
        const auto q =
            load_four<kVector>(problem.q + static_cast<int64_t>(d0 + step) * problem.k, mine, problem.k);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sum[row][j] += g[row].at[step] * q.at[j];
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        work.partial[(warp * kRows + row) * kChunk + 4 * lane + j] = sum[row][j];
    __syncthreads();  // all partial sums are there
    for (int i = threadIdx.x; i < kRows * kChunk; i += kThreads) {
      T total = 0;
      for (int w = 0; w < kWarps; ++w)
        total += work.partial[w * kRows * kChunk + i];
      work.products[i / kChunk * work.pitch + chunk + i % kChunk] = total;
    }
    __syncthreads();  // products complete, and partial free for the next chunk
  }
}

// out = from - products times the panel of Q, transposed. Lane 4 row + step of a warp ends up with one
// element.
template <bool kVector, typename T>
__device__ void subtract_panel(const Work<T>& work, const T* from, int column) {
  const auto& problem = work.problem;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int d0 = kStep * warp; d0 < problem.d; d0 += kStep * kWarps) {
    T sum[kRows * kStep] = {};
    for (int c = 4 * lane; c < work.pitch && column + c < problem.k; c += kChunk) {
      Four<T> q[kStep];
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        const int64_t at = static_cast<int64_t>(min(d0 + step, problem.d - 1)) * problem.k;
        q[step] = load_four<kVector>(problem.q + at, column + c, problem.k);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const auto t = *reinterpret_cast<const Four<T>*>(work.products + row * work.pitch + c);
#pragma unroll
        for (int step = 0; step < kStep; ++step)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sum[row * kStep + step] += t.at[j] * q[step].at[j];
      }
    }
    const T inside = gpu::warp_sum_transposed(sum, lane);
    const int row = lane / kStep, column_of_d = d0 + lane % kStep;
    if (work.owns(row) && column_of_d < problem.d) {
      const int64_t at = work.offset(row) + column_of_d;
      problem.out[at] = from[at] - inside;
    }
  }
  __syncthreads();  // out is read by other threads, and products overwritten, from here on
}

// Sum of `value` over the block, for thread 0.
__device__ double block_sum(double value, double* scratch) {
  const double sum = gpu::warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = sum;
  __syncthreads();  // every warp has written its sum
  double total = 0;
  for (int w = 0; w < kWarps; ++w)
    total += scratch[w];
  return total;
}

// The whole of a block's work. squares receives |R Q|^2 and |R|^2 of its rows, before the scale.
template <bool kVector, typename T>
__device__ void project(const Work<T>& work, int passes, double* scratch, double* squares) {
  const auto& problem = work.problem;
  const T* from = problem.g;
  for (int pass = 0; pass < passes; ++pass) {
    for (int column = 0; column < problem.k; column += kPanel<T>) {
      multiply_panel<kVector>(work, from, column);
      subtract_panel<kVector>(work, from, column);
      from = problem.out;
    }
  }

  double inside = 0;
  for (int column = 0; column < problem.k; column += kPanel<T>) {
    multiply_panel<kVector>(work, from, column);
    const int width = min(work.pitch, problem.k - column);
    for (int row = 0; row < kRows && work.owns(row); ++row)
      for (int c = threadIdx.x; c < width; c += kThreads) {
        const double value = work.products[row * work.pitch + c];
        inside += value * value;
      }
  }

  double whole = 0;
  for (int row = 0; row < kRows && work.owns(row); ++row)
    for (int c = threadIdx.x; c < problem.d; c += kThreads) {
      const T value = from[work.offset(row) + c];
      whole += static_cast<double>(value) * value;
      problem.out[work.offset(row) + c] = problem.scale * value;
    }
  inside = block_sum(inside, scratch);
  whole = block_sum(whole, scratch + kWarps);
  if (threadIdx.x == 0) {
    squares[0] = inside;
    squares[1] = whole;
  }
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads,
                                  sizeof(T) == 4 ? 2 : 1)  // doubles need the registers of two blocks
    project_kernel(const __grid_constant__ Table<T, kCapacity> table, int passes, int pitch,
                   double* squares) {
  const Entry<T>& problem = table.entry[entry_of_block(table, blockIdx.x)];
  gpu::SharedArena arena;
  Work<T> work{problem, static_cast<int>(blockIdx.x - problem.first_block) * kRows,
               arena.take<T>(static_cast<size_t>(kRows) * pitch), pitch,
               arena.take<T>(static_cast<size_t>(kWarps) * kRows * kChunk)};
  double* scratch = arena.take<double>(2 * kWarps);
  const bool vector = problem.d % 4 == 0 && problem.k % 4 == 0 && gpu::aligned16(problem.g) &&
                      gpu::aligned16(problem.q) && gpu::aligned16(problem.out);
  double* mine = squares + 2 * static_cast<int64_t>(blockIdx.x);
  if (vector)
    project<true>(work, passes, scratch, mine);
  else
    project<false>(work, passes, scratch, mine);
}

// One warp per problem adds up what its blocks found.
template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    leak_kernel(const __grid_constant__ Table<T, kCapacity> table, const double* squares, T* leak) {
  const int i = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (i >= table.count) return;  // the same for all lanes of a warp
  const Entry<T>& problem = table.entry[i];
  const int end = problem.first_block + ceil_div(problem.rows, kRows);
  double inside = 0, whole = 0;
  for (int block = problem.first_block + threadIdx.x % kWarp; block < end; block += kWarp) {
    inside += squares[2 * static_cast<int64_t>(block)];
    whole += squares[2 * static_cast<int64_t>(block) + 1];
  }
  inside = gpu::warp_sum(inside);
  whole = gpu::warp_sum(whole);
  if (threadIdx.x % kWarp == 0)
    leak[i] = whole == 0 || problem.scale == 0 ? T(0) : static_cast<T>(sqrt(inside / whole));
}

template <int kCapacity, typename T>
cudaError_t launch_some(const ProjectRowsProblem<T>* problems, int count, int passes, T* leak,
                        double* workspace, cudaStream_t stream) {
  Table<T, kCapacity> table{};
  table.count = count;
  int blocks = 0, widest = 0;
  for (int i = 0; i < count; ++i) {
    const auto& p = problems[i];
    table.entry[i] = {p.g, p.q, p.out, static_cast<int>(p.rows), p.d, p.k, blocks, p.scale};
    blocks += p.d == 0 ? 0 : ceil_div(static_cast<int>(p.rows), kRows);
    if (p.d == 0) table.entry[i].rows = 0;
    widest = p.k > widest ? p.k : widest;
  }
  const int pitch = ceil_div(widest < kPanel<T> ? widest : kPanel<T>, kChunk) * kChunk;
  const size_t shared = gpu::shared_bytes<T>(static_cast<size_t>(kRows) * pitch) +
                        gpu::shared_bytes<T>(kWarps * kRows * kChunk) + gpu::shared_bytes<double>(2 * kWarps);
  if (blocks > 0) {
    const gpu::Config config{dim3(blocks), dim3(kThreads), shared, stream};
    const cudaError_t error =
        gpu::launch(project_kernel<T, kCapacity>, config, table, passes, pitch, workspace);
    if (error != cudaSuccess) return error;
  }
  const gpu::Config config{dim3(ceil_div(count, kWarps)), dim3(kThreads), 0, stream};
  return gpu::launch(leak_kernel<T, kCapacity>, config, table, static_cast<const double*>(workspace), leak);
}

}  // namespace

template <typename T>
int64_t project_rows_workspace(const ProjectRowsProblem<T>* problems, int count) {
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i)
    blocks += ceil_div(problems[i].rows, kRows);
  return 2 * blocks;
}

template <typename T>
cudaError_t project_rows(const ProjectRowsProblem<T>* problems, int count, int passes, T* leak,
                         double* workspace, cudaStream_t stream) {
  while (count > 0) {
    const int now = count < kLarge ? count : kLarge;
    const cudaError_t error = now <= kSmall
                                  ? launch_some<kSmall>(problems, now, passes, leak, workspace, stream)
                                  : launch_some<kLarge>(problems, now, passes, leak, workspace, stream);
    if (error != cudaSuccess) return error;
    workspace += project_rows_workspace(problems, now);
    problems += now;
    leak += now;
    count -= now;
  }
  return cudaSuccess;
}

#define INSTANTIATE(T)                                                           \
  template int64_t project_rows_workspace<T>(const ProjectRowsProblem<T>*, int); \
  template cudaError_t project_rows<T>(const ProjectRowsProblem<T>*, int, int, T*, double*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace keeplora
