// What the kernels take, and which kernels there are. Plain C: the files compiled with higher flags include it.
#pragma once
#include <stdint.h>

namespace pegasus {

enum Dtype { float32, float64, bfloat16, float16, dtypes };

// Both directions in one record. Strides are in elements and run from row to row (dkl: from element to element);
// columns are adjacent. kl and dkl are float, or double for float64.
struct Arguments {
  const void *mu, *logvar;
  const int64_t* seed;
  void *z, *kl;            // forward
  const void *dz, *dkl;    // backward
  void *dmu, *dlogvar;     // backward
  int64_t rows, columns, row_offset;
  int64_t mu_stride, logvar_stride, dz_stride, dkl_stride;  // outputs are contiguous
};

using RangeKernel = void (*)(const Arguments&, int64_t first_row, int64_t last_row);

// One instruction set's kernels, by Dtype.
struct CpuKernels {
  const char* level;
  RangeKernel forward[dtypes], backward[dtypes];
};

namespace baseline {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}

// Queue a kernel on `stream` (a cudaStream_t); the pointers are the device's. Returns a cudaError_t, 0 for success.
int cuda_forward(const Arguments&, Dtype, void* stream);
int cuda_backward(const Arguments&, Dtype, void* stream);
const char* cuda_message(int error);

}  // namespace pegasus
