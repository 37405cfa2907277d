// The one way kernels are launched. tests/csrc/emulate provides the same function for the CPU, so kernel
// sources contain no launch syntax of their own.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#ifdef KEEPLORA_EMULATE
#include "emulate/launch.h"
#else

namespace gpu {

struct Config {
  dim3 grid{1};
  dim3 block{1};
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks that share their shared memory; above 1 from sm_90 on
};

// Queues `kernel` on the stream and returns without waiting. Asks for shared memory beyond the default 48 KB.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Config& config, Arguments&&... arguments) {
  if (config.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t native{};
  native.gridDim = config.grid;
  native.blockDim = config.block;
  native.dynamicSmemBytes = config.shared_bytes;
  native.stream = config.stream;
  cudaLaunchAttribute attribute{};
  if (config.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    native.attrs = &attribute;
    native.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&native, kernel, std::forward<Arguments>(arguments)...);
}

// Blocks that a cluster of this kernel may have: by what its code for this GPU was compiled for, not by the
// GPU. 1 where that is not to be had; a launch will say why.
template <typename... Parameters>
unsigned largest_cluster(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) != cudaSuccess) return 1;
  return attributes.ptxVersion >= 90 ? 8 : 1;
}

// Queues setting `bytes` bytes of device memory to zero.
inline cudaError_t clear(void* memory, size_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(memory, 0, bytes, stream);
}

}  // namespace gpu

#endif
