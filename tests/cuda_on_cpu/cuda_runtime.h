// As much of CUDA's runtime as csrc/reparam/cuda_kernels.cu uses, on the CPU: one std::jthread per
// CUDA thread, std::barrier for __syncthreads and for a warp's shuffles. The source is compiled
// verbatim with this header in place of CUDA's.
//
// It finds wrong indices, races and missing barriers. It says nothing about a device's arithmetic,
// memory model or speed. Blocks run one after another, so __shared__ can be static.
#pragma once
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the CPU stand-in"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace on_cpu {

constexpr unsigned warp_size = 32;

struct Warp {
  std::barrier<> gate{warp_size};
  uint64_t slot[warp_size] = {};
};

struct Block {
  explicit Block(unsigned threads) : gate(threads), warps(threads / warp_size) {}
  std::barrier<> gate;
  std::vector<Warp> warps;
};

inline unsigned most_blocks = 0;  // of the grids launched so far
inline thread_local Block* block = nullptr;
inline thread_local unsigned thread_number = 0;

}  // namespace on_cpu

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { on_cpu::block->gate.arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  on_cpu::Warp& warp = on_cpu::block->warps[on_cpu::thread_number / on_cpu::warp_size];
  const unsigned lane = on_cpu::thread_number % on_cpu::warp_size;
  std::memcpy(&warp.slot[lane], &value, sizeof value);
  warp.gate.arrive_and_wait();
  std::memcpy(&value, &warp.slot[lane ^ mask], sizeof value);
  warp.gate.arrive_and_wait();
  return value;
}

template <class... Parameters, class... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Values&&... values) {
  const unsigned threads = config->blockDim.x * config->blockDim.y;
  if (config->gridDim.x == 0 || threads == 0 || threads > 1024 || threads % on_cpu::warp_size)
    return cudaErrorInvalidConfiguration;
  if (config->gridDim.x > on_cpu::most_blocks) on_cpu::most_blocks = config->gridDim.x;
  on_cpu::Block block(threads);
  auto run = [&](unsigned number) {
    on_cpu::block = &block;
    on_cpu::thread_number = number;
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    threadIdx = dim3(number % blockDim.x, number / blockDim.x);
    for (unsigned index = 0; index < gridDim.x; ++index) {
      blockIdx = dim3(index);
      kernel(values...);
      __syncthreads();  // the next block reuses the static __shared__
    }
  };
  std::vector<std::jthread> all;
  for (unsigned number = 0; number < threads; ++number) all.emplace_back(run, number);
  return cudaSuccess;
}
