// Runs the blocks of a grid one after another (those of a cluster together): a context per CUDA thread, on
// one CPU thread. A CUDA thread runs until it waits (barrier, warp collective) or exits; which one runs next
// is the schedule's choice.
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
  kRandom,      // random ranks for warps and for lanes, redrawn now and then; blocks in random order too
};

struct Schedule {
  Order order = Order::kSequential;
  uint64_t seed = 0;
  // The race detector takes a block to begin after the one before has ended, and sees races inside one only.
  bool blocks_ordered = false;
  // Of a grid that is too large to run, only as many blocks, its last; in order, and such as await no others. 0: all.
  unsigned last_blocks = 0;
};

// The schedule of the launches that follow.
void set_schedule(Schedule schedule);

// What was wrong with the last launch, "" if nothing. A launch that failed left its threads where they were.
const std::string& last_error();

struct Grid {
  unsigned blocks = 1;
  unsigned cluster = 1;           // blocks that run together
  unsigned shape[3] = {1, 1, 1};  // of a block
  size_t shared_bytes = 0;
};

// Runs body(argument) as every CUDA thread of the grid. False when something was wrong.
bool run_grid(const Grid& grid, void (*body)(void*), void* argument);

// ---- called by CUDA threads
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
// The next copy, taken out, of the groups that may no longer be pending when only the last `left` may;
// false if none.
bool next_copy(int left, Copy* copy);

// Order between blocks: one that awaits sleeps until another has announced something. A block that awaits n
// announcements is ordered behind the first n alone, so one that awaits too few has a race with the others,
// although blocks run one after another and all of them have been made.
void add_announcement(unsigned* counter);
void acquire_announcements(const unsigned* counter, unsigned target, Site site);
void announced();

// Whether workers (primitives/jobs.cuh) leave after a tile, all but the last: else the first block does everything.
inline bool one_tile_each = true;
void wait_for_announcement(const unsigned* counter, unsigned target, Site site);

// Clusters. The same array in the shared memory of another block of the cluster:
void cluster_barrier(Site site);
unsigned cluster_rank();
void* cluster_address(void* mine, unsigned rank, Site site);

// An mbarrier's word, and copies by the asynchronous engine that count down its bytes.
void mbarrier_init(uint64_t* word, unsigned count, Site site);
void mbarrier_arrive(uint64_t* word, unsigned expected_bytes, Site site);
void mbarrier_wait(uint64_t* word, unsigned parity, Site site);
void issue_bulk_copy(void* to, const void* from, int bytes, uint64_t* mbarrier, Site site);

// Ends the launch with this message.
[[noreturn]] void fail(const char* what, Site site);

// The index-th shared array of this block: NaN bytes at first, with guards before and behind it. On the GPU
// it takes `reserved` bytes, at least its size.
void* take_shared(size_t index, size_t bytes, size_t reserved);

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
