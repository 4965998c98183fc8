// The kernels of pegasus_step and their arguments. Plain types only: the files that are compiled
// for one instruction set include this.
#pragma once
#include <stdint.h>

namespace pegasus {

// SiLU(weight * (x - mean) / std + bias), mean and std of each image's groups of channels.
// x, y, dy, dx: (images, pixels, channels), float or bfloat16, channels innermost. weight, bias:
// (images, channels), their rows a stride apart. mean, inverse (1 / std): float (images, groups).
struct GroupNorm {
  const void *x, *dy;
  void *y, *dx;
  const float *weight, *bias;
  float *mean, *inverse, *dweight, *dbias;
  int64_t weight_stride, bias_stride, pixels, channels, groups;
  float epsilon;
};

using NormKernel = void (*)(const GroupNorm&, float* scratch, int64_t first, int64_t last);

// The kernels of one instruction set, by whether x is bfloat16 (1) or float (0), for images first
// to last. scratch: 6 * channels numbers, and pixels * channels more for the backward.
struct NormKernels {
  const char* level;  // the instruction set's name
  NormKernel forward[2], backward[2];
};

// Float images (rows, columns, channels), cut into tiles of 4 x 4 pixels (weights: 3 x 3), and the
// tiles' 36 Winograd planes (tiles, channels), a stride apart, each a matrix in the products.
// bias: (channels,) or null. zeros: (channels,), read for pixels beyond an image.
struct Tiles {
  float *images, *planes;
  const float *bias, *zeros;
  int64_t rows, columns, channels, stride;
};

using TilesKernel = void (*)(const Tiles&, int64_t first, int64_t last);

// For images first to last.
struct TileKernels {
  const char* level;
  TilesKernel inputs_to_planes, gradients_to_planes, planes_to_outputs;
  // weights (K, 3, 3, C) as K images of one tile; turned: by half a turn
  TilesKernel weights_to_planes, turned_weights_to_planes, planes_to_weights;
};

namespace baseline {
extern const NormKernels norm_kernels;
extern const TileKernels tile_kernels;
}  // namespace baseline
namespace avx2 {
extern const NormKernels norm_kernels;
extern const TileKernels tile_kernels;
}  // namespace avx2
namespace avx512 {
extern const NormKernels norm_kernels;
extern const TileKernels tile_kernels;
}  // namespace avx512

const NormKernels& norm_kernels();  // this processor's, or PEGASUS_SIMD's
const TileKernels& tile_kernels();

}  // namespace pegasus
