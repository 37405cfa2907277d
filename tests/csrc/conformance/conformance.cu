// Runs every primitive of csrc/kernels/primitives and compares it with its definition, computed on the host.
// One source for both: with nvcc it asks whether a GPU does what the emulator takes it to do, with an
// ordinary compiler whether the emulator does.
//
//   nvcc -std=c++20 -I csrc -I tests/csrc -gencode=arch=compute_90a,code=sm_90a
//        tests/csrc/conformance/conformance.cu -o conformance
//
// Prints one line per primitive. Exit status 1 if one differs, 2 if the GPU cannot be used.
#include <cstdio>
#include <string>

#include "conformance/copies.cuh"
#include "conformance/jobs.cuh"
#include "conformance/numbers.cuh"
#include "conformance/products.cuh"
#include "conformance/sums.cuh"

namespace {

using namespace conformance;

struct Check {
  const char* name;
  std::string (*run)();
  int needs = 80;  // compute capability
};

constexpr Check kChecks[] = {
    {"warp_sum, block_sum, float", check_sums<float>},
    {"warp_sum, block_sum, double", check_sums<double>},
    {"warp_sum_transposed, float", check_transposed<float>},
    {"warp_sum_transposed, double", check_transposed<double>},
    {"SharedArena", check_arena},
    {"mma_tf32", check_mma<float, Way::kPlain>},
    {"mma_f64", check_mma<double, Way::kPlain>},
    {"mma_bf16", check_mma_bf16},
    {"load_matrices", check_load<false>},
    {"load_matrices, transposed", check_load<true>},
    {"multiply_add, split floats", check_mma<float, Way::kSplit>},
    {"multiply_add, doubles", check_mma<double, Way::kSplit>},
    {"widen, bfloat16", check_widen<gpu::Bfloat16>},
    {"widen, float16", check_widen<gpu::Float16>},
    {"nearest_tf32", check_nearest_tf32},
    {"narrow, float to bfloat16", check_narrow<gpu::Bfloat16, float>},
    {"narrow, float to float16", check_narrow<gpu::Float16, float>},
    {"narrow, double to bfloat16", check_narrow<gpu::Bfloat16, double>},
    {"narrow, double to float16", check_narrow<gpu::Float16, double>},
    {"copy_async, 4 bytes", check_copy<4>},
    {"copy_async, 8 bytes", check_copy<8>},
    {"copy_async, 16 bytes", check_copy<16>},
    {"take_ticket, announce, await", check_chain},
    {"Worker", check_jobs},
    {"cluster_sync, cluster_map", check_cluster, 90},
    {"mbarrier, bulk_copy", check_ring, 90},
};

bool run_all() {
  bool good = true;
  for (const Check& check : kChecks) {
    if (compute_capability() < check.needs) {
      std::printf("%-32s not on this GPU, needs sm_%d\n", check.name, check.needs);
      continue;
    }
    const std::string differs = check.run();
    std::printf("%-32s %s\n", check.name, differs.empty() ? "as defined" : ("DIFFERS: " + differs).c_str());
    good = good && differs.empty();
  }
  return good;
}

}  // namespace

int main() {
  std::printf("primitives on %s\n", name().c_str());
#ifdef KEEPLORA_EMULATE
  bool good = true;
  for (const auto order : {emulate::Order::kSequential, emulate::Order::kReversed, emulate::Order::kRandom}) {
    emulate::set_schedule({order, 5});
    good = run_all() && good;
  }
  return good ? 0 : 1;
#else
  return run_all() ? 0 : 1;
#endif
}
