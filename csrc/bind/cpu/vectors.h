// Vectors of 32 bytes for the kernels of the CPU, and how one source serves every x86 CPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

// The function is compiled twice for x86, and the loader takes the second where the CPU has AVX and FMA. By
// that feature and not by "arch=x86-64-v3", which GCC 11 does not know. Elsewhere, and with other compilers,
// once: for the CPU the compiler was told of. A test defines it as nothing, to run the first everywhere.
#if defined(KEEPLORA_EVERY_CPU)
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define KEEPLORA_EVERY_CPU __attribute__((target_clones("default", "fma")))
#else
#define KEEPLORA_EVERY_CPU
#endif
#define KEEPLORA_INLINE inline __attribute__((always_inline))

namespace keeplora::cpu {

constexpr int kVectorBytes = 32;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// By reference: a function that returns a vector would be another one with every instruction set.
template <typename T>
KEEPLORA_INLINE const Vector<T>& vector_at(const T* data) {
  return *reinterpret_cast<const Vector<T>*>(data);
}
template <typename T>
KEEPLORA_INLINE Vector<T>& vector_at(T* data) {
  return *reinterpret_cast<Vector<T>*>(data);
}

// Uninitialised memory that begins at a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new (kLine) T[static_cast<size_t>(size)]) {}
  T* get() { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* data) const { operator delete[](data, kLine); }
  };
  std::unique_ptr<T[], Free> data_;
};

}  // namespace keeplora::cpu
