// Counts what a kernel asks of memory: the compiler's calls for -fsanitize=thread, answered here and not by the
// race detector. Accesses of a warp's lanes at one place in the program, the same time around, are one request.
#include "counting/hooks.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"
#include "emulate/counts.h"

namespace counting {
namespace {

constexpr size_t kBlocks = 24;  // that may run at once: more than a cluster has
constexpr int kWarp = 32, kSector = 32, kBank = 4, kBanks = 32;

struct Range {
  uintptr_t begin, end;
};
struct Access {
  uintptr_t at;
  int bytes;
};
struct Request {
  bool shared, write;
  std::vector<Access> lanes;
};
struct Block {
  uint64_t number;
  std::unordered_map<uint64_t, Request> requests;  // by place, warp and time around
  std::unordered_map<uint64_t, unsigned> times;    // that a thread has been at a place
};

std::vector<Range> global, shared;
std::deque<Block> blocks;
Counts counts;
uint64_t launch = 0;
bool on = false;

bool within(const std::vector<Range>& ranges, uintptr_t at) {
  return std::any_of(ranges.rbegin(), ranges.rend(),
                     [at](const Range& r) { return r.begin <= at && at < r.end; });
}

// Distinct aligned pieces of `size` bytes that the lanes touch.
std::set<uintptr_t> pieces(const Request& request, int size) {
  std::set<uintptr_t> found;
  for (const auto [at, bytes] : request.lanes)
    for (uintptr_t piece = at / size; piece <= (at + bytes - 1) / size; ++piece)
      found.insert(piece);
  return found;
}

void close(const Request& request) {
  const size_t words = pieces(request, kBank).size();
  if (request.shared) {
    // Lanes are served in turns of 128 bytes' worth, each bank one word a turn.
    std::vector<size_t> per_bank(kBanks);
    for (const uintptr_t word : pieces(request, kBank))
      ++per_bank[word % kBanks];
    counts.wavefronts += *std::max_element(per_bank.begin(), per_bank.end());
    counts.ideal_wavefronts += (words + kBanks - 1) / kBanks;
    return;
  }
  const size_t sectors = pieces(request, kSector).size();
  (request.write ? counts.written_sectors : counts.read_sectors) += sectors;
  counts.ideal_sectors += (words * kBank + kSector - 1) / kSector;
  ++counts.requests;
}

Block& current() {
  const uint64_t number = launch << 40 | blockIdx.x;
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block)
    if (block->number == number) return *block;
  if (blocks.size() == kBlocks) {
    for (const auto& [_, request] : blocks.front().requests)
      close(request);
    blocks.pop_front();
  }
  blocks.push_back({number, {}, {}});
  return blocks.back();
}

uint64_t mix(uint64_t value, uint64_t more) {
  value = (value ^ more) * 0x9e3779b97f4a7c15u;
  return value ^ value >> 29;
}

void access(const void* pointer, int bytes, bool write, uint64_t place) {
  if (!on || bytes == 0) return;
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const bool in_shared = within(shared, at);
  if (!in_shared && !within(global, at)) return;  // registers, parameters, the emulator's own
  Block& block = current();
  const uint64_t kind = mix(place, write);
  const unsigned time = block.times[mix(kind, threadIdx.x)]++;
  Request& request = block.requests[mix(mix(kind, threadIdx.x / kWarp), time)];
  request.shared = in_shared, request.write = write;
  request.lanes.push_back({at, bytes});
}

uint64_t place_of(emulate::Site site, int salt) {
  return mix(reinterpret_cast<uint64_t>(site.file), static_cast<uint64_t>(site.line) * 16 + salt);
}

bool is_in(emulate::Site site, const char* name) {
  return std::strstr(site.file, name) != nullptr;
}

}  // namespace

void begin(const void* memory, size_t bytes) {
  global = {{reinterpret_cast<uintptr_t>(memory), reinterpret_cast<uintptr_t>(memory) + bytes}};
  counts = {};
  on = true;
}

