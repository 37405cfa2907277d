// projected_adamw on exact-size allocations, against double precision from the papers' formulas,
// under several schedules.
#include <cstdio>
#include <cstring>
#include <limits>

#include "checks/inputs.h"
#include "emulate/block.h"
#include "kernels/projected_adamw.h"

namespace {

using check::Array;

struct Shape {
  int rows, d, k;
  bool misaligned, half;  // half: the gradient is bfloat16
};

constexpr keeplora::AdamWOptions kOptions{0.9, 0.99, 1e-6, 0.1};

template <typename T>
bool check_group(const char* name, const std::vector<Shape>& shapes) {
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> uniform(0.5, 1.0);
  std::vector<Array<T>> a, m, v, g, q;
  std::vector<Array<float>> steps;
  std::vector<Array<uint16_t>> halves;
  std::vector<std::vector<double>> exact;
  std::vector<keeplora::ProjectedAdamWProblem<T>> table;
  for (const auto [rows, d, k, misaligned, half] : shapes) {
    const size_t size = static_cast<size_t>(rows) * d;
    a.push_back(Array<T>::normal(size, misaligned, random));
    m.push_back(Array<T>::normal(size, misaligned, random));
    v.push_back(Array<T>::filled(size, misaligned, [&](size_t) { return uniform(random); }));
    q.push_back(check::basis<T>(d, k, misaligned, random));
    // Small multiples of 1/8 are numbers of every format.
    g.push_back(Array<T>::filled(size, misaligned,
                                 [&](size_t) { return (static_cast<int>(random() % 33) - 16) / 8.0; }));
    halves.push_back(Array<uint16_t>::filled(half ? size : 0, misaligned, [&](size_t i) {
      const float value = static_cast<float>(g.back()[i]);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      return bits >> 16;
    }));
    const T lr = static_cast<T>(0.01 * (1 + table.size()));
    const gpu::Format format = half             ? gpu::Format::kBfloat16
                               : sizeof(T) == 4 ? gpu::Format::kFloat32
                                                : gpu::Format::kFloat64;
    const void* grad = half ? static_cast<const void*>(halves.back().data()) : g.back().data();
    const int step = 1 + 2 * static_cast<int>(table.size());
    const bool on_device = table.size() % 2 == 0;
    steps.push_back(Array<float>::filled(on_device, false, [&](size_t) { return step; }));
    table.push_back({a.back().data(), m.back().data(), v.back().data(), grad, format, q.back().data(), rows,
                     d, k, lr, on_device ? steps.back().data() : nullptr, on_device ? 0.0f : step});

    std::vector<double> next =
        check::complement(std::vector<double>(g.back().data(), g.back().data() + size), q.back(), rows, d, k);
    for (size_t i = 0; i < size; ++i) {
      const auto& [beta1, beta2, eps, decay] = kOptions;
      const double average = beta1 * m.back()[i] + (1 - beta1) * next[i];
      const double square = beta2 * v.back()[i] + (1 - beta2) * next[i] * next[i];
      const double hat = average / (1 - std::pow(beta1, step)),
                   size_of = std::sqrt(square / (1 - std::pow(beta2, step)));
      next[i] = a.back()[i] * (1 - lr * decay) - lr * hat / (size_of + eps);
    }
    for (int twice = 0; twice < 2; ++twice)
      next = check::complement(next, q.back(), rows, d, k);
    exact.push_back(next);
  }
  const int count = static_cast<int>(table.size());
  const auto leak = Array<T>::filled(count, false, [](size_t) { return NAN; });
  const Array<unsigned char> workspace = Array<unsigned char>::filled(
      keeplora::projected_adamw_workspace(table.data(), count), false, [](size_t) { return 0xff; });
  if (keeplora::projected_adamw(table.data(), count, kOptions, leak.data(), workspace.data(), nullptr) !=
      cudaSuccess) {
    std::printf("%s: %s\n", name, emulate::last_error().c_str());
    return false;
  }
  bool good = true;
  for (int i = 0; i < count; ++i) {
    const auto [rows, d, k, misaligned, half] = shapes[i];
    const double eps = std::numeric_limits<T>::epsilon();
    const double error = check::worst(a[i], exact[i]), allowed = 4 * (2 * std::sqrt(d + k) + 8) * eps;
    if (!(error <= allowed) || !(leak[i] <= (d > k ? 4 * eps : 2))) {
      std::printf("%s, problem %d: error %.2e (allowed %.2e), leak %.2e\n", name, i, error, allowed,
                  static_cast<double>(leak[i]));
      good = false;
    }
  }
  return good;
}

// The gradient in float alone takes 2^35 bytes.
bool check_workspace() {
  keeplora::ProjectedAdamWProblem<float> problem{};
  problem.grad_format = gpu::Format::kBfloat16;
  problem.rows = 1 << 21;
  problem.d = 4096;
  const int64_t bytes = keeplora::projected_adamw_workspace(&problem, 1);
  if (bytes >= int64_t{1} << 35) return true;
  std::printf("a workspace of %lld bytes for 2^33 numbers\n", static_cast<long long>(bytes));
  return false;
}

}  // namespace

int main() {
  const std::vector<Shape> ragged = {
      {5, 33, 7, false, false}, {1, 1, 1, false, true},    {9, 40, 0, false, false}, {0, 5, 2, false, false},
      {17, 20, 8, true, false}, {2, 130, 70, false, true}, {18, 9, 2, true, true}};
  std::vector<Shape> same = ragged;  // without the phase that converts gradients
  for (Shape& shape : same)
    shape.half = false;
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 3});
    good = check_group<float>("mixed gradients", ragged) && check_group<float>("float", same) &&
           check_group<double>("double", ragged);
  }
  good = good && check_workspace();
  std::printf(good ? "projected_adamw: as the definition says\n" : "projected_adamw: WRONG\n");
  return good ? 0 : 1;
}
