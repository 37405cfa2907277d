// What asynchronous copies do to memory, compiled with the kernels so that sanitizers see every access in the
// name of the thread that issued the copy.
//
// The hardware moves the bytes at any time between issue and wait. Both ends are therefore accesses: at the
// issue the destination becomes NaN and the source is read for nothing, at the wait the bytes are copied.
#pragma once
#include <cstdint>

#include "emulate/block.h"
#include "emulate/counts.h"

namespace emulate {

// Word by word, so that a race detector remembers every part of the range.
EMULATE_COPYING inline void read_and_forget(const void* from, int bytes) {
  const auto* words = static_cast<const volatile uint32_t*>(from);
  for (int i = 0; i < bytes / 4; ++i)
    static_cast<void>(words[i]);
  const auto* rest = static_cast<const volatile unsigned char*>(from);
  for (int i = bytes / 4 * 4; i < bytes; ++i)
    static_cast<void>(rest[i]);
}

EMULATE_COPYING inline void fill_with_nan(void* to, int bytes) {
  auto* words = static_cast<volatile uint32_t*>(to);
  for (int i = 0; i < bytes / 4; ++i)
    words[i] = ~uint32_t{0};
}

EMULATE_COPYING inline void carry_out(const Copy& copy) {
  auto* words = static_cast<volatile uint32_t*>(copy.to);
  const auto* from = static_cast<const volatile uint32_t*>(copy.from);
  for (int i = 0; i < copy.bytes / 4; ++i) {
    uint32_t word = 0;
    if (4 * i + 4 <= copy.valid) {
      word = from[i];
    } else {
      const auto* rest = static_cast<const volatile unsigned char*>(copy.from);
      for (int j = 0; 4 * i + j < copy.valid; ++j)
        word |= static_cast<uint32_t>(rest[4 * i + j]) << 8 * j;
    }
    words[i] = word;
  }
}

inline void start_copy(const Copy& copy, Site site) {
  if (reinterpret_cast<uintptr_t>(copy.to) % copy.bytes != 0 ||
      reinterpret_cast<uintptr_t>(copy.from) % copy.bytes != 0)
    fail("asynchronous copy between addresses that are no multiples of its size", site);
  if (copy.valid < 0 || copy.valid > copy.bytes) fail("asynchronous copy of more bytes than it has", site);
  count_copy(copy.to, copy.from, copy.bytes, copy.valid, site);
  read_and_forget(copy.from, copy.valid);
  fill_with_nan(copy.to, copy.bytes);
  issue_copy(copy, site);
}

inline void start_bulk_copy(void* to, const void* from, int bytes, uint64_t* mbarrier, Site site) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 ||
      bytes % 16 != 0)
    fail("bulk copy whose addresses or size are no multiples of 16 bytes", site);
  count_copy(to, from, bytes, bytes, site);
  read_and_forget(from, bytes);
  fill_with_nan(to, bytes);
  issue_bulk_copy(to, from, bytes, mbarrier, site);
}

inline void finish_copies(int left) {
  for (Copy copy; next_copy(left, &copy);)
    carry_out(copy);
}

}  // namespace emulate