Counts end() {
  on = false;
  for (const Block& block : blocks)
    for (const auto& [_, request] : block.requests)
      close(request);
  blocks.clear();
  shared.clear();
  ++launch;
  return counts;
}

}  // namespace counting

namespace emulate {

void count_copy(const void* to, const void* from, int bytes, int valid, Site site) {
  counting::access(from, valid, false, counting::place_of(site, bytes % 16 + 1));
  counting::access(to, bytes, true, counting::place_of(site, bytes % 16 + 2));
}

void count_gather(const void* mine, Site site) {
  if (counting::is_in(site, "ldmatrix.cuh")) {
    const void* row;
    std::memcpy(&row, mine, sizeof(row));
    counting::access(row, 16, false, counting::place_of(site, 0));
  }
  if (counting::is_in(site, "mma.cuh") && counting::on) ++counting::counts.product_lanes[site.line];
}

void count_shared(const void* memory, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  std::erase_if(counting::shared,
                [&](const counting::Range& r) { return r.begin < begin + bytes && begin < r.end; });
  counting::shared.push_back({begin, begin + bytes});
}

}  // namespace emulate

#define PLACE reinterpret_cast<uint64_t>(__builtin_return_address(0))
#define ACCESSES(N)                         \
  void __tsan_read##N(void* p) {            \
    counting::access(p, N, false, PLACE);   \
  }                                         \
  void __tsan_write##N(void* p) {           \
    counting::access(p, N, true, PLACE);    \
  }                                         \
  void __tsan_unaligned_read##N(void* p) {  \
    counting::access(p, N, false, PLACE);   \
  }                                         \
  void __tsan_unaligned_write##N(void* p) { \
    counting::access(p, N, true, PLACE);    \
  }                                         \
  void __tsan_volatile_read##N(void* p) {   \
    counting::access(p, N, false, PLACE);   \
  }                                         \
  void __tsan_volatile_write##N(void* p) {  \
    counting::access(p, N, true, PLACE);    \
  }
// Counters that blocks wait at are no traffic to speak of, and go uncounted.
#define ATOMICS(BITS, T)                                                                         \
  T __tsan_atomic##BITS##_load(const volatile T* a, int) {                                       \
    return *a;                                                                                   \
  }                                                                                              \
  void __tsan_atomic##BITS##_store(volatile T* a, T v, int) {                                    \
    *a = v;                                                                                      \
  }                                                                                              \
  T __tsan_atomic##BITS##_fetch_add(volatile T* a, T v, int) {                                   \
    const T before = *a;                                                                         \
    *a = before + v;                                                                             \
    return before;                                                                               \
  }                                                                                              \
  T __tsan_atomic##BITS##_fetch_or(volatile T* a, T v, int) {                                    \
    const T before = *a;                                                                         \
    *a = before | v;                                                                             \
    return before;                                                                               \
  }                                                                                              \
  T __tsan_atomic##BITS##_exchange(volatile T* a, T v, int) {                                    \
    const T before = *a;                                                                         \
    *a = v;                                                                                      \
    return before;                                                                               \
  }                                                                                              \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* a, T* expected, T v, int, int) { \
    if (*a == *expected) {                                                                       \
      *a = v;                                                                                    \
      return 1;                                                                                  \
    }                                                                                            \
    *expected = *a;                                                                              \
    return 0;                                                                                    \
  }                                                                                              \
  T __tsan_atomic##BITS##_compare_exchange_val(volatile T* a, T expected, T v, int, int) {       \
    const T before = *a;                                                                         \
    if (before == expected) *a = v;                                                              \
    return before;                                                                               \
  }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long n) {
  counting::access(p, static_cast<int>(n), false, PLACE);
}
void __tsan_write_range(void* p, unsigned long n) {
  counting::access(p, static_cast<int>(n), true, PLACE);
}
}
