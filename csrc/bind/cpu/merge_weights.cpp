// merge_weights: out = cast(W + c (B - B0) A) in row ranges of many weights, and their A's stacked and cast.
//
// A piece of A stays in the first cache, as panels of kVectors vectors; rows of W pass by once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/cpu/levels.h"
#include "bind/cpu/matrix.h"
#include "bind/dispatch.h"
#include "bind/merge_places.h"

namespace keeplora {
namespace {

using cpu::Bfloat16;
using cpu::Buffer;
using cpu::Matrix;
using cpu::matrix_of;
using cpu::Wide;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "merge_weights";
constexpr int kVectors = 3;      // of columns in a tile
constexpr int64_t kPanels = 8;   // of A that are packed together
constexpr int64_t kChunk = 128;  // rows of W for which A is packed once

// Rows of a weight that have one adapter, or none (r = 0).
template <typename T>
struct Job {
  const void* w;
  void* out;
  int64_t w_stride, rows, columns, r;
  Matrix<T> a, b, origin;  // origin.data: null where there is none
  T scale;
};

template <typename T, typename W, typename O>
struct MergeRows {
  template <int kBytes>
  KEEPLORA_INLINE static void run(const Job<T>& job, int64_t begin, int64_t end) {
    constexpr int kLanes = kBytes / sizeof(T), kRows = kBytes == 64 ? 8 : 4;
    constexpr int64_t kStrip = kVectors * kLanes;
    const int64_t r = job.r;
    const Buffer<T> panels(std::max<int64_t>(1, kPanels * r * kStrip)), up(std::max<int64_t>(1, r * kRows));
    alignas(64) W w_edge[kRows * kStrip] = {};
    alignas(64) O out_edge[kRows * kStrip];
    for (int64_t column = 0; column < job.columns; column += kPanels * kStrip) {
      const int64_t width = std::min(kPanels * kStrip, job.columns - column);
      for (int64_t p = 0; p * kStrip < width; ++p)
        for (int64_t j = 0; j < r; ++j) {
          const int64_t valid = std::min(kStrip, width - p * kStrip);
          T* to = panels.get() + (p * r + j) * kStrip;
          for (int64_t k = 0; k < valid; ++k)
            to[k] = job.a.at(j, column + p * kStrip + k);
          std::fill(to + valid, to + kStrip, T(0));
        }
      for (int64_t row = begin; row < end; row += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, end - row);
        for (int64_t j = 0; j < r; ++j)
          for (int64_t i = 0; i < kRows; ++i) {
            const int64_t line = row + std::min(i, rows - 1);
            const T less = job.origin.data != nullptr ? job.origin.at(line, j) : T(0);
            up.get()[j * kRows + i] = job.b.at(line, j) - less;
          }
        for (int64_t p = 0; p * kStrip < width; ++p) {
          const int64_t valid = std::min(kStrip, width - p * kStrip), first = column + p * kStrip;
          const W* w = static_cast<const W*>(job.w) + row * job.w_stride + first;
          O* out = static_cast<O*>(job.out) + row * job.columns + first;
          const bool edge = valid < kStrip || rows < kRows;  // nothing is read or written beyond it
          if (edge)
            for (int64_t i = 0; i < rows; ++i)
              std::copy(w + i * job.w_stride, w + i * job.w_stride + valid, w_edge + i * kStrip);
          tile<kBytes, kRows>(edge ? w_edge : w, edge ? kStrip : job.w_stride, panels.get() + p * r * kStrip,
                              up.get(), r, job.scale, edge ? out_edge : out, edge ? kStrip : job.columns);
          if (edge)
            for (int64_t i = 0; i < rows; ++i)
              std::copy(out_edge + i * kStrip, out_edge + i * kStrip + valid, out + i * job.columns);
        }
      }
    }
  }

  template <int kBytes, int kRows>
  KEEPLORA_INLINE static void tile(const W* w, int64_t w_stride, const T* panel, const T* up, int64_t r,
                                   T scale, O* out, int64_t out_stride) {
    constexpr int kLanes = kBytes / sizeof(T);
    Wide<T, kBytes> sum[kRows][kVectors] = {};
    for (int64_t j = 0; j < r; ++j) {
      Wide<T, kBytes> a[kVectors];
      for (int v = 0; v < kVectors; ++v)
        cpu::load<kBytes>(a[v], panel + (j * kVectors + v) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v)
          sum[i][v] += up[j * kRows + i] * a[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) {
        Wide<T, kBytes> own;
        cpu::load<kBytes>(own, w + i * w_stride + v * kLanes);
        own += scale * sum[i][v];
        cpu::store<kBytes>(out + i * out_stride + v * kLanes, own);
      }
  }
};

template <typename T, typename W, typename O>
void run_jobs(const std::vector<Job<T>>& jobs) {
  std::vector<std::pair<size_t, int64_t>> chunks;
  for (size_t i = 0; i < jobs.size(); ++i)
    for (int64_t row = 0; row < jobs[i].rows; row += kChunk)
      chunks.emplace_back(i, row);
  const int bytes = cpu::vector_bytes();
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Job<T>& job = jobs[chunks[c].first];
      const int64_t first = chunks[c].second, last = std::min(job.rows, first + kChunk);
      cpu::on_this_cpu<MergeRows<T, W, O>>(bytes, job, first, last);
    }
  });
}

