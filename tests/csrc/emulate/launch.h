// gpu::launch for the CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulate/block.h"

namespace gpu {

struct Config {
  dim3 grid{1};
  dim3 block{1};
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;
};

// Runs the kernel to its end before it returns.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Config& config, Arguments&&... arguments) {
  static_assert((sizeof(std::decay_t<Parameters>) + ... + 0) <= 32764,
                "kernel parameters are limited to 32,764 bytes");
  const unsigned threads = config.block.x * config.block.y * config.block.z;
  if (threads == 0 || threads > 1024 || config.grid.x == 0 || config.grid.y != 1 || config.grid.z != 1 ||
      config.shared_bytes > 227 * 1024 || config.cluster == 0 || config.cluster > 16 ||
      config.grid.x % config.cluster != 0)
    return cudaErrorLaunchFailure;

  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* argument) {
    const auto* c = static_cast<const Call*>(argument);
    std::apply(c->kernel, c->parameters);
  };
  const emulate::Grid grid{
      config.grid.x, config.cluster, {config.block.x, config.block.y, config.block.z}, config.shared_bytes};
  return emulate::run_grid(grid, body, &call) ? cudaSuccess : cudaErrorLaunchFailure;
}

template <typename... Parameters>
unsigned largest_cluster(void (*)(Parameters...)) {
  return 8;
}

inline cudaError_t clear(void* memory, size_t bytes, cudaStream_t) {
  std::memset(memory, 0, bytes);
  return cudaSuccess;
}

}  // namespace gpu
