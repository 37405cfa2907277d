// orthonormalize on exact-size allocations, against Gram-Schmidt in double precision,
// under several schedules.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "checks/inputs.h"
#include "emulate/block.h"
#include "kernels/orthonormalize.h"

namespace {

enum class Kind {
  kNormal,
  kDependent,  // a zero column, a repeated one, one inside Q, a combination of others
  kSteep,      // each column differs from the one before by less and less
  kTwice,      // every column twice
  kUncertain,  // a direction that two columns tell badly, and later columns mostly along it
  kDoubtful,   // the same, told ten times as well
  kEdge,       // one column inside Q but for a part just above the limit: to be kept, by less than rounding
  kBelow,      // the same, with a part just below the limit, and its length in the last row: to be dropped
  kNan,
};

struct Shape {
  int d, l, k;
  Kind kind = Kind::kNormal;
  bool misaligned = false;
};

template <typename T>
struct Problem {
  Shape shape;
  check::Array<T> y, q, z;

  Problem(const Shape& s, std::mt19937_64& random)
      : shape(s),
        y(check::Array<T>::normal(size(s.d, s.l), s.misaligned, random)),
        q(check::basis<T>(s.d, s.k, s.misaligned, random)),
        z(check::Array<T>::filled(size(s.d, s.l), s.misaligned, [](size_t) { return std::nan(""); })) {
    for (int i = 0; i < s.d; ++i) {
      T* row = y.data() + size(i, s.l);
      if (s.kind == Kind::kDependent) {
        row[0] = 0;
        row[3] = row[2];
        row[4] = static_cast<T>(1e3) * q[size(i, s.k)];
        row[6] = row[1] - 2 * row[5];
      }
      for (int c = 1; c < s.l && s.kind == Kind::kSteep; ++c)
        row[c] = row[c - 1] + static_cast<T>(std::pow(10, -c)) * row[c];
      for (int c = 1; c < s.l && s.kind == Kind::kTwice; c += 2)
        row[c] = row[c - 1];
      if (s.kind == Kind::kUncertain || s.kind == Kind::kDoubtful) {
        const T direction = row[1];
        row[1] = row[0] + static_cast<T>(s.kind == Kind::kUncertain ? 1e-4 : 1e-3) * direction;
        for (int c = 2; c < s.l; ++c)
          row[c] += direction;
      }
      if (s.kind == Kind::kEdge) {
        const T limit = 32 * std::numeric_limits<T>::epsilon();
        q[i] = i == 0;
        row[0] = i == 0 ? 1 : i == 1 ? limit * (1 + 2 * std::numeric_limits<T>::epsilon()) : 0;
      }
      if (s.kind == Kind::kBelow) {
        const T limit = 32 * std::numeric_limits<T>::epsilon();
        q[i] = i == s.d - 1;
        row[0] = i == s.d - 1 ? 1 : i == 0 ? limit * static_cast<T>(0.75) : 0;
      }
      if (s.kind == Kind::kNan) row[1] = static_cast<T>(std::nan(""));
    }
  }

  static size_t size(int rows, int columns) { return static_cast<size_t>(rows) * columns; }
};

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += a[i] * b[i];
  return sum;
}

template <typename T>
std::vector<std::vector<double>> columns_of(const check::Array<T>& matrix, int d, int count) {
  std::vector<std::vector<double>> columns(count, std::vector<double>(d));
  for (int c = 0; c < count; ++c)
    for (int i = 0; i < d; ++i)
      columns[c][i] = matrix[static_cast<size_t>(i) * count + c];
  return columns;
}

// What is left of `column` without `basis`.
std::vector<double> outside(std::vector<double> column, const std::vector<std::vector<double>>& basis) {
  for (int twice = 0; twice < 2; ++twice)
    for (const auto& other : basis) {
      const double along = dot(column, other);
      for (size_t i = 0; i < column.size(); ++i)
        column[i] -= along * other[i];
    }
  return column;
}

// The rule of the op, column by column.
int rank_of(const std::vector<std::vector<double>>& y, std::vector<std::vector<double>> basis, double eps) {
  int rank = 0;
  for (const auto& column : y) {
    std::vector<double> left = outside(column, basis);
    const double length = std::sqrt(dot(left, left));
    if (!(length > 32 * eps * std::sqrt(dot(column, column)))) continue;
    for (double& value : left)
      value /= length;
    basis.push_back(left);
    ++rank;
  }
  return rank;
}

