// Matrices of 16-bit numbers from shared memory, dealt out to the lanes as the products of mma.cuh want them.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/launch.h"
#ifndef KEEPLORA_EMULATE
#include "kernels/primitives/async.cuh"  // shared_address
#endif

namespace gpu {

// Loads four 8 x 8 matrices. Lane l gives the address of row l % 8 of matrix l / 8: 8 numbers, aligned to 16
// bytes. Of matrix i it receives into to[i] the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or with
// kTransposed those of column l / 4. All 32 lanes must call.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef KEEPLORA_EMULATE
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    emulate::fail("a row of a matrix is not aligned to 16 bytes", EMULATE_SITE);
  const auto* rows =
      reinterpret_cast<const uint16_t* const*>(emulate::gather(&row, sizeof(row), EMULATE_SITE));
  const int lane = emulate::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int other = 2 * (lane % 4) + j;
      pair[j] = kTransposed ? rows[8 * i + other][lane / 4] : rows[8 * i + lane / 4][other];
    }
    std::memcpy(&to[i], pair, sizeof(pair));
  }
#else
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

}  // namespace gpu
