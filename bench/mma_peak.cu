// What tensor cores reach through mma.sync at best, on registers alone: TFLOP/s of TF32 and of bfloat16.
//
//   nvcc -std=c++20 -O3 -I csrc -gencode=arch=compute_90a,code=sm_90a bench/mma_peak.cu -o mma_peak
#include <cstdio>

#include "kernels/primitives/mma.cuh"

namespace {

constexpr int kRounds = 4096, kChains = 8, kThreads = 256, kBlocksPerSm = 4;

using Multiply = void (*)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

// Independent chains of products, so that none waits for the one before it.
template <Multiply multiply>
__global__ void products(float* out) {
  float c[kChains][4] = {};
  uint32_t a[4], b[2];
  for (uint32_t& word : a)
    word = 0x3f803f80u + threadIdx.x;
  for (uint32_t& word : b)
    word = 0x3f003f00u + blockIdx.x;
  for (int i = 0; i < kRounds; ++i)
#pragma unroll
    for (auto& chain : c)
      multiply(chain, a, b);
  float sum = 0;
  for (const auto& chain : c)
    sum += chain[0] + chain[1] + chain[2] + chain[3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;  // so that nothing is left out
}

template <Multiply multiply>
bool measure(const char* name, int blocks, int depth, float* out) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float best = 0;
  for (int i = 0; i < 5; ++i) {
    cudaEventRecord(begin);
    products<multiply><<<blocks, kThreads>>>(out);
    cudaEventRecord(end);
    float milliseconds = 0;
    if (cudaEventSynchronize(end) != cudaSuccess ||
        cudaEventElapsedTime(&milliseconds, begin, end) != cudaSuccess)
      return false;
    const double warps = static_cast<double>(blocks) * kThreads / 32;
    const double operations = warps * kRounds * kChains * 2.0 * 16 * 8 * depth;
    best = fmaxf(best, static_cast<float>(operations / milliseconds / 1e9));
  }
  std::printf("%s %.1f\n", name, best);
  return true;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  float* out = nullptr;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 2;
  const int blocks = kBlocksPerSm * device.multiProcessorCount;
  if (cudaMalloc(&out, sizeof(float) * blocks * kThreads) != cudaSuccess) return 2;
  const bool measured = measure<gpu::mma_tf32>("mma_tf32_TFLOPs", blocks, 8, out) &&
                        measure<gpu::mma_bf16>("mma_bf16_TFLOPs", blocks, 16, out);
  return measured ? 0 : 1;
}