Tensor as(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// The weights whose sums are formed in T. Only bfloat16 is read and written as it is, and only by float.
template <typename T>
class Batch {
 public:
  // A tensor to write what is to be `dtype` in the end.
  Tensor output(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) const {
    return torch::stable::new_empty(like, sizes, is_half(dtype) ? dtype : kWide);
  }

  // out's rows from `to` on = rows [start, stop) of w, merged with the adapter if there is one.
  void add(const Tensor& w, int64_t start, int64_t stop, Tensor& out, int64_t to) {
    add(w, start, stop, out, to, nullptr, nullptr, nullptr, 0.0);
  }
  void add(const Tensor& weight, int64_t start, int64_t stop, Tensor& out, int64_t to, const Tensor* a,
           const Tensor* b, const Tensor* origin, double scale) {
    Tensor w = is_half(weight.scalar_type()) ? weight : as(weight, kWide);
    if (w.stride(1) != 1) w = torch::stable::contiguous(w);
    const bool half_w = is_half(w.scalar_type()), half_out = is_half(out.scalar_type());
    Job<T> job{};
    job.w = static_cast<const char*>(w.const_data_ptr()) + start * w.stride(0) * (half_w ? 2 : sizeof(T));
    job.out = static_cast<char*>(out.mutable_data_ptr()) + to * out.size(1) * (half_out ? 2 : sizeof(T));
    job.w_stride = w.stride(0), job.rows = stop - start, job.columns = w.size(1);
    kept_.push_back(w);
    if (a != nullptr) {
      job.r = a->size(0), job.scale = static_cast<T>(scale);
      job.a = wide(*a), job.b = wide(*b);
      if (origin != nullptr) job.origin = wide(*origin);
    }
    jobs_[half_w][half_out].push_back(job);
  }

  void run() const {
    run_jobs<T, T, T>(jobs_[0][0]);
    if constexpr (sizeof(T) == 4) {
      run_jobs<T, T, Bfloat16>(jobs_[0][1]);
      run_jobs<T, Bfloat16, T>(jobs_[1][0]);
      run_jobs<T, Bfloat16, Bfloat16>(jobs_[1][1]);
    }
  }

 private:
  static constexpr ScalarType kWide = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  static bool is_half(ScalarType dtype) { return sizeof(T) == 4 && dtype == ScalarType::BFloat16; }
  Matrix<T> wide(const Tensor& tensor) { return matrix_of<T>(kept_.emplace_back(as(tensor, kWide))); }

  std::vector<Job<T>> jobs_[2][2];  // by whether W is bfloat16, out is
  std::vector<Tensor> kept_;        // what the jobs read
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> merge_weights_cpu(
    std::vector<Tensor> w, std::vector<Tensor> a, std::vector<Tensor> b, std::vector<Tensor> origin,
    std::vector<int64_t> place, std::vector<double> scale, bool stack, std::optional<ScalarType> dtype) {
  const MergePlaces places = merge_places(kOp, w, a, b, origin, place, scale);
  Batch<float> singles;
  Batch<double> doubles;
  std::vector<Tensor> merged, stacked;
  for (size_t k = 0; k < w.size(); ++k) {
    const auto add = [&](auto& batch) {
      const ScalarType to = dtype.value_or(w[k].scalar_type());
      Tensor& out = merged.emplace_back(batch.output(w[k], {w[k].size(0), w[k].size(1)}, to));
      for (const auto& [start, stop, j] : places.rows[k])
        if (j < 0)
          batch.add(w[k], start, stop, out, start);
        else
          batch.add(w[k], start, stop, out, start, &a[j], &b[j], places.origin[j], scale[j]);
      if (!stack) return;
      Tensor& rows = stacked.emplace_back(batch.output(w[k], {places.ranks(k, a), w[k].size(1)}, to));
      int64_t row = 0;
      for (const int64_t j : places.adapters[k]) {
        batch.add(a[j], 0, a[j].size(0), rows, row);
        row += a[j].size(0);
      }
    };
    places.is_double(k, w, a, b) ? add(doubles) : add(singles);
  }
  singles.run();
  doubles.run();
  for (auto* results : {&merged, &stacked})
    for (size_t k = 0; k < results->size(); ++k)
      (*results)[k] = as((*results)[k], dtype.value_or(w[k].scalar_type()));
  return {merged, stacked};
}

STABLE_TORCH_LIBRARY_IMPL(keeplora, CPU, m) {
  m.impl("merge_weights", TORCH_BOX(&merge_weights_cpu));
}

}  // namespace
}  // namespace keeplora
