// Runs one thread block at a time: a context per CUDA thread, on one CPU thread. A CUDA thread runs until it
// waits (barrier, warp collective) or exits; which one runs next is the schedule's choice.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace emulate {

// Where in the kernel's source a thread waits.
struct Site {
  const char* file = "";
  int line = 0;
};

// Who runs next among the threads that can. Each thread runs as far as it can, so warps drift far apart: in
// lock step a missing barrier would go unnoticed.
enum class Order {
  kSequential,  // lowest thread first
  kReversed,    // highest thread first
  kRandom,      // random ranks for warps and for lanes, redrawn now and then
};

struct Schedule {
  Order order = Order::kSequential;
  uint64_t seed = 0;
};

// The schedule of the launches that follow.
void set_schedule(Schedule schedule);

// What was wrong with the last launch, "" if nothing. A launch that failed left its threads where they were.
const std::string& last_error();

// Runs `threads` CUDA threads that each call body(argument), with threadIdx set from the block's shape. False
// when something was wrong.
bool run_block(int threads, size_t shared_bytes, void (*body)(void*), void* argument);

// ---- called by CUDA threads
// -----------------------------------------------------------------------------------
int lane();
void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);
uint64_t shuffle_bits(unsigned mask, uint64_t bits, int source, Site site);

// Every lane's `bytes` bytes, one lane after the other: for instructions in which lanes exchange many values.
// All 32 lanes must call; the result is valid until this lane's next collective.
const unsigned char* gather(const void* mine, size_t bytes, Site site);

// An asynchronous copy that this thread has issued. The calls of primitives/async.cuh do the reading and
// writing themselves, so that sanitizers see them in the thread's name.
struct Copy {
  void* to;
  const void* from;
  int bytes, valid;  // the bytes from `valid` on become zero
};
void issue_copy(const Copy& copy, Site site);
void commit_copies();
// The next copy, taken out, of the groups that may no longer be pending when only the last `left` may; false
// if none.
bool next_copy(int left, Copy* copy);

// A counter through which blocks order themselves. Blocks run one after the other here, so a target not yet
// reached is never reached.
void announce(unsigned* counter);
void await(const unsigned* counter, unsigned target, Site site);

// Ends the launch with this message.
[[noreturn]] void fail(const char* what, Site site);

// The index-th shared array of this block: NaN bytes at first, with guards before and behind it.
void* take_shared(size_t index, size_t bytes);

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulate
