// project_rows on exact-size allocations, against double precision from the definition, under several
// schedules. Built with sanitizers too: there, one element read or written outside an array ends the program.
#include <cstdio>
#include <limits>

#include "checks/inputs.h"
#include "emulate/block.h"
#include "kernels/project_rows.h"

namespace {

using check::Array;

struct Shape {
  int rows, d, k;
  bool misaligned;
};

template <typename T>
bool check_group(const char* name, const std::vector<Shape>& shapes, int passes, T scale) {
  std::mt19937_64 random(7);
  std::vector<Array<T>> g, q, out;
  std::vector<keeplora::ProjectRowsProblem<T>> table;
  for (const auto [rows, d, k, misaligned] : shapes) {
    const size_t size = static_cast<size_t>(rows) * d;
    g.push_back(Array<T>::normal(size, misaligned, random));
    q.push_back(check::basis<T>(d, k, misaligned, random));
    out.push_back(Array<T>::filled(size, misaligned, [](size_t) { return NAN; }));
    table.push_back({g.back().data(), q.back().data(), out.back().data(), rows, d, k, scale});
  }
  const int count = static_cast<int>(table.size());
  const auto leak = Array<T>::filled(count, false, [](size_t) { return NAN; });
  const Array<unsigned char> workspace = Array<unsigned char>::filled(
      keeplora::project_rows_workspace(table.data(), count, passes), false, [](size_t) { return 0xff; });
  if (keeplora::project_rows(table.data(), count, passes, leak.data(), workspace.data(), nullptr) !=
      cudaSuccess) {
    std::printf("%s: %s\n", name, emulate::last_error().c_str());
    return false;
  }
  bool good = true;
  for (int i = 0; i < count; ++i) {
    const auto [rows, d, k, misaligned] = shapes[i];
    std::vector<double> exact(g[i].data(), g[i].data() + g[i].size());
    for (int pass = 0; pass < passes; ++pass)
      exact = check::complement(exact, q[i], rows, d, k);
    for (double& value : exact)
      value *= scale;
    // Sums of d and of k products, each rounded; entries of Q are rounded to T, which two passes see twice.
    // The leak is relative to R, which is smaller than G when little of the space is free.
    const double eps = std::numeric_limits<T>::epsilon();
    const double error = check::worst(out[i], exact), allowed = 4 * passes * (2 * std::sqrt(d + k) + 4) * eps;
    const double leak_allowed = d > k ? (passes == 1 ? 8 * eps * std::sqrt(d / (d - k)) : 4 * eps) : 2;
    if (!(error <= allowed) || !(leak[i] <= leak_allowed)) {
      std::printf("%s, problem %d: error %.2e (allowed %.2e), leak %.2e (allowed %.2e)\n", name, i, error,
                  allowed, static_cast<double>(leak[i]), leak_allowed);
      good = false;
    }
  }
  return good;
}

// Bases that are not orthonormal, each in a way of its own, leave leaks to compare digit by digit.
bool check_leaks(const std::vector<Shape>& shapes) {
  std::mt19937_64 random(3);
  std::vector<Array<float>> g, q, out;
  std::vector<keeplora::ProjectRowsProblem<float>> table;
  for (const auto [rows, d, k, misaligned] : shapes) {
    g.push_back(Array<float>::normal(static_cast<size_t>(rows) * d, misaligned, random));
    q.push_back(check::basis<float>(d, k, misaligned, random));
    for (size_t i = 0; i < q.back().size(); ++i)
      q.back()[i] *= 0.8f / q.size();
    out.emplace_back(g.back().size(), misaligned);
    table.push_back({g.back().data(), q.back().data(), out.back().data(), rows, d, k, 0.5f});
  }
  const int count = static_cast<int>(table.size());
  const Array<unsigned char> workspace(keeplora::project_rows_workspace(table.data(), count, 1), false);
  const auto leak = Array<float>::filled(count, false, [](size_t) { return NAN; });
  if (keeplora::project_rows(table.data(), count, 1, leak.data(), workspace.data(), nullptr) != cudaSuccess)
    return false;
  for (int i = 0; i < count; ++i) {
    const auto [rows, d, k, misaligned] = shapes[i];
    const std::vector<double> left =
        check::complement(std::vector<double>(g[i].data(), g[i].data() + g[i].size()), q[i], rows, d, k);
    double inside = 0, whole = 0;
    for (double value : left)
      whole += value * value;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < k; ++c) {
        double dot = 0;
        for (int j = 0; j < d; ++j)
          dot += left[r * d + j] * q[i][j * k + c];
        inside += dot * dot;
      }
    const double exact = std::sqrt(inside / whole);
    if (std::fabs(leak[i] - exact) <= 1e-5 * exact) continue;
    std::printf("leak %d: %.8f, exact %.8f\n", i, static_cast<double>(leak[i]), exact);
    return false;
  }
  return true;
}

// Sizes that an int does not hold: T alone takes 2^35 bytes, and 2^48 tiles are no launch.
bool check_large() {
  const keeplora::ProjectRowsProblem<float> many_numbers{nullptr, nullptr, nullptr, 1 << 21, 8, 4096, 1.0f},
      many_tiles{nullptr, nullptr, nullptr, 1 << 30, 1 << 30, 1, 1.0f};
  const int64_t bytes = keeplora::project_rows_workspace(&many_numbers, 1, 1);
  const Array<double> workspace(64, false);
  float leak = 0;
  const bool refused =
      keeplora::project_rows(&many_tiles, 1, 1, &leak, workspace.data(), nullptr) == cudaErrorInvalidValue;
  if (bytes >= int64_t{1} << 35 && refused) return true;
  std::printf("a workspace of %lld bytes for 2^33 numbers; 2^48 tiles %s\n", static_cast<long long>(bytes),
              refused ? "refused" : "launched");
  return false;
}

}  // namespace

int main() {
  // Every edge in one launch: odd, empty, tall, no basis, full basis, unaligned,
  // several tiles in each direction.
  const std::vector<Shape> ragged = {{5, 33, 7, false}, {1, 1, 1, false},     {8, 64, 16, false},
                                     {0, 5, 2, false},  {9, 40, 0, false},    {3, 12, 12, false},
                                     {17, 20, 8, true}, {2, 130, 129, false}, {3, 200, 70, true}};
  const std::vector<Shape> taller = {{40, 68, 66, false}, {20, 33, 5, true}, {70, 20, 4, false}};
  // Several tiles of products and of rows, one problem each with one tile of either.
  const std::vector<Shape> leaking = {
      {70, 20, 4, false}, {5, 70, 66, false}, {66, 130, 66, true}, {5, 33, 9, false}};
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 11});
    good = check_group<float>("ragged, one pass", ragged, 1, 1.0f) &&
           check_group<float>("ragged, two passes", ragged, 2, 0.5f) &&
           check_group<double>("ragged, double", ragged, 2, 1.0);
  }
  emulate::set_schedule({});
  // More problems than one launch takes, most of them empty.
  std::vector<Shape> many(520, {0, 3, 1, false});
  for (const size_t i : {7, 200, 511, 519})
    many[i].rows = 2;
  good = good && check_group<float>("520 problems", many, 2, 1.0f);
  good = good && check_group<float>("tall", taller, 2, 1.0f) && check_leaks(leaking) && check_large();
  std::printf(good ? "project_rows: as the definition says\n" : "project_rows: WRONG\n");
  return good ? 0 : 1;
}
