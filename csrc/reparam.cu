// The CUDA kernels: a warp or, for long rows, a block of 256 threads to a row; a thread takes groups of four columns.
// The kl is summed by a fixed tree and without atomics, so a device repeats its own bits.
#include <cuda_runtime.h>

#include "formulas.h"
#include "kernels.h"

#ifndef PEGASUS_MAX_BLOCKS
#define PEGASUS_MAX_BLOCKS 0x7FFFFFFF  // of a grid; the tests set fewer, to make blocks take several rows
#endif

namespace pegasus {
namespace {

using namespace scalar;

constexpr int warp = 32, rows_per_block = 4, long_row = 1024, long_row_threads = 256;

// An element type: how it is stored, and the type it is computed in.
template <class T>
struct Plain {
  using Element = T;
  using Real = T;
  static __device__ Real widen(Element x) { return x; }
  static __device__ Element narrow(Real x) { return x; }
};
using Float32 = Plain<float>;
using Float64 = Plain<double>;

template <class Bits>
struct Short {
  using Element = uint16_t;
  using Real = float;
  static __device__ Real widen(Element x) { return Bits::template widen<float>(x); }
  static __device__ Element narrow(Real x) { return static_cast<Element>(Bits::template narrow<float>(x)); }
};

// Four elements that move in one access, or in two for double.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T value[4];
};

// Columns past the end read as zero, which adds nothing to the kl.
template <class Format, class T = typename Format::Element, class Real = typename Format::Real>
__device__ void load(const void* base, int64_t row, int64_t stride, int64_t column, int count, bool aligned,
                     Real out[4]) {
  const T* from = static_cast<const T*>(base) + row * stride + column;
  Four<T> four = {};
  if (aligned && count == 4) {
    four = *reinterpret_cast<const Four<T>*>(from);
  } else {
    for (int i = 0; i < 4; ++i)  // not `i < count`: constant indices stay in registers
      if (i < count) four.value[i] = from[i];
  }
  for (int i = 0; i < 4; ++i) out[i] = Format::widen(four.value[i]);
}

template <class Format, class T = typename Format::Element, class Real = typename Format::Real>
__device__ void store(void* base, int64_t row, int64_t stride, int64_t column, int count, bool aligned,
                      const Real in[4]) {
  T* to = static_cast<T*>(base) + row * stride + column;
  Four<T> four;
  for (int i = 0; i < 4; ++i) four.value[i] = Format::narrow(in[i]);
  if (aligned && count == 4) {
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = four.value[i];
  }
}

// The sum over the threads of a row, in every one of them.
template <class Real>
__device__ Real sum_of_row(Real x) {
  for (int offset = warp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  if (blockDim.x == warp) return x;
  __shared__ Real part[long_row_threads / warp];
  if (threadIdx.x % warp == 0) part[threadIdx.x / warp] = x;
  __syncthreads();
  Real sum = 0;
  for (int i = 0; i < long_row_threads / warp; ++i) sum += part[i];
  __syncthreads();  // the next row writes `part` again
  return sum;
}

__device__ int columns_left(int64_t columns, int64_t column) {
  return columns - column < 4 ? static_cast<int>(columns - column) : 4;
}

template <class Format>
__global__ void forward_kernel(Arguments a, bool aligned) {
  using Real = typename Format::Real;
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += step) {
    Real sum = 0;
    for (int64_t column = 4 * threadIdx.x; column < a.columns; column += 4 * blockDim.x) {
      const int count = columns_left(a.columns, column);
      Real mu[4], logvar[4], eps[4], z[4];
      load<Format>(a.mu, row, a.mu_stride, column, count, aligned, mu);
      load<Format>(a.logvar, row, a.logvar_stride, column, count, aligned, logvar);
      normals_of_group<Real>(column / 4, static_cast<uint64_t>(row) + static_cast<uint64_t>(a.row_offset), seed, eps);
      for (int i = 0; i < 4; ++i) sum += forward_element(mu[i], logvar[i], eps[i], z[i]);
      store<Format>(a.z, row, a.columns, column, count, aligned, z);
    }
    sum = sum_of_row(sum);
    if (threadIdx.x == 0) static_cast<Real*>(a.kl)[row] = sum / 2;
  }
}

template <class Format>
__global__ void backward_kernel(Arguments a, bool aligned) {
  using Real = typename Format::Real;
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += step) {
    const Real half_dkl = static_cast<const Real*>(a.dkl)[row * a.dkl_stride] / 2;
    for (int64_t column = 4 * threadIdx.x; column < a.columns; column += 4 * blockDim.x) {
      const int count = columns_left(a.columns, column);
      Real mu[4], logvar[4], dz[4], eps[4], dmu[4], dlogvar[4];
      load<Format>(a.mu, row, a.mu_stride, column, count, aligned, mu);
      load<Format>(a.logvar, row, a.logvar_stride, column, count, aligned, logvar);
      load<Format>(a.dz, row, a.dz_stride, column, count, aligned, dz);
      normals_of_group<Real>(column / 4, static_cast<uint64_t>(row) + static_cast<uint64_t>(a.row_offset), seed, eps);
      for (int i = 0; i < 4; ++i) backward_element(mu[i], logvar[i], eps[i], dz[i], half_dkl, dmu[i], dlogvar[i]);
      store<Format>(a.dmu, row, a.columns, column, count, aligned, dmu);
      store<Format>(a.dlogvar, row, a.columns, column, count, aligned, dlogvar);
    }
  }
}

