// Inputs of the check programs: bases, and allocations of exact size: a sanitizer sees one element too far.
#pragma once
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace check {

// `count` elements in an allocation of their own; one more before them takes 16-byte alignment away.
template <typename T>
class Array {
 public:
  Array() = default;
  Array(size_t count, bool misaligned)
      : count_(count), skip_(misaligned ? 1 : 0), memory_(new T[count + skip_]) {}

  template <typename Make>
  static Array filled(size_t count, bool misaligned, Make&& make) {
    Array array(count, misaligned);
    for (size_t i = 0; i < count; ++i)
      array[i] = static_cast<T>(make(i));
    return array;
  }

  static Array normal(size_t count, bool misaligned, std::mt19937_64& random) {
    std::normal_distribution<double> draw;
    return filled(count, misaligned, [&](size_t) { return draw(random); });
  }

  T* data() const { return memory_.get() + skip_; }
  T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return count_; }

 private:
  size_t count_ = 0, skip_ = 0;
  std::unique_ptr<T[]> memory_;
};

// Zeros that take no memory before they are written: for arrays with more elements than an int can count.
template <typename T>
class Sparse {
 public:
  explicit Sparse(int64_t count) : bytes_(count * sizeof(T)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) std::abort();
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  ~Sparse() { munmap(data_, bytes_); }

  T* data() const { return static_cast<T*>(data_); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  size_t bytes_;
  void* data_;
};

// [d, k] with orthonormal columns, made in double.
inline std::vector<double> orthonormal_columns(int d, int k, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<double> columns;  // one after the other
  for (int c = 0; c < k; ++c) {
    std::vector<double> column(d);
    for (double& value : column)
      value = normal(random);
    for (int twice = 0; twice < 2; ++twice)
      for (int other = 0; other < c; ++other) {
        double dot = 0;
        for (int i = 0; i < d; ++i)
          dot += column[i] * columns[other * d + i];
        for (int i = 0; i < d; ++i)
          column[i] -= dot * columns[other * d + i];
      }
    double length = 0;
    for (double value : column)
      length += value * value;
    for (double& value : column)
      columns.push_back(value / std::sqrt(length));
  }
  std::vector<double> q(columns.size());
  for (int c = 0; c < k; ++c)
    for (int i = 0; i < d; ++i)
      q[static_cast<size_t>(i) * k + c] = columns[static_cast<size_t>(c) * d + i];
  return q;
}

// The same, always the same one.
inline std::vector<double> orthonormal_columns_of(int d, int k) {
  std::mt19937_64 random(1);
  return orthonormal_columns(d, k, random);
}

template <typename T>
Array<T> basis(int d, int k, bool misaligned, std::mt19937_64& random) {
  const std::vector<double> q = orthonormal_columns(d, k, random);
  return Array<T>::filled(q.size(), misaligned, [&](size_t i) { return q[i]; });
}

// x (I - Q Q^T), row by row in double.
template <typename T>
std::vector<double> complement(std::vector<double> x, const Array<T>& q, int rows, int d, int k) {
  for (int r = 0; r < rows; ++r) {
    std::vector<double> inside(k);
    for (int c = 0; c < k; ++c)
      for (int i = 0; i < d; ++i)
        inside[c] += x[static_cast<size_t>(r) * d + i] * q[static_cast<size_t>(i) * k + c];
    for (int i = 0; i < d; ++i)
      for (int c = 0; c < k; ++c)
        x[static_cast<size_t>(r) * d + i] -= inside[c] * q[static_cast<size_t>(i) * k + c];
  }
  return x;
}

// Largest difference; infinite for a NaN.
template <typename T>
double worst(const Array<T>& actual, const std::vector<double>& exact) {
  double worst = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double error = std::fabs(static_cast<double>(actual[i]) - exact[i]);
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
  return worst;
}

}  // namespace check
