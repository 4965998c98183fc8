// The op on CUDA: a warp or, for a long row, a block of 256 threads takes a row, and a thread takes
// groups of four columns. The kl is summed by a fixed tree and without atomics, so that a device
// repeats its own bits.
#include <cuda_runtime.h>

#include "formulas.h"
#include "kernels.h"

#ifndef PEGASUS_MAX_BLOCKS  // of a grid; the tests set fewer, so that blocks take several rows
#define PEGASUS_MAX_BLOCKS 0x7FFFFFFF
#endif

namespace pegasus {
namespace {

using namespace scalar;

constexpr int warp = 32, rows_per_block = 4, long_row = 1024, long_row_threads = 256;

// Four elements that move in one access, or in two for double.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T value[4];
};

// Up to four columns of a row.
struct Columns {
  int64_t row, first;
  int count;
  bool aligned;  // for access to all four at once
};

template <class T>
__device__ void copy(T* to, const T* from, Columns columns) {
  if (columns.aligned && columns.count == 4) {
    *reinterpret_cast<Four<T>*>(to) = *reinterpret_cast<const Four<T>*>(from);
  } else {
    for (int i = 0; i < 4; ++i)  // not `i < count`: constant indices stay in registers
      if (i < columns.count) to[i] = from[i];
  }
}

// Columns past the end read as zero, which adds nothing to the kl.
template <class Format, class T = typename Format::Element, class Real = typename Format::Real>
__device__ void load(const void* base, int64_t stride, Columns columns, Real out[4]) {
  Four<T> four = {};
  copy(four.value, static_cast<const T*>(base) + columns.row * stride + columns.first, columns);
  for (int i = 0; i < 4; ++i) out[i] = Format::template widen<Real>(four.value[i]);
}

template <class Format, class T = typename Format::Element, class Real = typename Format::Real>
__device__ void store(void* base, int64_t stride, Columns columns, const Real in[4]) {
  Four<T> four;
  for (int i = 0; i < 4; ++i) four.value[i] = static_cast<T>(Format::template narrow<Real>(in[i]));
  copy(static_cast<T*>(base) + columns.row * stride + columns.first, four.value, columns);
}

// The sum over a row's threads, in every one of them.
template <class Real>
__device__ Real sum_of_row(Real x) {
  for (int offset = warp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  if (blockDim.x == warp) return x;
  __shared__ Real sums[long_row_threads / warp];  // of the block's warps
  if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = x;
  __syncthreads();
  Real sum = 0;
  for (int i = 0; i < long_row_threads / warp; ++i) sum += sums[i];
  __syncthreads();  // the next row writes `sums` again
  return sum;
}

// Returns the columns' share of 2 kl, or zero. half_dkl: half the gradient of the row's kl.
template <class Format, bool backward, class Real>
__device__ Real compute(const Arguments& a, Columns columns, uint64_t seed, Real half_dkl) {
  const uint64_t row = static_cast<uint64_t>(columns.row) + static_cast<uint64_t>(a.row_offset);
  constexpr int ins = inputs[backward], outs = outputs[backward];
  Real in[ins][4], eps[4], out[outs][4], sum = 0;
  for (int i = 0; i < ins; ++i) load<Format>(a.in[i], a.stride[i], columns, in[i]);
  normals_of_group<Real>(columns.first / 4, row, seed, eps);
  for (int i = 0; i < 4; ++i) {
    if constexpr (backward)
      backward_element(in[0][i], in[1][i], eps[i], in[2][i], half_dkl, out[0][i], out[1][i]);
    else
      sum += forward_element(in[0][i], in[1][i], eps[i], out[0][i]);
  }
  for (int i = 0; i < outs; ++i) store<Format>(a.out[i], a.columns, columns, out[i]);
  return sum;
}

template <class Format, bool backward>
__global__ void compute_rows(Arguments a, bool aligned) {
  using Real = typename Format::Real;
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (; row < a.rows; row += step) {
    Real half_dkl = 0, sum = 0;
    if constexpr (backward) half_dkl = static_cast<const Real*>(a.dkl)[row * a.dkl_stride] / 2;
    for (int64_t first = 4 * threadIdx.x; first < a.columns; first += 4 * blockDim.x) {
      const int64_t left = a.columns - first;
      const Columns columns{row, first, left < 4 ? static_cast<int>(left) : 4, aligned};
      sum += compute<Format, backward, Real>(a, columns, seed, half_dkl);
    }
    if constexpr (!backward) {
      sum = sum_of_row(sum);
      if (threadIdx.x == 0) static_cast<Real*>(a.kl)[row] = sum / 2;
    }
  }
}

template <class Format, class T = typename Format::Element>
cudaError_t launch(const Arguments& a, bool backward, void* stream) {
  const bool is_long = a.columns > long_row;
  cudaLaunchConfig_t config = {};
  config.blockDim = is_long ? dim3(long_row_threads, 1, 1) : dim3(warp, rows_per_block, 1);
  const int64_t blocks = (a.rows + config.blockDim.y - 1) / config.blockDim.y;
  const int64_t most = PEGASUS_MAX_BLOCKS;
  config.gridDim = dim3(static_cast<unsigned>(blocks < most ? blocks : most), 1, 1);
  config.stream = static_cast<cudaStream_t>(stream);
  uintptr_t addresses = a.columns * sizeof(T);
  for (int i = 0; i < inputs[backward]; ++i)
    addresses |= reinterpret_cast<uintptr_t>(a.in[i]) | a.stride[i] * sizeof(T);
  for (int i = 0; i < outputs[backward]; ++i) addresses |= reinterpret_cast<uintptr_t>(a.out[i]);
  const bool aligned = addresses % alignof(Four<T>) == 0;
  const auto kernel = backward ? compute_rows<Format, true> : compute_rows<Format, false>;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, a, aligned);
  if (error != cudaSuccess) cudaGetLastError();  // or the next call that asks reports it again
  return error;
}

}  // namespace

const char* run_on_cuda(const Arguments& a, Dtype dtype, bool backward, void* stream) {
  cudaError_t error = cudaErrorInvalidValue;
  if (dtype == float32) error = launch<Float32>(a, backward, stream);
  if (dtype == float64) error = launch<Float64>(a, backward, stream);
  if (dtype == bfloat16) error = launch<Bfloat16>(a, backward, stream);
  if (dtype == float16) error = launch<Float16>(a, backward, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pegasus
