#include "emulate/block.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "emulate/context.h"

namespace emulate {
namespace {

constexpr int kWarp = 32;
constexpr size_t kGuard = 64;          // bytes on either side of a shared array
constexpr unsigned char kFill = 0xff;  // a NaN in every floating type

enum class State { kReady, kAtBarrier, kInWarp, kDone };
enum class Collective { kSync, kBallot, kShuffle, kGather };

struct Thread {
  Context context;
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
};

struct SharedArray {
  std::unique_ptr<unsigned char[]> memory;
  size_t bytes;
};

Schedule schedule;
std::mt19937_64 random_bits;
std::string error;

// The running block.
std::vector<std::unique_ptr<Thread>> threads;
std::vector<SharedArray> shared;
std::vector<std::vector<unsigned char>> gathered;  // by warp
size_t shared_limit = 0, shared_taken = 0;
int count = 0, live = 0, waiting = 0, current = 0;
std::vector<int> by_rank, rank_of;  // the schedule: rank 0 runs first
std::vector<uint64_t> ready;        // bit r: the thread of rank r can run
Context host;
void (*kernel)(void*) = nullptr;
void* kernel_argument = nullptr;

std::string describe(int thread) {
  const Site& site = threads[thread]->site;
  return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x) + " at " + site.file +
         ":" + std::to_string(site.line);
}

// Ends the launch from inside a CUDA thread: the host goes on, the other threads never do.
[[noreturn]] void stop(const std::string& what) {
  error = what + " (" + describe(current) + ")";
  Context::leave_for(threads[current]->context, host);
}

void set_ready(int thread) {
  threads[thread]->state = State::kReady;
  ready[rank_of[thread] / 64] |= uint64_t{1} << (rank_of[thread] % 64);
}

void draw_ranks() {
  std::vector<uint64_t> key(count);
  uint64_t warp_key = 0;
  for (int i = 0; i < count; ++i) {
    if (i % kWarp == 0) warp_key = random_bits() << 32;
    key[i] = schedule.order == Order::kSequential ? i
             : schedule.order == Order::kReversed ? count - i
                                                  : warp_key + (random_bits() & 0xffffffffu);
    by_rank[i] = i;
  }
  std::stable_sort(by_rank.begin(), by_rank.end(), [&](int a, int b) { return key[a] < key[b]; });
  std::fill(ready.begin(), ready.end(), 0);
  for (int r = 0; r < count; ++r)
    rank_of[by_rank[r]] = r;
  for (int i = 0; i < count; ++i)
    if (threads[i]->state == State::kReady) set_ready(i);
}

// The thread to run next, taken out of the ready set; -1 if none can.
int pick() {
  if (schedule.order == Order::kRandom && random_bits() % 512 == 0) draw_ranks();
  for (size_t word = 0; word < ready.size(); ++word) {
    if (ready[word] == 0) continue;
    const int rank = static_cast<int>(word) * 64 + __builtin_ctzll(ready[word]);
    ready[word] &= ready[word] - 1;
    return by_rank[rank];
  }
  return -1;
}

void make_current(int thread) {
  current = thread;
  const unsigned i = static_cast<unsigned>(thread);
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
}

// Gives up the CPU until this thread is ready again (or for good, when it is done).
void yield() {
  const int me = current, next = pick();
  const bool done = threads[me]->state == State::kDone;
  if (next < 0) {
    if (live > 0)
      stop("deadlock: no thread can run; some threads do not take part in a barrier or warp collective");
    Context::leave_for(threads[me]->context, host);
  }
  if (next == me) return;
  make_current(next);
  if (done) Context::leave_for(threads[me]->context, threads[next]->context);
  Context::switch_to(threads[me]->context, threads[next]->context);
}

void release_barrier_if_full() {
  if (waiting == 0 || waiting < live) return;  // threads that exited count as arrived
  waiting = 0;
  for (int i = 0; i < count; ++i)
    if (threads[i]->state == State::kAtBarrier) set_ready(i);
}

// Completes the collective of the lanes in `mask`, if all of them that still run have come to it.
void complete_warp(int first, unsigned mask) {
  uint64_t contribution[kWarp] = {};
  unsigned present = 0, votes = 0;
  const Thread* leader = nullptr;
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= count) stop("a warp collective's mask names lanes beyond the block's last thread");
    const Thread& thread = *threads[first + l];
    if (thread.state == State::kDone) continue;
    if (thread.state != State::kInWarp) return;
    if (leader && (leader->collective != thread.collective || leader->site.line != thread.site.line ||
                   leader->bytes != thread.bytes))
      stop("lanes of one warp are in different collectives");
    if (thread.mask != mask) stop("lanes of one warp collective disagree on its mask");
    leader = leader ? leader : &thread;
    contribution[l] = thread.bits;
    present |= 1u << l;
    votes |= static_cast<unsigned>(thread.bits != 0) << l;
  }
  if (leader && leader->collective == Collective::kGather) {
    if (present != 0xffffffffu) stop("lanes have exited that this warp collective needs");
    auto& buffer = gathered[first / kWarp];
    buffer.resize(kWarp * leader->bytes);
    for (int l = 0; l < kWarp; ++l)
      std::memcpy(buffer.data() + l * leader->bytes, threads[first + l]->gives, leader->bytes);
  }
  for (int l = 0; l < kWarp; ++l) {
    if (!(present >> l & 1)) continue;
    Thread& thread = *threads[first + l];
    if (thread.collective == Collective::kBallot) thread.bits = votes;
    if (thread.collective == Collective::kShuffle) {
      const int source = thread.source % kWarp;
      thread.bits =
          present >> source & 1 ? contribution[source] : ~uint64_t{0};  // an absent lane's value: NaN
    }
    set_ready(first + l);
  }
}

