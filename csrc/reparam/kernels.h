// The op's kernels and their arguments. Plain types only: the files that are compiled for one
// instruction set include this.
#pragma once
#include <stdint.h>

namespace pegasus {

enum Dtype { float32, float64, bfloat16, float16, dtypes };

constexpr int inputs[2] = {2, 3};   // forward: mu, logvar; backward: mu, logvar, dz
constexpr int outputs[2] = {1, 2};  // forward: z; backward: dmu, dlogvar

// Columns of a row that a thread (CPU) or a block (CUDA) takes: a long row has several segments.
constexpr int64_t segment = 8192;

// Matrices (rows, columns) have adjacent columns; outputs are contiguous. Strides are in elements.
// kl and dkl: (rows,), float, or double where mu is.
struct Arguments {
  const void* in[3];
  int64_t stride[3];  // of inputs, from row to row
  void* out[2];
  void* kl;         // forward; null where it is not asked for
  double* sums;     // forward: room for 2 kl of each segment, (rows, segments)
  const void* dkl;  // backward; null where kl is not used
  int64_t dkl_stride;
  const int64_t* seed;
  int64_t rows, columns, segments, row_offset;
};

// Segments are numbered row by row.
using SegmentsKernel = void (*)(const Arguments&, int64_t first, int64_t last);

// Gives rows their kl from their segments' sums. Static: files compiled for an instruction set
// include this, and the linker might take their copy.
static inline void add_segments(const Arguments& a, Dtype dtype) {
  for (int64_t row = 0; row < a.rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < a.segments; ++i) sum += a.sums[row * a.segments + i];
    if (dtype == float64)
      static_cast<double*>(a.kl)[row] = sum / 2;
    else
      static_cast<float*>(a.kl)[row] = static_cast<float>(sum / 2);
  }
}

// The kernels of one instruction set, forward and backward.
struct CpuKernels {
  const char* level;  // the instruction set's name
  SegmentsKernel segments[2][dtypes];
};

namespace baseline { extern const CpuKernels kernels; }
namespace avx2 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }

// Queues a kernel on `stream`, a cudaStream_t; pointers are the device's. Returns null or an error.
const char* run_on_cuda(const Arguments&, Dtype, bool backward, void* stream);

}  // namespace pegasus
