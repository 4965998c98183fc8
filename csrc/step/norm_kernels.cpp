// SiLU after a group norm, and its gradient, for one instruction set: setup.py compiles this file
// once for each. Bits depend neither on the instruction set nor on the threads. Numbers below 1e-38
// count as zero. Channels are innermost and a multiple of 16.
#include "../reparam/vectors.h"
#include "kernels.h"

namespace pegasus::PEGASUS_LEVEL {

static PEGASUS_INLINE Vector load(const float* from) { return load<Vector, Float32>(from); }

static PEGASUS_INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x).value); }

// Numbers of each channel: its group's mean, and scale and offset with which the normalized value
// weight * (x - mean) / std + bias is scale * x + offset.
struct Affine {
  float *mean, *scale, *offset;
};

static PEGASUS_INLINE void fill_affine(const Affine& to, const GroupNorm& a, int64_t image) {
  const int64_t size = a.channels / a.groups;
  const float* weight = a.weight + image * a.weight_stride;
  const float* bias = a.bias + image * a.bias_stride;
  for (int64_t group = 0; group < a.groups; ++group) {
    const float mean = a.mean[image * a.groups + group];
    const float inverse = a.inverse[image * a.groups + group];
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      to.mean[c] = mean;
      to.scale[c] = inverse * weight[c];
      to.offset[c] = bias[c] - mean * to.scale[c];
    }
  }
}

// Channels that one loop over the pixels takes: in bfloat16 as many as a cache line holds.
constexpr int wide = 32;

// For n vectors of channels: the first pixel's values, and sums of the other pixels' differences
// from them and of the differences' squares. A large mean costs no digits that way.
template <class Format, int n, class Element>
static PEGASUS_INLINE void sum_pixels(const GroupNorm& a, const Element* x, float* first,
                                      float* sum, float* square) {
  Vector start[n];
  Vector s[n] = {};
  Vector q[n] = {};
  for (int v = 0; v < n; ++v) start[v] = load<Vector, Format>(x + v * width);
  for (int64_t pixel = 1; pixel < a.pixels; ++pixel)
    PEGASUS_UNROLL
    for (int v = 0; v < n; ++v) {
      Vector d = load<Vector, Format>(x + pixel * a.channels + v * width) - start[v];
      s[v] += d;
      q[v] += d * d;
    }
  __builtin_memcpy(first, start, sizeof start);
  __builtin_memcpy(sum, s, sizeof s);
  __builtin_memcpy(square, q, sizeof q);
}

// Mean and 1 / std of one image's groups. scratch: 3 * channels.
template <class Format, class Element>
static PEGASUS_INLINE void moments(const GroupNorm& a, const Element* x, float* scratch,
                                   float* mean, float* inverse) {
  float* first = scratch;
  float* sum = scratch + a.channels;
  float* square = sum + a.channels;
  int64_t at = 0;
  for (; at + wide <= a.channels; at += wide)
    sum_pixels<Format, wide / width>(a, x + at, first + at, sum + at, square + at);
  for (; at < a.channels; at += lanes)
    sum_pixels<Format, lanes / width>(a, x + at, first + at, sum + at, square + at);
  const int64_t size = a.channels / a.groups;
  const double pixels = static_cast<double>(a.pixels);
  const double share = 1 / pixels;
  const double values = pixels * static_cast<double>(size);
  for (int64_t group = 0; group < a.groups; ++group) {
    double total = 0;
    double squares = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c)
      total += first[c] * pixels + sum[c];
    const double group_mean = total / values;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      const double shift = sum[c] * share;  // from the first pixel's value to the channel's mean
      const double distance = first[c] + shift - group_mean;
      squares += square[c] - sum[c] * shift + pixels * distance * distance;
    }
    const double variance = (squares < 0 ? 0 : squares) / values;
    mean[group] = static_cast<float>(group_mean);
    inverse[group] = static_cast<float>(1 / sqrt(variance + a.epsilon));
  }
}

template <class Format>
static __attribute__((noinline)) void forward_images(const GroupNorm& a, float* scratch,
                                                     int64_t first, int64_t last) {
  using Element = typename Format::Element;
  const Affine affine{scratch, scratch + a.channels, scratch + 2 * a.channels};
  for (int64_t image = first; image < last; ++image) {
    const Element* x = static_cast<const Element*>(a.x) + image * a.pixels * a.channels;
    Element* y = static_cast<Element*>(a.y) + image * a.pixels * a.channels;
    moments<Format>(a, x, scratch + 3 * a.channels, a.mean + image * a.groups,
                    a.inverse + image * a.groups);
    fill_affine(affine, a, image);
    for (int64_t pixel = 0; pixel < a.pixels; ++pixel, x += a.channels, y += a.channels)
      for (int64_t c = 0; c < a.channels; c += width) {
        Vector u = load<Vector, Format>(x + c) * load(affine.scale + c) + load(affine.offset + c);
        store<Vector, Format>(y + c, u * sigmoid(u));
      }
  }
}

