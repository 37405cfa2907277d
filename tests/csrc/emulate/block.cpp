// Grids, blocks and clusters: their barriers and their shared memory.
#include "emulate/block.h"

#include <cuda_runtime.h>

#include <deque>
#include <map>
#include <numeric>
#include <string>

#include "emulate/counts.h"
#include "emulate/races.h"
#include "emulate/scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

namespace emulate {
namespace {

constexpr size_t kGuard = 64;          // bytes on either side of a shared array
constexpr unsigned char kFill = 0xff;  // a NaN in every floating type

// By counter: an address for each announcement, for the race detector. They stay where they are.
std::map<const unsigned*, std::deque<char>> announcements;

void release_barrier_if_full(Block& block) {
  if (block.waiting == 0 || block.waiting < block.live) return;  // threads that exited count as arrived
  block.waiting = 0;
  for (int i = 0; i < block.count; ++i)
    if (block.threads[i].state == State::kAtBarrier) wake(block.threads[i]);
}

void release_cluster_barrier_if_full() {
  if (cluster->waiting == 0 || cluster->waiting < cluster->live) return;
  cluster->waiting = 0;
  for (Thread& thread : threads)
    if (thread.state == State::kAtClusterBarrier) wake(thread);
}

void check_guards(const Block& block) {
  for (size_t i = 0; i < block.shared.size(); ++i) {
    const auto [memory, bytes] = block.shared[i];
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes + 2 * kGuard);
    for (size_t j = 0; j < kGuard; ++j)
      if (memory[j] != kFill || memory[kGuard + bytes + j] != kFill)
        set_error("shared array " + std::to_string(i) + " was written outside its " + std::to_string(bytes) +
                  " bytes");
  }
}

// Runs the blocks [first, first + count) together.
bool run_blocks(const Grid& grid, unsigned first, void (*body)(void*), void* argument) {
  const int count = static_cast<int>(grid.shape[0] * grid.shape[1] * grid.shape[2]);
  threads.assign(static_cast<size_t>(count) * grid.cluster, {});
  cluster = std::make_unique<Cluster>();
  cluster->live = static_cast<int>(threads.size());
  for (unsigned rank = 0; rank < grid.cluster; ++rank) {
    Block& block = *cluster->blocks.emplace_back(std::make_unique<Block>());
    block.number = first + rank;
    block.rank = rank;
    block.threads = threads.data() + static_cast<size_t>(count) * rank;
    block.count = block.live = count;
    block.shared_limit = grid.shared_bytes;
    const int warps = (count + kWarp - 1) / kWarp;
    block.in_collective.resize(warps);
    block.exited.resize(warps);
    block.exited.back() = warps * kWarp - count;  // as if they had been there
    block.gathered.resize(warps);
    block.warp_tags.resize(warps);
    for (int i = 0; i < count; ++i) {
      block.threads[i].block = &block;
      block.threads[i].index = i;
    }
  }
  run_threads(first / grid.cluster, body, argument);
  if (last_error().empty())
    for (const auto& block : cluster->blocks)
      check_guards(*block);
  forget_bulk_copies();
  cluster.reset();
  return last_error().empty();
}

}  // namespace

Block::~Block() {
  for (const SharedArray& array : shared)
    delete[] array.memory;
}

bool run_grid(const Grid& grid, void (*body)(void*), void* argument) {
  release(&launch_begins);
  {
    const Unseen unseen;
    set_error("");
    announcements.clear();
    blockDim = {grid.shape[0], grid.shape[1], grid.shape[2]};
    gridDim = {grid.blocks, 1, 1};
    const Schedule& schedule = current_schedule();
    start_random_numbers(schedule.seed);
    // Clusters in order, backwards, or in steps of a number that has no divisor in common with theirs.
    const unsigned units = grid.blocks / grid.cluster;
    const unsigned run = schedule.last_blocks > 0 ? schedule.last_blocks / grid.cluster : units;
    unsigned unit = units - run, step = 1;
    if (schedule.order == Order::kReversed) unit = step = units - 1;
    if (schedule.order == Order::kRandom) {
      unit = random_number() % units;
      do
        step = random_number() % units + 1;
      while (std::gcd(step, units) != 1);
    }
    for (unsigned i = 0; i < run; ++i) {
      if (!run_blocks(grid, unit * grid.cluster, body, argument)) break;
      unit = (unit + uint64_t{step}) % units;
      if (schedule.blocks_ordered) {
        acquire(&launch_ends);
        release(&launch_begins);
      }
    }
  }
  acquire(&launch_ends);
  return last_error().empty();
}

