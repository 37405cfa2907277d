// Many problems of different shapes in one launch: a table of them travels in the kernel's parameters, so
// nothing is copied to the device and a captured CUDA graph keeps it.
#pragma once
#include <cstdint>

#include "kernels/device.cuh"

namespace gpu {

template <typename Entry, int kCapacity>
struct Table {
  Entry entry[kCapacity];
  int count;
};

// Entries of the largest table. A kernel may have 32,764 bytes of parameters; a few hold other things.
template <typename Entry>
constexpr int kTableCapacity = (32764 - 128) / sizeof(Entry);

// Every launch copies all of its parameters, so calls with few problems take a small table.
constexpr int kSmallTable = 96;

// The entry whose tiles include `tile`. kFirst names the member that counts the tiles of all entries before.
template <auto kFirst, typename Entry, int kCapacity>
__device__ int entry_of_tile(const Table<Entry, kCapacity>& table, int tile) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entry[middle].*kFirst <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Device memory handed out array by array. Without memory it only counts: what a first run over the same
// calls needed is what a second one must be given.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + taken_) : nullptr;
    taken_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    needed_ = taken_ > needed_ ? taken_ : needed_;
    return array;
  }
  void reuse() { taken_ = 0; }
  bool counts_only() const { return memory_ == nullptr; }
  int64_t needed() const { return needed_; }

 private:
  unsigned char* memory_ = nullptr;
  int64_t taken_ = 0, needed_ = 0;
};

}  // namespace gpu