// du = dy * SiLU'(u), (pixels, channels), where SiLU(u) = u s and s = 1 / (1 + exp(-u)), and its
// sums over pixels: dbias, and dweight without its factor 1 / std. For n vectors of channels.
template <class Format, int n, class Element>
static PEGASUS_INLINE void silu_backward(const GroupNorm& a, const Affine& affine, int64_t c,
                                         const Element* x, const Element* dy, float* du,
                                         float* dweight, float* dbias) {
  Vector mean[n];
  Vector scale[n];
  Vector offset[n];
  Vector sum[n] = {};
  Vector sum_with_x[n] = {};
  __builtin_memcpy(mean, affine.mean + c, sizeof mean);
  __builtin_memcpy(scale, affine.scale + c, sizeof scale);
  __builtin_memcpy(offset, affine.offset + c, sizeof offset);
  for (int64_t pixel = 0; pixel < a.pixels; ++pixel)
    PEGASUS_UNROLL
    for (int v = 0; v < n; ++v) {
      const int64_t at = pixel * a.channels + c + v * width;
      Vector value = load<Vector, Format>(x + at);
      Vector u = value * scale[v] + offset[v];
      Vector s = sigmoid(u);
      Vector d = load<Vector, Format>(dy + at) * s * (1.0f + u * (1.0f - s));
      store<Vector, Float32>(du + at, d);
      sum[v] += d;
      sum_with_x[v] += d * (value - mean[v]);
    }
  __builtin_memcpy(dbias + c, sum, sizeof sum);
  __builtin_memcpy(dweight + c, sum_with_x, sizeof sum_with_x);
}

// Finish dweight, and prepare dx as slope * du + affine.scale * x + affine.offset:
//
//   dx = weight / std * du - mean(weight du) / std
//        - (x - mean) / std^2 * mean(weight du (x - mean) / std),  means over a group.
static PEGASUS_INLINE void solve(const GroupNorm& a, int64_t image, float* dweight,
                                 const float* dbias, const Affine& affine, float* slope) {
  const int64_t size = a.channels / a.groups;
  const float* weight = a.weight + image * a.weight_stride;
  for (int64_t group = 0; group < a.groups; ++group) {
    const float inverse = a.inverse[image * a.groups + group];
    double sum = 0;
    double sum_with_x = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      dweight[c] *= inverse;
      sum += static_cast<double>(weight[c]) * dbias[c];
      sum_with_x += static_cast<double>(weight[c]) * dweight[c];
    }
    const double values = static_cast<double>(size * a.pixels);
    const float scale = static_cast<float>(-sum_with_x / values) * inverse * inverse;
    const float constant = static_cast<float>(-sum / values) * inverse;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      slope[c] = weight[c] * inverse;
      affine.scale[c] = scale;
      affine.offset[c] = constant - scale * affine.mean[c];
    }
  }
}

template <class Format>
static __attribute__((noinline)) void backward_images(const GroupNorm& a, float* scratch,
                                                      int64_t first, int64_t last) {
  using Element = typename Format::Element;
  const Affine affine{scratch, scratch + a.channels, scratch + 2 * a.channels};
  float* slope = scratch + 3 * a.channels;
  float* du = scratch + 4 * a.channels;
  const int64_t size = a.pixels * a.channels;
  for (int64_t image = first; image < last; ++image) {
    const Element* x = static_cast<const Element*>(a.x) + image * size;
    const Element* dy = static_cast<const Element*>(a.dy) + image * size;
    Element* dx = static_cast<Element*>(a.dx) + image * size;
    float* dweight = a.dweight + image * a.channels;
    float* dbias = a.dbias + image * a.channels;
    fill_affine(affine, a, image);
    int64_t at = 0;
    for (; at + wide <= a.channels; at += wide)
      silu_backward<Format, wide / width>(a, affine, at, x, dy, du, dweight, dbias);
    for (; at < a.channels; at += lanes)
      silu_backward<Format, lanes / width>(a, affine, at, x, dy, du, dweight, dbias);
    solve(a, image, dweight, dbias, affine, slope);
    for (int64_t pixel = 0; pixel < size; pixel += a.channels)
      for (int64_t c = 0; c < a.channels; c += width) {
        Vector value = load<Vector, Format>(x + pixel + c);
        Vector rest = value * load(affine.scale + c) + load(affine.offset + c);
        store<Vector, Format>(dx + pixel + c, load(du + pixel + c) * load(slope + c) + rest);
      }
  }
}

constexpr auto flushing = FloatState::flushing;

extern const NormKernels norm_kernels = {
    PEGASUS_LEVEL_NAME,
    {in_state<flushing, forward_images<Float32>>, in_state<flushing, forward_images<Bfloat16>>},
    {in_state<flushing, backward_images<Float32>>, in_state<flushing, backward_images<Bfloat16>>},
};

}  // namespace pegasus::PEGASUS_LEVEL