void leave_block(Thread& thread) {
  Block& block = *thread.block;
  --block.live;
  ++block.exited[thread.index / kWarp];
  --cluster->live;
  release_barrier_if_full(block);
  release_cluster_barrier_if_full();
  complete_warp_without(thread);
  if (cluster->live == 0 && bulk_copies_under_way())
    stop("the last thread exits while bulk copies are under way");
  if (block.live == 0)  // other blocks of the cluster may not look at its shared memory any more
    for (const SharedArray& array : block.shared)
      std::memset(array.memory + kGuard, kFill, array.bytes);
}

void block_barrier(Site site) {
  Thread& me = running();
  Block& block = *me.block;
  char* tag = &block.barrier_tags[me.barriers++ % 2];
  release(tag);
  {
    const Unseen unseen;
    me.site = site;
    for (int i = 0; i < block.count && block.waiting > 0; ++i) {
      const Thread& other = block.threads[i];
      if (other.state != State::kAtBarrier) continue;
      if (other.site.line != site.line || other.site.file != site.file)
        stop(std::string("divergent barrier: another thread waits at ") + other.site.file + ":" +
             std::to_string(other.site.line));
      break;
    }
    me.state = State::kAtBarrier;
    ++block.waiting;
    release_barrier_if_full(block);
    yield();
  }
  acquire(tag);
}

void cluster_barrier(Site site) {
  Thread& me = running();
  char* tag = &cluster->barrier_tags[me.cluster_barriers++ % 2];
  release(tag);
  {
    const Unseen unseen;
    me.site = site;
    me.state = State::kAtClusterBarrier;
    ++cluster->waiting;
    release_cluster_barrier_if_full();
    yield();
  }
  acquire(tag);
}

unsigned cluster_rank() {
  return running().block->rank;
}

void* cluster_address(void* mine, unsigned rank, Site site) {
  const Unseen unseen;
  running().site = site;
  if (rank >= cluster->blocks.size()) stop("the cluster has no block of that rank");
  const auto& own = running().block->shared;
  const auto& other = cluster->blocks[rank]->shared;
  auto* address = static_cast<unsigned char*>(mine);
  for (size_t i = 0; i < own.size(); ++i) {
    const size_t offset = static_cast<size_t>(address - own[i].memory);
    if (address < own[i].memory + kGuard || offset >= kGuard + own[i].bytes) continue;
    if (i >= other.size())
      stop("the other block has not taken that shared array yet: a cluster barrier is missing");
    return other[i].memory + offset;
  }
  stop("not an address in the shared memory of this block");
}

namespace {

// What the race detector knows the number-th announcement of a counter by.
char* tag_of(const unsigned* counter, unsigned number) {
  const Unseen unseen;
  auto& tags = announcements[counter];
  while (tags.size() <= number)
    tags.push_back(0);
  return &tags[number];
}

}  // namespace

void add_announcement(unsigned* counter) {
  release(tag_of(counter, *counter));
  ++*counter;
  announced();
}

void acquire_announcements(const unsigned* counter, unsigned target, Site site) {
  while (*static_cast<const volatile unsigned*>(counter) < target)
    wait_for_announcement(counter, target, site);
  for (unsigned number = 0; number < target; ++number)
    acquire(tag_of(counter, number));
}

void announced() {
  const Unseen unseen;
  for (Thread& thread : threads)
    if (thread.state == State::kAwaiting) wake(thread);
}

void wait_for_announcement(const unsigned* counter, unsigned target, Site site) {
  const Unseen unseen;
  running().site = site;
  running().state = State::kAwaiting;
  if (cluster->blocks.size() == 1)
    stop("deadlock: the block awaits " + std::to_string(target) + " announcements, and only " +
         std::to_string(__atomic_load_n(counter, __ATOMIC_RELAXED)) + " are made before it");
  yield();
}

void fail(const char* what, Site site) {
  const Unseen unseen;
  running().site = site;
  stop(what);
}

void* take_shared(size_t index, size_t bytes, size_t reserved) {
  const Unseen unseen;
  Block& block = *running().block;
  if (index > block.shared.size()) stop("shared arrays are taken out of order");
  if (index == block.shared.size()) {
    block.shared_taken += reserved;
    if (block.shared_taken > block.shared_limit)
      stop("the kernel takes " + std::to_string(block.shared_taken) +
           " bytes of shared memory, the launch gave " + std::to_string(block.shared_limit));
    // An allocation of its own: AddressSanitizer sees any access outside at once, the guards a write later.
    auto* memory = new unsigned char[bytes + 2 * kGuard];
    std::memset(memory, kFill, bytes + 2 * kGuard);
    ASAN_POISON_MEMORY_REGION(memory, kGuard);
    ASAN_POISON_MEMORY_REGION(memory + kGuard + bytes, kGuard);
    block.shared.push_back({memory, bytes});
    count_shared(memory + kGuard, bytes);
  }
  if (block.shared[index].bytes != bytes) stop("threads of a block disagree on the size of a shared array");
  return block.shared[index].memory + kGuard;
}

}  // namespace emulate
