// The CUDA threads of the blocks that run together, and which of them runs next. For block.cpp, warp.cpp and
// copies.cpp only; kernels see block.h.
#pragma once
#include <array>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulate/block.h"
#include "emulate/context.h"

namespace emulate {

constexpr int kWarp = 32;

enum class State { kReady, kAtBarrier, kAtClusterBarrier, kInWarp, kAwaiting, kAtMbarrier, kDone };
enum class Collective { kSync, kBallot, kShuffle, kGather };

struct Block;

struct Thread {
  Context* context = nullptr;
  Block* block = nullptr;
  int index = 0;  // in its block
  State state = State::kDone;
  Site site;
  // The warp collective this thread waits in.
  Collective collective = Collective::kSync;
  unsigned mask = 0;
  uint64_t bits = 0;  // in: its contribution; out: its result
  int source = 0;
  const void* gives = nullptr;
  size_t bytes = 0;
  // Asynchronous copies not yet waited for, and how many of them each committed group ends after.
  std::deque<Copy> copies;
  std::deque<size_t> group_ends;
  const void* mbarrier = nullptr;  // the one this thread waits at
  // How many block, cluster and warp barriers it has come to; the race detector's tags take turns.
  unsigned barriers = 0, cluster_barriers = 0, warp_barriers = 0;
};

struct SharedArray {
  unsigned char* memory;  // with guards on both sides
  size_t bytes;
};

// Made anew for each block, so that what orders the threads of one block never orders another's.
struct Block {
  unsigned number = 0, rank = 0;  // in the grid, in its cluster
  Thread* threads = nullptr;
  int count = 0, live = 0, waiting = 0;
  size_t shared_limit = 0, shared_taken = 0;
  std::vector<SharedArray> shared;
  // By warp:
  std::vector<int> in_collective, exited;  // lanes
  std::vector<std::vector<unsigned char>> gathered;
  std::array<char, 2> barrier_tags = {};
  std::vector<std::array<char, 2>> warp_tags;

  ~Block();
};

// The blocks that run together: one, or a cluster.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0, waiting = 0;
  std::array<char, 2> barrier_tags = {};
};

extern std::vector<Thread> threads;  // of all blocks that run together
extern std::unique_ptr<Cluster> cluster;

Thread& running();

// Makes a waiting thread ready.
void wake(Thread& thread);

// Gives up the CPU until the running thread is ready. Its state says what it waits for.
void yield();

// Ends the launch from inside a CUDA thread: the host goes on, the other threads never do, and nothing on
// their stacks is destroyed (so the text is taken by value).
[[noreturn]] void stop(std::string what);

// Runs the threads, which are set up except for their contexts, until all are done. `set` chooses among the
// sets of contexts: neighbouring blocks use different ones, or two threads would be one to the race detector.
void run_threads(unsigned set, void (*body)(void*), void* argument);

// The host releases the first, every thread acquires it at its start; the other way round for the second.
extern char launch_begins, launch_ends;

uint64_t random_number();
const Schedule& current_schedule();
void start_random_numbers(uint64_t seed);
void set_error(const std::string& what);

// ---- called by the scheduler
// What the end of a thread means to those that wait for it (block.cpp).
void leave_block(Thread& thread);
// Moves one bulk copy's bytes; false if none is under way (copies.cpp).
bool land_bulk_copy();

// ---- between block.cpp and its neighbours
void complete_warp_without(Thread& exited);
bool bulk_copies_under_way();
void forget_bulk_copies();

}  // namespace emulate
