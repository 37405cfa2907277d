// project_rows on exact-size allocations, against double precision from the definition, under several
// schedules. Built with sanitizers too: there, one element read or written outside an array ends the program.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "emulate/block.h"
#include "kernels/project_rows.h"

namespace {

struct Shape {
  int rows, d, k;
  bool misaligned;
};

template <typename T>
struct Problem {
  Shape shape;
  // Each array in an allocation of its own, `skip` elements past an aligned address.
  std::unique_ptr<T[]> g, q, out;
  size_t skip;

  Problem(const Shape& s, std::mt19937_64& random) : shape(s), skip(s.misaligned ? 1 : 0) {
    const auto size = [&](int a, int b) { return skip + static_cast<size_t>(a) * b; };
    g.reset(new T[size(s.rows, s.d)]);
    q.reset(new T[size(s.d, s.k)]);
    out.reset(new T[size(s.rows, s.d)]);
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < size(s.rows, s.d); ++i)
      g[i] = static_cast<T>(normal(random));
    for (size_t i = 0; i < size(s.rows, s.d); ++i)
      out[i] = std::nan("");
    orthonormal_columns(random);
  }

  void orthonormal_columns(std::mt19937_64& random) {
    std::normal_distribution<double> normal;
    std::vector<std::vector<double>> columns;
    for (int c = 0; c < shape.k; ++c) {
      std::vector<double> column(shape.d);
      for (double& value : column)
        value = normal(random);
      for (int twice = 0; twice < 2; ++twice)
        for (const auto& other : columns) {
          double dot = 0;
          for (int i = 0; i < shape.d; ++i)
            dot += column[i] * other[i];
          for (int i = 0; i < shape.d; ++i)
            column[i] -= dot * other[i];
        }
      double length = 0;
      for (double value : column)
        length += value * value;
      for (double& value : column)
        value /= std::sqrt(length);
      columns.push_back(column);
      for (int i = 0; i < shape.d; ++i)
        q[skip + static_cast<size_t>(i) * shape.k + c] = static_cast<T>(column[i]);
    }
  }
};

// Largest error of out = scale (G - (G Q) Q^T), relative to the largest entry of G; infinite for a NaN.
template <typename T>
double worst_error(const Problem<T>& p, double scale) {
  const auto [rows, d, k, misaligned] = p.shape;
  double worst = 0, largest = 1e-300;
  for (int r = 0; r < rows; ++r) {
    const T* g = p.g.get() + p.skip + static_cast<size_t>(r) * d;
    std::vector<double> inside(k);
    for (int c = 0; c < k; ++c)
      for (int i = 0; i < d; ++i)
        inside[c] += static_cast<double>(g[i]) * p.q[p.skip + static_cast<size_t>(i) * k + c];
    for (int i = 0; i < d; ++i) {
      double value = g[i];
      for (int c = 0; c < k; ++c)
        value -= inside[c] * p.q[p.skip + static_cast<size_t>(i) * k + c];
      const double error = std::fabs(scale * value - p.out[p.skip + static_cast<size_t>(r) * d + i]);
      if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
      largest = std::fmax(largest, std::fabs(static_cast<double>(g[i])));
    }
  }
  return worst / largest;
}

template <typename T>
bool check(const char* name, const std::vector<Shape>& shapes, int passes, T scale) {
  std::mt19937_64 random(7);
  std::vector<Problem<T>> problems;
  std::vector<keeplora::ProjectRowsProblem<T>> table;
  int longest = 1;
  for (const Shape& shape : shapes) {
    const auto& p = problems.emplace_back(shape, random);
    table.push_back(
        {p.g.get() + p.skip, p.q.get() + p.skip, p.out.get() + p.skip, shape.rows, shape.d, shape.k, scale});
    longest = std::max(longest, shape.d);
  }
  const int count = static_cast<int>(table.size());
  std::unique_ptr<T[]> leak(new T[count]);
  std::vector<unsigned char> workspace(keeplora::project_rows_workspace(table.data(), count, passes), 0xff);
  if (keeplora::project_rows(table.data(), count, passes, leak.get(), workspace.data(), nullptr) !=
      cudaSuccess) {
    std::printf("%s: %s\n", name, emulate::last_error().c_str());
    return false;
  }
  // Sums of d and of k products, each rounded; entries of Q are rounded to T, which two passes see twice. The
  // leak is relative to R, which is smaller than G when little of the space is free.
  const double eps = std::numeric_limits<T>::epsilon(), allowed = passes * (2 * std::sqrt(longest) + 4) * eps;
  bool good = true;
  for (int i = 0; i < count; ++i) {
    const double error = worst_error(problems[i], scale);
    const auto [rows, d, k, misaligned] = shapes[i];
    const double leak_allowed = d > k ? (passes == 1 ? 8 * eps * std::sqrt(d / (d - k)) : 4 * eps) : 2;
    if (!(error <= allowed) || !(leak[i] <= leak_allowed)) {
      std::printf("%s, problem %d: error %.2e (allowed %.2e), leak %.2e (allowed %.2e)\n", name, i, error,
                  allowed, static_cast<double>(leak[i]), leak_allowed);
      good = false;
    }
  }
  return good;
}

}  // namespace

int main() {
  // Every edge in one launch: odd, empty, tall, no basis, full basis, unaligned, more than one chunk of
  // columns.
  const std::vector<Shape> ragged = {{5, 33, 7, false}, {1, 1, 1, false},    {8, 64, 16, false},
                                     {0, 5, 2, false},  {9, 40, 0, false},   {3, 12, 12, false},
                                     {17, 20, 8, true}, {2, 130, 129, false}};
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 11});
    good = check<float>("ragged, one pass", ragged, 1, 1.0f) &&
           check<float>("ragged, two passes", ragged, 2, 0.5f) &&
           check<double>("ragged, double", ragged, 2, 1.0);
  }
  emulate::set_schedule({});
  good = good && check<float>("two panels", {{2, 1100, 1030, false}}, 1, 1.0f);
  std::printf(good ? "project_rows: as the definition says\n" : "project_rows: WRONG\n");
  return good ? 0 : 1;
}