template <typename T>
bool right(const Problem<T>& p, int64_t rank) {
  const auto [d, l, k, kind, misaligned] = p.shape;
  const double eps = std::numeric_limits<T>::epsilon();
  const auto y = columns_of(p.y, d, l), q = columns_of(p.q, d, k), z = columns_of(p.z, d, l);
  const int expected = rank_of(y, q, eps);
  // Rounding may hide the last directions of a steep matrix, and shows some that are exactly repeated never.
  const int slack = kind == Kind::kSteep ? 1 : 0;
  if (std::abs(static_cast<int>(rank) - expected) > slack) {
    std::printf("rank %d, expected %d\n", static_cast<int>(rank), expected);
    return false;
  }
  std::vector<std::vector<double>> kept(z.begin(), z.begin() + rank), both = q;
  both.insert(both.end(), kept.begin(), kept.end());
  double orthogonal = 0, spanned = 0, cleared = 0;
  for (int i = k; i < static_cast<int>(both.size()); ++i)
    for (int j = 0; j <= i; ++j)
      orthogonal = std::fmax(orthogonal, std::fabs(dot(both[i], both[j]) - (i == j)));
  for (int c = static_cast<int>(rank); c < l; ++c)
    cleared = std::fmax(cleared, dot(z[c], z[c]));
  for (const auto& column : y) {
    const double size = std::sqrt(dot(column, column));
    const auto left = outside(column, both);
    if (size > 0) spanned = std::fmax(spanned, std::sqrt(dot(left, left)) / size);
  }
  for (const auto& column : z)
    for (double value : column)
      if (std::isnan(value)) cleared = INFINITY;
  if (orthogonal <= 8 * eps && spanned <= 64 * eps && cleared == 0) return true;
  std::printf("orthogonality %.1f eps, span %.1f eps, dropped columns %.1e\n", orthogonal / eps,
              spanned / eps, cleared);
  return false;
}

template <typename T>
bool check_group(const char* name, const std::vector<Shape>& shapes) {
  std::mt19937_64 random(7);
  std::vector<Problem<T>> problems;
  std::vector<keeplora::OrthonormalizeProblem<T>> table;
  for (const Shape& shape : shapes) {
    const auto& p = problems.emplace_back(shape, random);
    table.push_back({p.y.data(), p.q.data(), p.z.data(), shape.d, shape.l, shape.k});
  }
  const int count = static_cast<int>(table.size());
  const check::Array<int64_t> rank = check::Array<int64_t>::filled(count, false, [](size_t) { return -1; });
  const check::Array<unsigned char> workspace = check::Array<unsigned char>::filled(
      keeplora::orthonormalize_workspace(table.data(), count), false, [](size_t) { return 0xff; });
  if (keeplora::orthonormalize(table.data(), count, rank.data(), workspace.data(), nullptr) != cudaSuccess) {
    std::printf("%s: %s\n", name, emulate::last_error().c_str());
    return false;
  }
  bool good = true;
  for (int i = 0; i < count; ++i)
    if (shapes[i].kind == Kind::kNan ? rank[i] < 0 || rank[i] > shapes[i].l : !right(problems[i], rank[i])) {
      std::printf("%s: problem %d\n", name, i);
      good = false;
    }
  return good;
}

// T alone takes 2^34 bytes.
bool check_workspace() {
  const keeplora::OrthonormalizeProblem<float> problem{nullptr, nullptr, nullptr, 1, 64, 1 << 26};
  const int64_t bytes = keeplora::orthonormalize_workspace(&problem, 1);
  if (bytes >= int64_t{1} << 34) return true;
  std::printf("a workspace of %lld bytes for 2^32 numbers\n", static_cast<long long>(bytes));
  return false;
}

}  // namespace

int main() {
  // Odd, empty, wider than high, no basis, full basis, unaligned; two panels;
  // two tiles of Q, of kept columns and of rows.
  const std::vector<Shape> ragged = {{33, 7, 5},
                                     {1, 1, 0},
                                     {6, 2, 6},
                                     {4, 7, 1},
                                     {0, 3, 0},
                                     {5, 0, 2},
                                     {40, 9, 10, Kind::kDependent},
                                     {30, 12, 3, Kind::kSteep},
                                     {21, 6, 0, Kind::kTwice},
                                     {40, 5, 0, Kind::kUncertain},
                                     {40, 5, 0, Kind::kDoubtful},
                                     {3, 1, 1, Kind::kEdge},
                                     {8, 1, 1, Kind::kBelow},
                                     {9, 3, 2, Kind::kNan},
                                     {25, 18, 4, Kind::kNormal, true}};
  const std::vector<Shape> large = {{80, 70, 2, Kind::kDependent, true}, {70, 3, 66}};
  // More problems than one launch takes, most of them empty.
  std::vector<Shape> many(520, {0, 0, 0});
  many[7] = many[200] = many[511] = many[519] = {5, 2, 1};
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 11});
    good = check_group<float>("ragged", ragged);
  }
  emulate::set_schedule({});
  emulate::one_tile_each = false;
  good = good && check_group<float>("done by one block", ragged);
  emulate::one_tile_each = true;
  good = good && check_group<double>("ragged, double", ragged) && check_group<float>("two panels", large) &&
         check_group<double>("two panels, double", {{50, 66, 18}}) &&
         check_group<float>("520 problems", many) && check_workspace();
  std::printf(good ? "orthonormalize: as the definition says\n" : "orthonormalize: WRONG\n");
  return good ? 0 : 1;
}
