// merge_weights on exact-size allocations, against double precision from the definition,
// under several schedules.
#include <cstdio>

#include "checks/formats.h"
#include "emulate/block.h"
#include "kernels/merge_weights.h"

namespace {

using check::Numbers;
using gpu::Format;

constexpr Format kF32 = Format::kFloat32, kF64 = Format::kFloat64, kBf16 = Format::kBfloat16,
                 kF16 = Format::kFloat16;

struct Shape {
  int rows, cols, r, gap;  // gap: elements between the rows of W
  Format w, a, b, out;
  bool misaligned;
};

// Relative to a number of the format.
double rounding(Format format) {
  return format == kBf16 ? 0x1p-8 : format == kF16 ? 0x1p-11 : format == kF32 ? 0x1p-24 : 0x1p-53;
}

template <typename T>
bool check_group(const char* name, const std::vector<Shape>& shapes) {
  std::mt19937_64 random(9);
  std::vector<Numbers> w, a, b, origin, out;
  std::vector<keeplora::MergeWeightsProblem<T>> table;
  for (const auto& [rows, cols, r, gap, w_format, a_format, b_format, out_format, misaligned] : shapes) {
    const size_t last = rows > 0 ? static_cast<size_t>(rows - 1) * (cols + gap) + cols : 0;
    w.push_back(Numbers::random(w_format, last, misaligned, random));
    a.push_back(Numbers::random(a_format, static_cast<size_t>(r) * cols, misaligned, random));
    b.push_back(Numbers::random(b_format, static_cast<size_t>(rows) * r, misaligned, random));
    out.emplace_back(out_format, static_cast<size_t>(rows) * cols, misaligned);
    // Every other one has an origin, in a format of its own now and then.
    const bool has = table.size() % 2 == 1;
    const Format origin_format = table.size() % 4 == 1 ? b_format : a_format;
    origin.push_back(Numbers::random(origin_format, static_cast<size_t>(rows) * r, misaligned, random));
    table.push_back({w.back().data(), a.back().data(), b.back().data(), has ? origin.back().data() : nullptr,
                     out.back().data(), cols + gap, rows, cols, r, static_cast<T>(0.3 * (1 + table.size())),
                     w_format, a_format, b_format, origin_format, out_format});
  }
  if (keeplora::merge_weights(table.data(), static_cast<int>(table.size()), nullptr) != cudaSuccess) {
    std::printf("%s: %s\n", name, emulate::last_error().c_str());
    return false;
  }
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Shape& shape = shapes[i];
    for (int row = 0; row < shape.rows; ++row)
      for (int column = 0; column < shape.cols; ++column) {
        double exact = 0;
        for (int k = 0; k < shape.r; ++k) {
          const size_t at = static_cast<size_t>(row) * shape.r + k;
          exact += (b[i][at] - (table[i].origin != nullptr ? origin[i][at] : 0.0)) *
                   a[i][static_cast<size_t>(k) * shape.cols + column];
        }
        exact = w[i][static_cast<size_t>(row) * (shape.cols + shape.gap) + column] +
                static_cast<double>(table[i].scale) * exact;
        const double actual = out[i][static_cast<size_t>(row) * shape.cols + column];
        // The sum over k is exact; its product with the scale and the sum with W are rounded to T, and that
        // to the output's format.
        const double allowed = 1.01 * rounding(shape.out) * std::fabs(exact) +
                               2 * rounding(sizeof(T) == 4 ? kF32 : kF64) * (std::fabs(exact) + 2);
        if (!(std::fabs(actual - exact) <= allowed)) {
          std::printf("%s, problem %zu, element (%d, %d): %.9g, exact %.9g\n", name, i, row, column, actual,
                      exact);
          return false;
        }
      }
  }
  return true;
}

// Numbers of many bits: what the kernel keeps of them, in every format of the result. The formats differ in which
// products they are worth.
bool check_precision() {
  std::mt19937_64 random(4);
  const int rows = 40, cols = 72, r = 33;
  bool good = true;
  for (const Format out_format : {kF32, kF16, kBf16}) {
    const auto w = Numbers::normal(kF32, rows * cols, false, random);
    const auto a = Numbers::normal(kF32, r * cols, false, random),
               b = Numbers::normal(kF32, rows * r, false, random);
    const Numbers out(out_format, rows * cols, false);
    const keeplora::MergeWeightsProblem<float> problem{w.data(), a.data(), b.data(), nullptr, out.data(),
                                                       cols,     rows,     cols,     r,       0.1f,
                                                       kF32,     kF32,     kF32,     kF32,    out_format};
    if (keeplora::merge_weights(&problem, 1, nullptr) != cudaSuccess) return false;
    double worst = 0, most = 0;
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < cols; ++column) {
        double exact = 0, sizes = 0;
        for (int k = 0; k < r; ++k) {
          const double term = b[row * r + k] * a[k * cols + column];
          exact += term, sizes += std::fabs(term);
        }
        exact = w[row * cols + column] + 0.1f * exact;
        const double error = std::fabs(out[row * cols + column] - exact);
        const double product =
            out_format == kBf16 ? 0x1p-10 * 0.1 * sizes : 0x1p-21 * (0.1 * sizes + std::fabs(exact));
        worst = std::fmax(worst, error - 1.01 * rounding(out_format) * std::fabs(exact) - product);
        most = std::fmax(most, error);
      }
    if (!(worst <= 0)) {
      std::printf("many bits, format %d: error up to %.2e, which rounding does not explain\n",
                  static_cast<int>(out_format), most);
      good = false;
    }
  }
  return good;
}

