#include "emulate/scheduler.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>

#include "emulate/races.h"

#ifdef EMULATE_RACED
// The first race ends the program, and nothing that lives until its end is worth a second's wait.
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1:atexit_sleep_ms=0";
}
#endif

namespace emulate {

std::vector<Thread> threads;
std::unique_ptr<Cluster> cluster;
char launch_begins, launch_ends;

namespace {

constexpr unsigned kSets = kRaced ? 3 : 1;

Schedule schedule;
std::mt19937_64 random_bits;
std::string error;

std::vector<std::unique_ptr<Context>> contexts[kSets];
std::vector<int> by_rank, rank_of;  // rank 0 runs first
std::vector<uint64_t> ready;        // bit r: the thread of rank r can run
int current = 0, unfinished = 0;
Context host;
void (*kernel)(void*) = nullptr;
void* kernel_argument = nullptr;

const char* meaning(State state) {
  switch (state) {
    case State::kReady:
      return "can run";
    case State::kAtBarrier:
      return "wait at a barrier";
    case State::kAtClusterBarrier:
      return "wait at a cluster barrier";
    case State::kInWarp:
      return "wait in a warp collective";
    case State::kAwaiting:
      return "await an announcement";
    case State::kAtMbarrier:
      return "wait at an mbarrier";
    case State::kDone:
      return "have exited";
  }
  return "";
}

std::string place(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string who_waits() {
  std::map<std::string, int> counts;
  for (const Thread& thread : threads)
    ++counts[meaning(thread.state) + (thread.state == State::kDone ? "" : " at " + place(thread.site))];
  std::string text;
  for (const auto& [what, count] : counts)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + what;
  return text;
}

void set_ready(int thread) {
  threads[thread].state = State::kReady;
  ready[rank_of[thread] / 64] |= uint64_t{1} << (rank_of[thread] % 64);
}

void draw_ranks() {
  const int count = static_cast<int>(threads.size());
  std::vector<uint64_t> key(count);
  uint64_t warp_key = 0;
  for (int i = 0; i < count; ++i) {
    if (threads[i].index % kWarp == 0) warp_key = random_bits() << 32;
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
    if (threads[i].state == State::kReady) set_ready(i);
}

// The thread to run next, taken out of the ready set; -1 if none can.
// Bulk copies land as late as possible, or at random.
int pick() {
  if (schedule.order == Order::kRandom) {
    const uint64_t dice = random_bits();
    if (dice % 512 == 0) draw_ranks();
    if (dice / 512 % 8 == 0) land_bulk_copy();
  }
  do {
    for (size_t word = 0; word < ready.size(); ++word) {
      if (ready[word] == 0) continue;
      const int rank = static_cast<int>(word) * 64 + __builtin_ctzll(ready[word]);
      ready[word] &= ready[word] - 1;
      return by_rank[rank];
    }
  } while (land_bulk_copy());
  return -1;
}

void make_current(int thread) {
  current = thread;
  const unsigned i = static_cast<unsigned>(threads[thread].index);
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  blockIdx = {threads[thread].block->number, 0, 0};
}

// The context to continue with when the running thread cannot.
Context& next_context() {
  const int next = pick();
  if (next >= 0) {
    make_current(next);
    return *threads[next].context;
  }
  if (unfinished > 0) stop("deadlock: " + who_waits());
  return host;
}

void thread_main() {
  acquire(&launch_begins);
  kernel(kernel_argument);
  release(&launch_ends);
  Context* mine = threads[current].context;
  Context* next = nullptr;
  {
    const Unseen unseen;
    Thread& me = threads[current];
    if (!me.copies.empty()) stop("the thread exits without waiting for its asynchronous copies");
    me.state = State::kDone;
    --unfinished;
    leave_block(me);
    next = &next_context();
  }
  Context::leave_for(*mine, *next);
}

}  // namespace

void set_schedule(Schedule wanted) {
  schedule = wanted;
}

const Schedule& current_schedule() {
  return schedule;
}

const std::string& last_error() {
  return error;
}

void set_error(const std::string& what) {
  error = what;
}

uint64_t random_number() {
  return random_bits();
}

void start_random_numbers(uint64_t seed) {
  random_bits.seed(seed);
}

Thread& running() {
  return threads[current];
}

void wake(Thread& thread) {
  set_ready(static_cast<int>(&thread - threads.data()));
}

void yield() {
  const Thread& me = threads[current];
  Context& next = next_context();
  if (&next != me.context) Context::switch_to(*me.context, next);
}

void stop(std::string what) {
  const Thread& me = threads[current];
  error = std::move(what);
  error += " (thread " + std::to_string(me.index) + " of block " + std::to_string(me.block->number) + " at " +
           place(me.site) + ")";
  Context::leave_for(*me.context, host);
}

void run_threads(unsigned set, void (*body)(void*), void* argument) {
  kernel = body;
  kernel_argument = argument;
  auto& mine = contexts[set % kSets];
  while (mine.size() < threads.size())
    mine.push_back(std::make_unique<Context>());
  by_rank.assign(threads.size(), 0);
  rank_of.assign(threads.size(), 0);
  ready.assign((threads.size() + 63) / 64, 0);
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].context = mine[i].get();
    threads[i].context->prepare(&thread_main);
    threads[i].state = State::kReady;
  }
  unfinished = static_cast<int>(threads.size());
  draw_ranks();
  make_current(pick());
  host.adopt_calling_thread();
  Context::switch_to(host, *threads[current].context);
  if (error.empty()) return;
  for (const Thread& thread : threads)
    thread.context->release(&launch_ends);
  mine.clear();  // threads that never ended lie on these stacks
}

}  // namespace emulate