template <class T>
bool aligned(const void* base, int64_t stride) {  // nullptr, for what a direction does not use, is aligned
  return reinterpret_cast<uintptr_t>(base) % alignof(Four<T>) == 0 && stride * sizeof(T) % alignof(Four<T>) == 0;
}

template <class T>
bool all_aligned(const Arguments& a) {
  return aligned<T>(a.mu, a.mu_stride) && aligned<T>(a.logvar, a.logvar_stride) && aligned<T>(a.dz, a.dz_stride) &&
         aligned<T>(a.z, a.columns) && aligned<T>(a.dmu, a.columns) && aligned<T>(a.dlogvar, a.columns);
}

template <class Format>
int launch(void (*kernel)(Arguments, bool), const Arguments& a, void* stream) {
  const bool is_long = a.columns > long_row;
  cudaLaunchConfig_t config = {};
  config.blockDim = is_long ? dim3(long_row_threads, 1, 1) : dim3(warp, rows_per_block, 1);
  const int64_t blocks = (a.rows + config.blockDim.y - 1) / config.blockDim.y;
  config.gridDim = dim3(blocks < PEGASUS_MAX_BLOCKS ? static_cast<unsigned>(blocks) : PEGASUS_MAX_BLOCKS, 1, 1);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, a, all_aligned<typename Format::Element>(a));
  if (error != cudaSuccess) cudaGetLastError();  // reported here, so not again by the next call that asks
  return error;
}

}  // namespace

int cuda_forward(const Arguments& a, Dtype dtype, void* stream) {
  switch (dtype) {
    case float32: return launch<Float32>(forward_kernel<Float32>, a, stream);
    case float64: return launch<Float64>(forward_kernel<Float64>, a, stream);
    case bfloat16: return launch<Short<Bfloat16Bits>>(forward_kernel<Short<Bfloat16Bits>>, a, stream);
    case float16: return launch<Short<Float16Bits>>(forward_kernel<Short<Float16Bits>>, a, stream);
    default: return cudaErrorInvalidValue;
  }
}

int cuda_backward(const Arguments& a, Dtype dtype, void* stream) {
  switch (dtype) {
    case float32: return launch<Float32>(backward_kernel<Float32>, a, stream);
    case float64: return launch<Float64>(backward_kernel<Float64>, a, stream);
    case bfloat16: return launch<Short<Bfloat16Bits>>(backward_kernel<Short<Bfloat16Bits>>, a, stream);
    case float16: return launch<Short<Float16Bits>>(backward_kernel<Short<Float16Bits>>, a, stream);
    default: return cudaErrorInvalidValue;
  }
}

const char* cuda_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pegasus