// The last tile of a weight with more elements than an int counts; and tiles that no grid has room for.
bool check_large() {
  const int rows = 70000, cols = 40000, tile_row = rows / 64 * 64, tile_column = cols - 64;
  const int64_t pitch = cols + 4;
  const check::Sparse<float> w(rows * pitch), out(int64_t{rows} * cols), b(rows), a(cols);
  for (int row = tile_row; row < rows; ++row) {
    b[row] = static_cast<float>(row - tile_row + 1);
    for (int column = tile_column; column < cols; ++column)
      w[row * pitch + column] = static_cast<float>(row + column);
  }
  for (int column = tile_column; column < cols; ++column)
    a[column] = static_cast<float>(column - tile_column + 1);
  keeplora::MergeWeightsProblem<float> problem{w.data(), a.data(), b.data(), nullptr, out.data(),
                                               pitch,    rows,     cols,     1,       1.0f,
                                               kF32,     kF32,     kF32,     kF32,    kF32};
  emulate::set_schedule({.last_blocks = 1});
  const bool launched = keeplora::merge_weights(&problem, 1, nullptr) == cudaSuccess;
  emulate::set_schedule({});
  for (int row = tile_row; launched && row < rows; ++row)
    for (int column = tile_column; column < cols; ++column) {
      const float exact = static_cast<float>(row + column) +
                          static_cast<float>((row - tile_row + 1) * (column - tile_column + 1));
      if (out[int64_t{row} * cols + column] == exact) continue;
      std::printf("large, element (%d, %d): %.9g, exact %.9g\n", row, column,
                  out[int64_t{row} * cols + column], exact);
      return false;
    }
  problem.rows = problem.cols = 1 << 30;
  const bool refused = keeplora::merge_weights(&problem, 1, nullptr) == cudaErrorInvalidValue;
  if (launched && refused) return true;
  std::printf("large: %s, 2^48 tiles %s\n", emulate::last_error().c_str(), refused ? "refused" : "taken");
  return false;
}

}  // namespace

int main() {
  // Several tiles in each direction, several steps and more than the stages of depth, every format of every
  // array, with rows that begin at 16 bytes and rows that do not.
  const std::vector<Shape> ragged = {
      {70, 130, 7, 0, kF32, kF32, kF32, kBf16, false}, {5, 72, 16, 24, kBf16, kF32, kF32, kBf16, false},
      {3, 69, 100, 3, kF16, kF32, kF32, kF16, false},  {9, 68, 1, 0, kF32, kBf16, kF16, kF32, true},
      {1, 1, 1, 0, kBf16, kF32, kF32, kF32, false},    {17, 66, 0, 2, kF32, kF32, kF32, kF64, false},
      {0, 5, 2, 0, kF32, kF32, kF32, kF32, false},     {6, 0, 2, 0, kF16, kF32, kF32, kF32, false},
      {66, 64, 40, 0, kF32, kF32, kF32, kF32, true},   {4, 8, 3, 5, kF16, kF16, kBf16, kF16, true}};
  const std::vector<Shape> wide = {{18, 70, 33, 0, kF64, kF64, kF64, kF64, false},
                                   {5, 66, 3, 2, kF32, kF64, kBf16, kF16, false},
                                   {7, 12, 2, 0, kF64, kF32, kF32, kBf16, true},
                                   {7, 12, 0, 4, kF16, kF64, kF32, kF32, false}};
  bool good = true;
  for (int order = 0; order < 3 && good; ++order) {
    emulate::set_schedule({static_cast<emulate::Order>(order), 5});
    good = check_group<float>("sums in float", ragged) && check_group<double>("sums in double", wide);
  }
  // More problems than one launch takes, most of them empty.
  std::vector<Shape> many(450, {0, 3, 1, 0, kF32, kF32, kF32, kF32, false});
  for (size_t i = 29; i < many.size(); i += 30)
    many[i].rows = 2;
  good = good && check_group<float>("450 problems", many) && check_precision() && check_large();
  std::printf(good ? "merge_weights: as the definition says\n" : "merge_weights: WRONG\n");
  return good ? 0 : 1;
}
