// Where the adapters of lora_grad_b have their columns of t and of dy; the same on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace keeplora {

inline void check_spans(const char* op, const torch::stable::Tensor& dy, const torch::stable::Tensor& t,
                        const std::vector<int64_t>& place, const std::vector<double>& scale) {
  STD_TORCH_CHECK(place.size() == 4 * scale.size(), op, ": place must have ", 4 * scale.size(),
                  " numbers for ", scale.size(), " of scale, got ", place.size());
  for (size_t i = 0; i < place.size(); i += 2) {
    const int64_t size = i % 4 == 0 ? t.size(1) : dy.size(1);
    STD_TORCH_CHECK(0 <= place[i] && place[i] <= place[i + 1] && place[i + 1] <= size, op,
                    ": place must satisfy 0 <= start <= stop <= ", size, ", got (", place[i], ", ",
                    place[i + 1], ") for adapter ", i / 4);
  }
}

}  // namespace keeplora
