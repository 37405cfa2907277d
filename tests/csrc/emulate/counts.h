// What a counting build is told besides loads and stores (counting/hooks.cpp). In other builds nothing is.
#pragma once
#include <cstddef>

#include "emulate/block.h"

namespace emulate {

#ifdef EMULATE_COUNTED
// A copy whose bytes do not pass through the thread's registers.
void count_copy(const void* to, const void* from, int bytes, int valid, Site site);
// What a lane gave to an instruction of its warp.
void count_gather(const void* mine, Site site);
// Shared memory of a block: from where on, how much.
void count_shared(const void* memory, size_t bytes);
// What carries out a copy is the emulator's own doing.
#define EMULATE_COPYING __attribute__((no_sanitize("thread")))
#else
inline void count_copy(const void*, const void*, int, int, Site) {}
inline void count_gather(const void*, Site) {}
inline void count_shared(const void*, size_t) {}
#define EMULATE_COPYING
#endif

}  // namespace emulate