uint64_t join(Collective collective, unsigned mask, uint64_t bits, int source, Site site,
              const void* gives = nullptr, size_t bytes = 0) {
  Thread& me = *threads[current];
  me.gives = gives;
  me.bytes = bytes;
  me.site = site;
  if (!(mask >> lane() & 1)) stop("a lane is missing from its own warp collective's mask");
  me.collective = collective;
  me.mask = mask;
  me.bits = bits;
  me.source = source;
  me.state = State::kInWarp;
  complete_warp(current - lane(), mask);
  yield();
  return me.bits;
}

void thread_main() {
  kernel(kernel_argument);
  if (!threads[current]->copies.empty()) stop("the thread exits without waiting for its asynchronous copies");
  const int first = current - lane();
  threads[current]->state = State::kDone;
  --live;
  release_barrier_if_full();
  for (int i = first; i < std::min(first + kWarp, count); ++i)  // others may have waited for this lane
    if (threads[i]->state == State::kInWarp) {
      complete_warp(first, threads[i]->mask);
      break;
    }
  yield();
}

bool guards_intact() {
  for (size_t i = 0; i < shared.size(); ++i)
    for (size_t j = 0; j < kGuard; ++j)
      if (shared[i].memory[j] != kFill || shared[i].memory[kGuard + shared[i].bytes + j] != kFill) {
        error = "shared array " + std::to_string(i) + " was written outside its " +
                std::to_string(shared[i].bytes) + " bytes";
        return false;
      }
  return true;
}

}  // namespace

void set_schedule(Schedule wanted) {
  schedule = wanted;
}

const std::string& last_error() {
  return error;
}

bool run_block(int block_threads, size_t shared_bytes, void (*body)(void*), void* argument) {
  error.clear();
  count = live = block_threads;
  waiting = 0;
  kernel = body;
  kernel_argument = argument;
  shared.clear();
  shared_limit = shared_bytes;
  shared_taken = 0;
  random_bits.seed(schedule.seed + blockIdx.x);
  while (static_cast<int>(threads.size()) < count)
    threads.push_back(std::make_unique<Thread>());
  by_rank.assign(count, 0);
  rank_of.assign(count, 0);
  ready.assign((count + 63) / 64, 0);
  gathered.resize((count + kWarp - 1) / kWarp);
  for (int i = 0; i < count; ++i) {
    threads[i]->copies.clear();
    threads[i]->group_ends.clear();
    threads[i]->context.prepare(&thread_main);
    threads[i]->state = State::kReady;
    threads[i]->site = {};
  }
  draw_ranks();
  make_current(pick());
  Context::switch_to(host, threads[current]->context);
  return error.empty() && guards_intact();
}

int lane() {
  return current % kWarp;
}

void block_barrier(Site site) {
  Thread& me = *threads[current];
  me.site = site;
  for (int i = 0; i < count && waiting > 0; ++i)
    if (threads[i]->state == State::kAtBarrier) {
      if (threads[i]->site.line != site.line)
        stop("divergent barrier: another thread waits at line " + std::to_string(threads[i]->site.line));
      break;
    }
  me.state = State::kAtBarrier;
  ++waiting;
  release_barrier_if_full();
  yield();
}

void warp_barrier(unsigned mask, Site site) {
  join(Collective::kSync, mask, 0, 0, site);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  return static_cast<unsigned>(join(Collective::kBallot, mask, predicate, 0, site));
}

uint64_t shuffle_bits(unsigned mask, uint64_t bits, int source, Site site) {
  return join(Collective::kShuffle, mask, bits, source, site);
}

const unsigned char* gather(const void* mine, size_t bytes, Site site) {
  join(Collective::kGather, 0xffffffffu, 0, 0, site, mine, bytes);
  return gathered[current / kWarp].data();
}

void issue_copy(const Copy& copy, Site site) {
  threads[current]->site = site;
  threads[current]->copies.push_back(copy);
}

void commit_copies() {
  threads[current]->group_ends.push_back(threads[current]->copies.size());
}

bool next_copy(int left, Copy* copy) {
  Thread& me = *threads[current];
  while (static_cast<int>(me.group_ends.size()) > left && me.group_ends.front() == 0)
    me.group_ends.pop_front();
  if (static_cast<int>(me.group_ends.size()) <= left) return false;
  *copy = me.copies.front();
  me.copies.pop_front();
  for (size_t& end : me.group_ends)
    --end;
  return true;
}

void announce(unsigned* counter) {
  __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE);
}

void await(const unsigned* counter, unsigned target, Site site) {
  const unsigned reached = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
  if (reached >= target) return;
  threads[current]->site = site;
  stop("deadlock: the block awaits " + std::to_string(target) + " announcements, and only " +
       std::to_string(reached) + " are made before it");
}

void fail(const char* what, Site site) {
  threads[current]->site = site;
  stop(what);
}

void* take_shared(size_t index, size_t bytes) {
  if (index > shared.size()) stop("shared arrays are taken out of order");
  if (index == shared.size()) {
    shared_taken += bytes;
    if (shared_taken > shared_limit)
      stop("the kernel takes " + std::to_string(shared_taken) + " bytes of shared memory, the launch gave " +
           std::to_string(shared_limit));
    // One allocation per array: AddressSanitizer sees an access past its end at once, the guards see it
    // later.
    const size_t size = bytes + 2 * kGuard;
    shared.push_back({std::unique_ptr<unsigned char[]>(new unsigned char[size]), bytes});
    std::memset(shared.back().memory.get(), kFill, size);
  }
  if (shared[index].bytes != bytes) stop("threads of a block disagree on the size of a shared array");
  return shared[index].memory.get() + kGuard;
}

}  // namespace emulate
