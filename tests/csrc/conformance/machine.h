// What differs between a GPU and the emulator for a program that launches kernels: memory, waiting, errors.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/launch.h"

namespace conformance {

#ifdef KEEPLORA_EMULATE

inline void* allocate(size_t bytes) {
  return ::operator new(bytes);
}
inline void release(void* memory) {
  ::operator delete(memory);
}
inline void copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
// "" when every launch so far has ended well.
inline std::string problem(cudaError_t launched) {
  return launched == cudaSuccess ? "" : "the launch failed: " + emulate::last_error();
}
inline int compute_capability() {
  return 100;
}
inline std::string name() {
  return "the emulator";
}

#else

inline void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("conformance: %s\n", cudaGetErrorString(error));
  std::exit(2);
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, bytes));
  return memory;
}
inline void release(void* memory) {
  cudaFree(memory);
}
inline void copy(void* to, const void* from, size_t bytes) {
  require(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
inline std::string problem(cudaError_t launched) {
  const cudaError_t error = launched == cudaSuccess ? cudaDeviceSynchronize() : launched;
  return error == cudaSuccess ? "" : std::string("the launch failed: ") + cudaGetErrorString(error);
}
inline cudaDeviceProp properties() {
  cudaDeviceProp found{};
  require(cudaGetDeviceProperties(&found, 0));
  return found;
}
inline int compute_capability() {
  return 10 * properties().major + properties().minor;
}
inline std::string name() {
  return properties().name;
}

#endif

// Device memory of exactly this size, so that a sanitizer sees an access beyond it.
template <typename T>
class Memory {
 public:
  explicit Memory(const std::vector<T>& values)
      : count_(values.size()), memory_(allocate(count_ * sizeof(T)), release) {
    copy(memory_.get(), values.data(), count_ * sizeof(T));
  }
  T* get() const { return static_cast<T*>(memory_.get()); }
  std::vector<T> values() const {
    std::vector<T> found(count_);
    copy(found.data(), memory_.get(), count_ * sizeof(T));
    return found;
  }

 private:
  size_t count_;
  std::unique_ptr<void, void (*)(void*)> memory_;
};

// Where two results differ first, "" if nowhere.
template <typename T>
std::string difference(const std::vector<T>& found, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (i >= found.size() || !(found[i] == expected[i]))
      return "element " + std::to_string(i) + " is " +
             (i < found.size() ? std::to_string(found[i]) : "missing") + ", must be " +
             std::to_string(expected[i]);
  return "";
}

}  // namespace conformance
