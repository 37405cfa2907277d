// One source for every CPU, with vectors as wide as it has: `Body::run<kBytes>(args...)` is compiled for x86
// with vectors of 16 bytes, for AVX2 with 32, and for AVX-512, which has twice the registers, with 64.
// Elsewhere, and with other compilers, once: for the CPU the compiler was told of, with 16. (Vectors that a
// CPU has not are made of several, through memory: 20 times slower.)
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#define KEEPLORA_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KEEPLORA_X86 1
#if defined(__linux__) && __GNUC__ >= 11
#define KEEPLORA_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace keeplora::cpu {

template <typename T, int kBytes>
struct WideOf;
#define KEEPLORA_WIDE(T, ALIGNED, BYTES)                                             \
  template <>                                                                        \
  struct WideOf<T, BYTES> {                                                          \
    typedef T type __attribute__((vector_size(BYTES), aligned(ALIGNED), may_alias)); \
  }
KEEPLORA_WIDE(float, 4, 16);
KEEPLORA_WIDE(float, 4, 32);
KEEPLORA_WIDE(float, 4, 64);
KEEPLORA_WIDE(double, 8, 16);
KEEPLORA_WIDE(double, 8, 32);
KEEPLORA_WIDE(double, 8, 64);
KEEPLORA_WIDE(uint32_t, 2, 16);  // also two 16-bit numbers each
KEEPLORA_WIDE(uint32_t, 2, 32);
KEEPLORA_WIDE(uint32_t, 2, 64);
KEEPLORA_WIDE(int32_t, 4, 16);
KEEPLORA_WIDE(int32_t, 4, 32);
KEEPLORA_WIDE(int32_t, 4, 64);
KEEPLORA_WIDE(uint16_t, 2, 8);
KEEPLORA_WIDE(uint16_t, 2, 16);
KEEPLORA_WIDE(uint16_t, 2, 32);
#undef KEEPLORA_WIDE
// As many T as fill kBytes, wherever a T may lie. Never passed by value: functions that do would be others
// with every instruction set.
template <typename T, int kBytes>
using Wide = typename WideOf<T, kBytes>::type;

struct Bfloat16 {
  uint16_t bits;
};

// `to` = the numbers from `from` on.
template <int kBytes, typename T>
KEEPLORA_INLINE void load(Wide<T, kBytes>& to, const T* from) {
  to = *reinterpret_cast<const Wide<T, kBytes>*>(from);  // no memcpy: GCC splits one of 32 bytes
}
template <int kBytes>
KEEPLORA_INLINE void load(Wide<float, kBytes>& to, const Bfloat16* from) {
  using Bits = Wide<uint32_t, kBytes>;
  const Wide<uint16_t, kBytes / 2> half = *reinterpret_cast<const Wide<uint16_t, kBytes / 2>*>(from);
  const Bits bits = __builtin_convertvector(half, Bits) << 16;
  to = (Wide<float, kBytes>)bits;
}

// Rounds to nearest, ties to even; a NaN stays one.
template <int kBytes, typename T>
KEEPLORA_INLINE void store(T* to, const Wide<T, kBytes>& from) {
  *reinterpret_cast<Wide<T, kBytes>*>(to) = from;
}
template <int kBytes>
KEEPLORA_INLINE void store(Bfloat16* to, const Wide<float, kBytes>& from) {
  using Bits = Wide<uint32_t, kBytes>;
  using Half = Wide<uint16_t, kBytes / 2>;
  Bits bits = (Bits)from;
  const Bits magnitude = bits & 0x7fffffff;
  const Wide<int32_t, kBytes> above = magnitude > 0x7f800000;
  const Bits nan = (Bits)above;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = (bits & ~nan) | (nan & 0x7fc0);
  *reinterpret_cast<Half*>(to) = __builtin_convertvector(bits, Half);
}

// What tests have lowered the level to.
inline std::atomic<int> level_limit{4};

#ifdef KEEPLORA_AMX
// Whether the CPU multiplies tiles of bfloat16 and the system lets this process: it saves 8 KB more for each
// of its threads then, so it has to be asked.
inline bool has_tiles() {
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}
#else
inline bool has_tiles() {
  return false;
}
#endif

// What kernels may use: 0 SSE2 or no x86, 1 AVX2, 2 AVX-512, 3 AVX-512 with products of bfloat16, 4 AMX, too.
inline int level() {
#ifdef KEEPLORA_X86
  static const int here = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
      return 1;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return has_tiles() ? 4 : 3;
  }();
  return std::min(here, level_limit.load(std::memory_order_relaxed));
#else
  return 0;
#endif
}

// Bytes of the vectors that on_this_cpu takes.
inline int vector_bytes() {
  return level() >= 2 ? 64 : level() == 1 ? 32 : 16;
}

#ifdef KEEPLORA_X86
template <typename Body, typename... Args>
__attribute__((target("avx2,fma"))) void run_avx2(const Args&... args) {
  Body::template run<32>(args...);
}
template <typename Body, typename... Args>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void run_avx512(const Args&... args) {
  Body::template run<64>(args...);
}
#endif

// Body::run with vectors of `bytes`, which is vector_bytes() at some moment.
template <typename Body, typename... Args>
void on_this_cpu(int bytes, const Args&... args) {
#ifdef KEEPLORA_X86
  if (bytes == 64) return run_avx512<Body>(args...);
  if (bytes == 32) return run_avx2<Body>(args...);
#endif
  static_cast<void>(bytes);
  Body::template run<16>(args...);
}

// Uninitialised memory that begins at a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new (kLine) T[static_cast<size_t>(size)]) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* data) const { operator delete[](data, kLine); }
  };
  std::unique_ptr<T[], Free> data_;
};

}  // namespace keeplora::cpu
