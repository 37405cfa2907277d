// Where the adapters of merge_weights belong, from its argument `place`, and which sums are float64; the same
// on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace keeplora {

// Rows [start, stop) of a weight, and the number of their adapter, or -1.
struct MergedRows {
  int64_t start, stop, adapter;
};

struct MergePlaces {
  std::vector<std::vector<MergedRows>> rows;         // of each weight, all of them, in order
  std::vector<std::vector<int64_t>> adapters;        // of each weight, as they were given
  std::vector<const torch::stable::Tensor*> origin;  // of each adapter, or null

  // Whether a weight or anything that is added to it is float64.
  bool is_double(size_t weight, const std::vector<torch::stable::Tensor>& w,
                 const std::vector<torch::stable::Tensor>& a,
                 const std::vector<torch::stable::Tensor>& b) const {
    const auto wide = [](const torch::stable::Tensor& tensor) {
      return tensor.scalar_type() == torch::headeronly::ScalarType::Double;
    };
    return wide(w[weight]) || std::any_of(adapters[weight].begin(), adapters[weight].end(), [&](int64_t j) {
             return wide(a[j]) || wide(b[j]) || (origin[j] != nullptr && wide(*origin[j]));
           });
  }

  int64_t ranks(size_t weight, const std::vector<torch::stable::Tensor>& a) const {
    int64_t sum = 0;
    for (const int64_t j : adapters[weight])
      sum += a[j].size(0);
    return sum;
  }
};

inline MergePlaces merge_places(const char* op, const std::vector<torch::stable::Tensor>& w,
                                const std::vector<torch::stable::Tensor>& a,
                                const std::vector<torch::stable::Tensor>& b,
                                const std::vector<torch::stable::Tensor>& origin,
                                const std::vector<int64_t>& place, const std::vector<double>& scale) {
  const size_t n = a.size();
  STD_TORCH_CHECK(b.size() == n && scale.size() == n && place.size() == 4 * n, op,
                  ": b, scale and place must have ", n, ", ", n, " and ", 4 * n, " items for ", n,
                  " of a, got ", b.size(), ", ", scale.size(), " and ", place.size());
  for (const torch::stable::Tensor& weight : w)
    STD_TORCH_CHECK(weight.dim() == 2, op, ": w must be matrices, got ", weight.dim(), " dimensions");
  MergePlaces places{std::vector<std::vector<MergedRows>>(w.size()),
                     std::vector<std::vector<int64_t>>(w.size()),
                     std::vector<const torch::stable::Tensor*>(n, nullptr)};
  for (size_t j = 0; j < n; ++j) {
    const int64_t k = place[4 * j], start = place[4 * j + 1], stop = place[4 * j + 2],
                  which = place[4 * j + 3];
    STD_TORCH_CHECK(0 <= k && k < static_cast<int64_t>(w.size()) && 0 <= start && start <= stop &&
                        stop <= w[k].size(0) && -1 <= which && which < static_cast<int64_t>(origin.size()),
                    op, ": place must name a weight, rows of it and an origin or -1, got (", k, ", ", start,
                    ", ", stop, ", ", which, ") for adapter ", j);
    STD_TORCH_CHECK(a[j].dim() == 2 && b[j].dim() == 2 && a[j].size(1) == w[k].size(1) &&
                        b[j].size(0) == stop - start && b[j].size(1) == a[j].size(0),
                    op, ": b times a must have the shape of their rows of w in adapter ", j);
    if (which >= 0) {
      places.origin[j] = &origin[which];
      STD_TORCH_CHECK(origin[which].dim() == 2 && origin[which].size(0) == b[j].size(0) &&
                          origin[which].size(1) == b[j].size(1),
                      op, ": origin must have the shape of b in adapter ", j);
    }
    places.adapters[k].push_back(static_cast<int64_t>(j));
    if (start < stop) places.rows[k].push_back({start, stop, static_cast<int64_t>(j)});
  }
  for (size_t k = 0; k < w.size(); ++k) {
    std::vector<MergedRows>& given = places.rows[k];
    std::sort(given.begin(), given.end(),
              [](const MergedRows& one, const MergedRows& other) { return one.start < other.start; });
    std::vector<MergedRows> all;
    int64_t row = 0;
    for (const MergedRows& rows : given) {
      STD_TORCH_CHECK(row <= rows.start, op, ": place must not give rows to two adapters, got row ",
                      rows.start, " of w[", k, "] twice");
      if (row < rows.start) all.push_back({row, rows.start, -1});
      all.push_back(rows);
      row = rows.stop;
    }
    if (row < w[k].size(0)) all.push_back({row, w[k].size(0), -1});
    given = std::move(all);
  }
  return places;
}

}  // namespace keeplora
