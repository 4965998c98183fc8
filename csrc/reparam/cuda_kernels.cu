// The op on CUDA: a warp or, where it is long, a block of 256 threads takes a segment of a row, and
// a thread takes groups of four columns. The kl is summed by a fixed tree and without atomics, so
// that a device repeats its own bits.
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
constexpr int adding_threads = 128;

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

// The sum over a segment's threads, in every one of them.
template <class Real>
__device__ Real sum_of_segment(Real x) {
  for (int offset = warp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  if (blockDim.x == warp) return x;
  __shared__ Real sums[long_row_threads / warp];  // of the block's warps
  if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = x;
  __syncthreads();
  Real sum = 0;
  for (int i = 0; i < long_row_threads / warp; ++i) sum += sums[i];
  __syncthreads();  // the next segment writes `sums` again
  return sum;
}

// Returns the columns' share of 2 kl, or zero.
template <class Format, bool backward, class Real>
__device__ Real compute(const Arguments& a, Columns columns, uint64_t seed) {
  const uint64_t row = static_cast<uint64_t>(columns.row) + static_cast<uint64_t>(a.row_offset);
  constexpr int ins = inputs[backward], outs = outputs[backward];
  Real in[ins][4], eps[4], out[outs][4], sum = 0, half_dkl = 0;
  const Real* dkl = static_cast<const Real*>(a.dkl);
  if (backward && dkl) half_dkl = dkl[columns.row * a.dkl_stride] / 2;
  for (int i = 0; i < ins; ++i) load<Format>(a.in[i], a.stride[i], columns, in[i]);
  normals_of_group<Real>(columns.first / 4, row, seed, eps);
  for (int i = 0; i < 4; ++i) {
    if constexpr (backward)
      backward_element(in[0][i], in[1][i], eps[i], in[2][i], dkl != nullptr, half_dkl, out[0][i],
                       out[1][i]);
    else
      sum += forward_element(in[0][i], in[1][i], eps[i], out[0][i]);
  }
  for (int i = 0; i < outs; ++i) store<Format>(a.out[i], a.columns, columns, out[i]);
  return sum;
}

template <class Format, bool backward>
__global__ void compute_segments(Arguments a, bool aligned) {
  using Real = typename Format::Real;
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (; index < a.rows * a.segments; index += step) {
    const int64_t row = index / a.segments, start = index % a.segments * segment;
    const int64_t end = a.columns - start < segment ? a.columns : start + segment;
    Real sum = 0;
    for (int64_t first = start + 4 * threadIdx.x; first < end; first += 4 * blockDim.x) {
      const int64_t left = end - first;
      const Columns columns{row, first, left < 4 ? static_cast<int>(left) : 4, aligned};
      sum += compute<Format, backward, Real>(a, columns, seed);
    }
    if (backward || !a.kl) continue;
    sum = sum_of_segment(sum);
    if (threadIdx.x > 0) continue;
    if (a.segments == 1)
      static_cast<Real*>(a.kl)[row] = sum / 2;
    else
      a.sums[index] = sum;
  }
}

// A row's kl from its segments.
template <class Real>
__global__ void sum_segments(Arguments a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = blockIdx.x * blockDim.x + threadIdx.x; row < a.rows; row += step) {
    double sum = 0;
    for (int64_t i = 0; i < a.segments; ++i) sum += a.sums[row * a.segments + i];
    static_cast<Real*>(a.kl)[row] = static_cast<Real>(sum / 2);
  }
}

cudaLaunchConfig_t configure(int64_t blocks, dim3 threads, void* stream) {
  const int64_t most = PEGASUS_MAX_BLOCKS;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < most ? blocks : most), 1, 1);
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

// Whether all rows of all matrices begin where four elements can be moved at once.
template <class T>
bool is_aligned(const Arguments& a, bool backward) {
  uintptr_t addresses = a.columns * sizeof(T);
  for (int i = 0; i < inputs[backward]; ++i)
    addresses |= reinterpret_cast<uintptr_t>(a.in[i]) | a.stride[i] * sizeof(T);
  for (int i = 0; i < outputs[backward]; ++i) addresses |= reinterpret_cast<uintptr_t>(a.out[i]);
  return addresses % alignof(Four<T>) == 0;
}

template <class Format>
cudaError_t launch(const Arguments& a, bool backward, void* stream) {
  const bool is_long = a.columns > long_row;
  const dim3 threads = is_long ? dim3(long_row_threads, 1, 1) : dim3(warp, rows_per_block, 1);
  const int64_t blocks = (a.rows * a.segments + threads.y - 1) / threads.y;
  const bool aligned = is_aligned<typename Format::Element>(a, backward);
  const auto kernel = backward ? compute_segments<Format, true> : compute_segments<Format, false>;
  const cudaLaunchConfig_t config = configure(blocks, threads, stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, a, aligned);
  if (error == cudaSuccess && !backward && a.kl && a.segments > 1) {
    const int64_t row_blocks = (a.rows + adding_threads - 1) / adding_threads;
    const cudaLaunchConfig_t adding = configure(row_blocks, dim3(adding_threads, 1, 1), stream);
    error = cudaLaunchKernelEx(&adding, sum_segments<typename Format::Real>, a);
  }
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
