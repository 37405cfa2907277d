// Work whose amount becomes known while it is done: jobs, each a sequence of phases of tiles. Any block does
// any open tile; the block that ends a phase's last tile decides what the next phase is. The tiles of a phase
// see everything that earlier phases of their job wrote, and nothing orders the tiles of one phase.
//
//   gpu::Worker worker(pool, jobs, count, arena);
//   while (worker.take()) {
//     ... tile worker.tile() of jobs[worker.job()] ...
//     if (worker.end() && threadIdx.x == 0) more ? worker.open(tiles) : worker.close();
//   }
//
// Why this always ends, with any number of running blocks: a block waits only while every open tile is taken,
// so the blocks that took them run, and the last of them opens a phase or closes its job.
//
// Jobs and pool lie in global memory and are 0 when the launch begins: each job then has one open tile. Every
// thread of the block makes the same calls, except for open() and close().
#pragma once
#include <cstdint>

#include "kernels/primitives/atomic.cuh"
#include "kernels/primitives/shared.cuh"
#include "kernels/primitives/warp.cuh"

namespace gpu {

// Deriving structures add what their phases need; a phase may change that only between end() and open().
struct Job {
  unsigned long long tiles;  // of the open phase, less one, in the upper half; taken ones in the lower
  unsigned ended;
};

struct Pool {
  unsigned tickets;  // blocks that have begun
  unsigned changes;  // phases opened and jobs closed
  unsigned closed;   // jobs
};

struct WorkerSlot {
  int job;
  unsigned tile, last;
};

#ifdef KEEPLORA_EMULATE
// Blocks run one after another there, so the first would do everything: all but the last leave early, unless a
// check wants to see it done by one.
inline bool one_tile_each() {
  return emulate::one_tile_each;
}
#else
__host__ __device__ constexpr bool one_tile_each() {
  return false;
}
#endif

// Blocks worth launching when no phase of all jobs together has more than `tiles`. Those that find no room on
// the GPU start when others leave, and leave too.
inline unsigned worker_blocks(int64_t tiles) {
  const int64_t most = 1024, wanted = one_tile_each() ? 16 * tiles : tiles;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

namespace jobs {

template <typename N>
__device__ inline N look(const N* counter) {
#ifdef KEEPLORA_EMULATE
  return __atomic_load_n(counter, __ATOMIC_RELAXED);
#else
  return *const_cast<const volatile N*>(counter);
#endif
}

// What follows sees at least what the last one to change the counter had published. In the emulator it orders
// nothing: a block may take a tile of a phase that was opened after it looked, so that must do without.
__device__ inline unsigned look_and_acquire(const unsigned* counter) {
#ifdef KEEPLORA_EMULATE
  return look(counter);
#else
  const unsigned now = look(counter);
  __threadfence();
  return now;
#endif
}

// Releases what this thread has seen and acquires what earlier callers released.
template <typename N>
__device__ inline N fetch_add(N* counter, N amount) {
#ifdef KEEPLORA_EMULATE
  return __atomic_fetch_add(counter, amount, __ATOMIC_ACQ_REL);
#else
  __threadfence();
  const N before = atomicAdd(counter, amount);
  __threadfence();  // also drops lines of L1 from before, see await()
  return before;
#endif
}

__device__ inline void publish(unsigned long long* word, unsigned long long value) {
#ifdef KEEPLORA_EMULATE
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
#else
  __threadfence();
  *const_cast<volatile unsigned long long*>(word) = value;
#endif
}

__device__ inline bool open_tile(unsigned long long tiles) {
  return (tiles & 0xffffffffu) <= tiles >> 32;
}

}  // namespace jobs

template <typename J>
class Worker {
 public:
  static constexpr size_t bytes() { return shared_bytes<WorkerSlot>(1) + shared_bytes<unsigned>(1); }

  __device__ Worker(Pool* pool, J* all, int count, SharedArena& arena)
      : pool_(pool), jobs_(all), count_(count), slot_(arena.take<WorkerSlot>(1)) {
    number_ = take_ticket(&pool->tickets, arena.take<unsigned>(1));
    job_ = static_cast<int>(number_ % count);  // where this block looks first
  }

  // Takes a tile, of the job it had before if that has one. False when all jobs are closed.
  __device__ bool take() {
    if (one_tile_each() && begun_ && number_ + 1 < gridDim.x) return false;
    if (threadIdx.x < kWarp) {
      int found = -1;
      while (found < 0) {
        const unsigned seen = __shfl_sync(kAllLanes, jobs::look_and_acquire(&pool_->changes), 0);
        if (__shfl_sync(kAllLanes, jobs::look(&pool_->closed), 0) == static_cast<unsigned>(count_)) break;
        found = search();
        if (found < 0) wait(seen);
      }
      if (threadIdx.x == 0) slot_->job = found;
    }
    __syncthreads();  // the slot is written
    if (slot_->job < 0) return false;
    job_ = slot_->job;
    tile_ = slot_->tile;
    begun_ = true;
    return true;
  }
  __device__ int job() const { return job_; }
  __device__ unsigned tile() const { return tile_; }

  // To all threads: whether this tile was the last of its phase to end.
  __device__ bool end() {
    __syncthreads();  // the tile is written
    J& job = jobs_[job_];
    if (threadIdx.x == 0) {
      const unsigned tiles = static_cast<unsigned>(jobs::look(&job.tiles) >> 32) + 1;
      slot_->last = jobs::fetch_add(&job.ended, 1u) + 1 == tiles;
    }
    __syncthreads();  // `last` is written
    return slot_->last != 0;
  }

  // By one thread, after an end() that said yes and a barrier behind the block's writes since: the next
  // phase, of at least one tile, or the end of the job.
  __device__ void open(unsigned tiles) {
    J& job = jobs_[job_];
    job.ended = 0;
    jobs::publish(&job.tiles, static_cast<unsigned long long>(tiles - 1) << 32);
    jobs::fetch_add(&pool_->changes, 1u);
  }
  __device__ void close() {
    jobs::fetch_add(&pool_->closed, 1u);
    jobs::fetch_add(&pool_->changes, 1u);
  }

 private:
  // By the first warp: the job of the tile it took, -1 if there was none.
  __device__ int search() {
    const int lane = threadIdx.x;
    for (int first = 0; first < count_; first += kWarp) {
      const auto at = [&](int i) { return job_ + first + i - (job_ + first + i < count_ ? 0 : count_); };
      const bool open = first + lane < count_ && jobs::open_tile(jobs::look(&jobs_[at(lane)].tiles));
      const unsigned open_lanes = __ballot_sync(kAllLanes, open);
      for (int i = 0; i < kWarp; ++i) {
        if ((open_lanes >> i & 1) == 0) continue;
        unsigned long long before = 0;
        if (lane == 0) before = jobs::fetch_add(&jobs_[at(i)].tiles, 1ull);
        before = __shfl_sync(kAllLanes, before, 0);
        if (!jobs::open_tile(before)) continue;
        if (lane == 0) slot_->tile = static_cast<unsigned>(before);
        return at(i);
      }
    }
    return -1;
  }

  __device__ void wait(unsigned seen) {
#ifdef KEEPLORA_EMULATE
    emulate::wait_for_announcement(&pool_->changes, seen + 1, EMULATE_SITE);
#else
    while (jobs::look(&pool_->changes) == seen)
      __nanosleep(200);
    __syncwarp();
#endif
  }

  Pool* pool_;
  J* jobs_;
  int count_;
  WorkerSlot* slot_;
  unsigned number_;
  int job_;
  unsigned tile_ = 0;
  bool begun_ = false;
};

}  // namespace gpu
