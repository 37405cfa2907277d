// Arrays of any format for the check programs.
#pragma once
#include "checks/inputs.h"
#include "kernels/format.h"
#include "kernels/primitives/convert.cuh"

namespace check {

// `count` numbers in an allocation of their own, as check::Array; NaN until they are set.
class Numbers {
 public:
  Numbers(gpu::Format format, size_t count, bool misaligned) : format_(format) {
    const auto nan = [](size_t) { return NAN; };
    if (format == gpu::Format::kFloat32) single_ = Array<float>::filled(count, misaligned, nan);
    if (format == gpu::Format::kFloat64) double_ = Array<double>::filled(count, misaligned, nan);
    if (format == gpu::Format::kBfloat16 || format == gpu::Format::kFloat16)
      half_ = Array<uint16_t>::filled(count, misaligned, [](size_t) { return 0xffff; });
  }

  // Small multiples of 1/8, which are numbers of every format.
  static Numbers random(gpu::Format format, size_t count, bool misaligned, std::mt19937_64& random) {
    Numbers numbers(format, count, misaligned);
    for (size_t i = 0; i < count; ++i)
      numbers.set(i, (static_cast<int>(random() % 33) - 16) / 8.0);
    return numbers;
  }

  // Numbers of many bits, as many as the format has.
  static Numbers normal(gpu::Format format, size_t count, bool misaligned, std::mt19937_64& random) {
    Numbers numbers(format, count, misaligned);
    std::normal_distribution<double> draw;
    for (size_t i = 0; i < count; ++i)
      numbers.set(i, draw(random));
    return numbers;
  }

  void set(size_t i, double x) const {
    switch (format_) {
      case gpu::Format::kFloat32:
        single_[i] = static_cast<float>(x);
        break;
      case gpu::Format::kFloat64:
        double_[i] = x;
        break;
      case gpu::Format::kBfloat16:
        half_[i] = gpu::narrow<gpu::Bfloat16>(x).bits;
        break;
      default:
        half_[i] = gpu::narrow<gpu::Float16>(x).bits;
    }
  }

  double operator[](size_t i) const { return gpu::load<double>(data(), format_, static_cast<int64_t>(i)); }

  void* data() const {
    switch (format_) {
      case gpu::Format::kFloat32:
        return single_.data();
      case gpu::Format::kFloat64:
        return double_.data();
      default:
        return half_.data();
    }
  }

  gpu::Format format() const { return format_; }

 private:
  gpu::Format format_;
  Array<float> single_;
  Array<double> double_;
  Array<uint16_t> half_;
};

}  // namespace check
