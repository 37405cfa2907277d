// What a launch asks of memory and of the tensor cores.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>

namespace counting {

struct Counts {
  uint64_t requests = 0;                           // of a warp to global memory
  uint64_t read_sectors = 0, written_sectors = 0;  // of 32 bytes, that they touch
  uint64_t ideal_sectors = 0;                      // that as many bytes fit in
  uint64_t wavefronts = 0, ideal_wavefronts = 0;   // of shared memory
  std::map<int, uint64_t> product_lanes;           // by the line in mma.cuh
};

// Count from now on; `memory` is what the launch may find in global memory.
void begin(const void* memory, size_t bytes);
Counts end();

}  // namespace counting
