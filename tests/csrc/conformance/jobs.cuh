// Jobs whose phases open one after another: a tile adds up what the whole phase before has written.
#pragma once
#include "conformance/machine.h"
#include "kernels/primitives/jobs.cuh"
#include "kernels/primitives/shared.cuh"

namespace conformance {

constexpr int kJobs = 5, kPhases = 6, kMostTiles = 40, kJobThreads = 64;

struct Counting : gpu::Job {
  int phase;
};

// A phase has a number of tiles of its own, the first has one; jobs have different numbers of phases.
__host__ __device__ inline int tiles_of(int job, int phase) {
  return phase == 0 ? 1 : 1 + (11 * job + 17 * phase) % kMostTiles;
}
__host__ __device__ inline int phases_of(int job) {
  return kPhases - job % 3;
}
__host__ __device__ inline int place_of(int job, int phase, int tile) {
  return ((job * kPhases + phase) * kMostTiles + tile) * kJobThreads;
}

__global__ void jobs_kernel(gpu::Pool* pool, Counting* jobs, unsigned* data) {
  gpu::SharedArena arena;
  gpu::Worker<Counting> worker(pool, jobs, kJobs, arena);
  const int thread = threadIdx.x;
  while (worker.take()) {
    const int job = worker.job(), tile = static_cast<int>(worker.tile()), phase = jobs[job].phase;
    unsigned sum = static_cast<unsigned>(tile + thread + 1);
    if (phase > 0)
      for (int other = 0; other < tiles_of(job, phase - 1); ++other)
        sum += data[place_of(job, phase - 1, other) + (thread + 1) % kJobThreads];
    data[place_of(job, phase, tile) + thread] += sum;  // a tile done twice would show
    if (!worker.end() || thread != 0) continue;
    jobs[job].phase = phase + 1;
    if (phase + 1 < phases_of(job))
      worker.open(static_cast<unsigned>(tiles_of(job, phase + 1)));
    else
      worker.close();
  }
}

inline std::string check_jobs() {
  std::vector<unsigned> expected(place_of(kJobs, 0, 0));
  for (int job = 0; job < kJobs; ++job)
    for (int phase = 0; phase < phases_of(job); ++phase)
      for (int tile = 0; tile < tiles_of(job, phase); ++tile)
        for (int thread = 0; thread < kJobThreads; ++thread) {
          unsigned& sum = expected[place_of(job, phase, tile) + thread];
          sum = static_cast<unsigned>(tile + thread + 1);
          if (phase > 0)
            for (int other = 0; other < tiles_of(job, phase - 1); ++other)
              sum += expected[place_of(job, phase - 1, other) + (thread + 1) % kJobThreads];
        }
  const Memory<gpu::Pool> pool({gpu::Pool{}});
  const Memory<Counting> jobs(std::vector<Counting>(kJobs, Counting{}));
  const Memory<unsigned> data(std::vector<unsigned>(expected.size(), 0));
  const gpu::Config config{dim3(gpu::worker_blocks(kJobs * kMostTiles)), dim3(kJobThreads),
                           gpu::Worker<Counting>::bytes()};
  const std::string failed = problem(gpu::launch(jobs_kernel, config, pool.get(), jobs.get(), data.get()));
  return failed.empty() ? difference(data.values(), expected) : failed;
}

}  // namespace conformance
