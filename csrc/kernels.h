// What the kernels take, and which kernels there are: plain types, since the file of each instruction set includes it.
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

// Adam's step for one tensor: weight, moments and grad, which is float or bfloat16, all in one order. Bias corrections:
// rate = lr / (1 - beta1^t), root_correction = 1 / sqrt(1 - beta2^t). grad is multiplied by scale first.
struct Adam {
  float *weight, *mean, *square;
  const void* grad;
  uint16_t* bf16;  // where the weight goes in bfloat16 too, or null
  float rate, root_correction, fresh1, beta2, fresh2, epsilon, scale;  // fresh: 1 - beta
};

// SiLU(weight * (x - mean) / std + bias) with mean and std of each image's groups of channels, channels innermost:
// x, y, dy, dx (images, places, channels); weight and bias (images, channels), their rows a stride apart; mean and
// 1 / std float (images, groups).
struct GroupNorm {
  const void *x, *dy;
  void *y, *dx;
  const float *weight, *bias;
  float *mean, *inverse, *dweight, *dbias;
  int64_t weight_stride, bias_stride, places, channels, groups;
  float epsilon;
};

// sum (x - 1 / (1 + exp(-logits)))^2 of each image of so many pixels.
struct SquaredError {
  const void* logits;
  const float *x, *dsse;
  float* sse;
  void* dlogits;
  int64_t pixels;
};

// Kernels of the training step, by whether what they read is bfloat16 (1) or float (0).
struct StepKernels {
  void (*adam[2])(const Adam&, int64_t first, int64_t last);  // elements
  float (*squares[2])(const void* values, int64_t first, int64_t last);  // their sum
  void (*norm[2])(const GroupNorm&, float* scratch, int64_t first, int64_t last);  // images; scratch: 6 * channels
  void (*norm_backward[2])(const GroupNorm&, float* scratch, int64_t first, int64_t last);  // (places + 6) * channels
  void (*error[2])(const SquaredError&, int64_t first, int64_t last);  // images
  void (*error_backward[2])(const SquaredError&, int64_t first, int64_t last);
};

// Float images (rows, columns, channels) of whole tiles of 4 x 4 places, and their Winograd planes (tiles.cpp): 36 of
// (tiles, channels), a stride apart, each a matrix of its own in the products. bias: (channels,), or null. outside: so
// many zeros, for places beyond an image.
struct Tiles {
  float *images, *planes;
  const float *bias, *outside;
  int64_t rows, columns, channels, stride;

  float* place(int64_t image, int64_t row, int64_t column) const {
    return images + ((image * rows + row) * columns + column) * channels;
  }
};

struct TileKernels {
  void (*take[2])(const Tiles&, int64_t first, int64_t last);  // images to planes: of inputs (0), of gradients (1)
  void (*give)(const Tiles&, int64_t first, int64_t last);  // planes to images of outputs
};

namespace baseline {
extern const CpuKernels kernels;
extern const StepKernels step_kernels;
extern const TileKernels tile_kernels;
}  // namespace baseline
namespace avx2 {
extern const CpuKernels kernels;
extern const StepKernels step_kernels;
extern const TileKernels tile_kernels;
}  // namespace avx2
namespace avx512 {
extern const CpuKernels kernels;
extern const StepKernels step_kernels;
extern const TileKernels tile_kernels;
}  // namespace avx512

const StepKernels& chosen_step_kernels();  // this processor's, or PEGASUS_SIMD's
const TileKernels& chosen_tile_kernels();

// Queue a kernel on `stream` (a cudaStream_t); the pointers are the device's. Returns a cudaError_t, 0 for success.
int cuda_forward(const Arguments&, Dtype, void* stream);
int cuda_backward(const Arguments&, Dtype, void* stream);
const char* cuda_message(int error);

}  // namespace pegasus
