// CPU kernels of the training step, of one instruction set: Adam, a gradient's length, SiLU after a group norm, and
// the squared error. setup.py compiles this file once for each, as cpu.cpp, and for the same reasons: bits depend
// neither on the instruction set nor on the threads. Numbers below 1e-38 are zero.
#include "kernels.h"
#include "vectors.h"

namespace pegasus {
namespace PEGASUS_LEVEL {

static PEGASUS_INLINE Vector load(const float* from) { return Float32::load(from); }

static PEGASUS_INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// ---- Adam (Kingma and Ba 2015) ----

template <class F>
static PEGASUS_INLINE F adam_element(const Adam& a, F weight, F grad, F& mean, F& square) {
  grad = grad * a.scale;
  mean = mean + (grad - mean) * a.fresh1;
  square = square * a.beta2 + grad * grad * a.fresh2;
  return weight - mean * a.rate / (Lanes<F>::root(square) * a.root_correction + a.epsilon);
}

static PEGASUS_INLINE float widened(float x) { return x; }
static PEGASUS_INLINE float widened(uint16_t x) { return Bfloat16Bits::widen<float>(x); }

template <class Format>
static __attribute__((noinline)) void adam_range(const Adam& a, int64_t first, int64_t last) {
  using Element = typename Format::Element;
  const Element* grad = static_cast<const Element*>(a.grad);
  int64_t i = first;
  for (; i + width <= last; i += width) {
    Vector mean = load(a.mean + i), square = load(a.square + i);
    Vector weight = adam_element<Vector>(a, load(a.weight + i), Format::load(grad + i), mean, square);
    Float32::store(a.mean + i, mean);
    Float32::store(a.square + i, square);
    Float32::store(a.weight + i, weight);
    if (a.bf16) Bfloat16::store(a.bf16 + i, weight);
  }
  for (; i < last; ++i) {
    a.weight[i] = adam_element<float>(a, a.weight[i], widened(grad[i]), a.mean[i], a.square[i]);
    if (a.bf16) a.bf16[i] = static_cast<uint16_t>(Bfloat16Bits::narrow<float>(a.weight[i]));
  }
}

template <class Format>
static __attribute__((noinline)) float squares_range(const void* values, int64_t first, int64_t last) {
  const auto* x = static_cast<const typename Format::Element*>(values);
  Vector sums[lanes / width] = {};
  int64_t i = first;
  for (; i + lanes <= last; i += lanes)
    PEGASUS_UNROLL
    for (int v = 0; v < lanes / width; ++v) {
      Vector part = Format::load(x + i + v * width);
      sums[v] += part * part;
    }
  float lane[lanes];
  __builtin_memcpy(lane, sums, sizeof lane);
  for (; i < last; ++i) lane[i % lanes] += widened(x[i]) * widened(x[i]);
  return fold(lane);
}

// ---- SiLU(group norm), channels innermost and a multiple of `lanes` ----

// Of each channel, float (channels,): the group's mean, and what makes weight * (x - mean) / std + bias of x.
struct Affine {
  float *mean, *scale, *offset;
};

static PEGASUS_INLINE void fill(const Affine& to, const GroupNorm& a, int64_t image) {
  const int64_t size = a.channels / a.groups;
  const float *weight = a.weight + image * a.weight_stride, *bias = a.bias + image * a.bias_stride;
  for (int64_t group = 0; group < a.groups; ++group) {
    const float mean = a.mean[image * a.groups + group], inverse = a.inverse[image * a.groups + group];
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      to.mean[c] = mean;
      to.scale[c] = inverse * weight[c];
      to.offset[c] = bias[c] - mean * to.scale[c];
    }
  }
}

constexpr int wide = 32;  // channels taken through all places at a time: of bfloat16 as many as a cache line holds

// First value, and sums of the differences from it and of their squares, of n vectors of channels: so a large mean
// costs no digits.
template <class Format, int n, class Element>
static PEGASUS_INLINE void add_up(const GroupNorm& a, const Element* x, float* first, float* sum, float* square) {
  Vector start[n], s[n] = {}, q[n] = {};
  for (int v = 0; v < n; ++v) start[v] = Format::load(x + v * width);
  for (int64_t place = 1; place < a.places; ++place)
    PEGASUS_UNROLL
    for (int v = 0; v < n; ++v) {
      Vector d = Format::load(x + place * a.channels + v * width) - start[v];
      s[v] += d;
      q[v] += d * d;
    }
  __builtin_memcpy(first, start, sizeof start);
  __builtin_memcpy(sum, s, sizeof s);
  __builtin_memcpy(square, q, sizeof q);
}

// Mean and 1 / std of one image's groups. scratch: 3 * channels.
template <class Format, class Element>
static PEGASUS_INLINE void moments(const GroupNorm& a, const Element* x, float* scratch, float* mean, float* inverse) {
  float *first = scratch, *sum = scratch + a.channels, *square = sum + a.channels;
  int64_t at = 0;
  for (; at + wide <= a.channels; at += wide)
    add_up<Format, wide / width>(a, x + at, first + at, sum + at, square + at);
  for (; at < a.channels; at += lanes) add_up<Format, lanes / width>(a, x + at, first + at, sum + at, square + at);
  const int64_t size = a.channels / a.groups;
  const double places = static_cast<double>(a.places), share = 1 / places, values = places * static_cast<double>(size);
  for (int64_t group = 0; group < a.groups; ++group) {
    double total = 0, spread = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) total += first[c] * places + sum[c];
    const double middle = total / values;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      const double own = sum[c] * share, away = first[c] + own - middle;
      spread += square[c] - sum[c] * own + places * away * away;
    }
    mean[group] = static_cast<float>(middle);
    inverse[group] = static_cast<float>(1 / sqrt((spread < 0 ? 0 : spread) / values + a.epsilon));
  }
}

template <class Format>
static __attribute__((noinline)) void norm_images(const GroupNorm& a, float* scratch, int64_t first, int64_t last) {
  using Element = typename Format::Element;
  const Affine affine{scratch, scratch + a.channels, scratch + 2 * a.channels};
  for (int64_t image = first; image < last; ++image) {
    const Element* x = static_cast<const Element*>(a.x) + image * a.places * a.channels;
    Element* y = static_cast<Element*>(a.y) + image * a.places * a.channels;
    moments<Format>(a, x, scratch + 3 * a.channels, a.mean + image * a.groups, a.inverse + image * a.groups);
    fill(affine, a, image);
    for (int64_t place = 0; place < a.places; ++place, x += a.channels, y += a.channels)
      for (int64_t c = 0; c < a.channels; c += width) {
        Vector u = Format::load(x + c) * load(affine.scale + c) + load(affine.offset + c);
        Format::store(y + c, u * sigmoid(u));
      }
  }
}

// du = dy * dSiLU(u)/du, (places, channels), with SiLU(u) = u s, s = 1 / (1 + exp(-u)); its sums over places, dbias and
// dweight, the latter still without its factor 1 / std; for n vectors of channels from `c` on.
template <class Format, int n, class Element>
static PEGASUS_INLINE void silu_backward(const GroupNorm& a, const Affine& affine, int64_t c, const Element* x,
                                         const Element* dy, float* du, float* dweight, float* dbias) {
  Vector mean[n], scale[n], offset[n], total[n] = {}, along[n] = {};
  __builtin_memcpy(mean, affine.mean + c, sizeof mean);
  __builtin_memcpy(scale, affine.scale + c, sizeof scale);
  __builtin_memcpy(offset, affine.offset + c, sizeof offset);
  for (int64_t place = 0; place < a.places; ++place)
    PEGASUS_UNROLL
    for (int v = 0; v < n; ++v) {
      const int64_t at = place * a.channels + c + v * width;
      Vector value = Format::load(x + at), u = value * scale[v] + offset[v], s = sigmoid(u);
      Vector d = Format::load(dy + at) * s * (1.0f + u * (1.0f - s));
      Float32::store(du + at, d);
      total[v] += d;
      along[v] += d * (value - mean[v]);
    }
  __builtin_memcpy(dbias + c, total, sizeof total);
  __builtin_memcpy(dweight + c, along, sizeof along);
}

// dx = weight / std * du - 1 / std * mean(weight du) - (x - mean) / std^2 * mean(weight du (x - mean) / std), the means
// over a group, as slope * du + affine.scale * x + affine.offset. dweight comes in without its 1 / std.
static PEGASUS_INLINE void solve(const GroupNorm& a, int64_t image, float* dweight, const float* dbias,
                                 const Affine& affine, float* slope) {
  const int64_t size = a.channels / a.groups;
  const float* weight = a.weight + image * a.weight_stride;
  for (int64_t group = 0; group < a.groups; ++group) {
    const float inverse = a.inverse[image * a.groups + group];
    double flat = 0, along = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      dweight[c] *= inverse;
      flat += static_cast<double>(weight[c]) * dbias[c];
      along += static_cast<double>(weight[c]) * dweight[c];
    }
    const double values = static_cast<double>(size * a.places);
    const float tilt = static_cast<float>(-along / values) * inverse * inverse;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      slope[c] = weight[c] * inverse;
      affine.scale[c] = tilt;
      affine.offset[c] = static_cast<float>(-flat / values) * inverse - tilt * affine.mean[c];
    }
  }
}

template <class Format>
static __attribute__((noinline)) void norm_images_backward(const GroupNorm& a, float* scratch, int64_t first,
                                                           int64_t last) {
  using Element = typename Format::Element;
  const Affine affine{scratch, scratch + a.channels, scratch + 2 * a.channels};
  float *slope = scratch + 3 * a.channels, *du = scratch + 4 * a.channels;
  for (int64_t image = first; image < last; ++image) {
    const int64_t start = image * a.places * a.channels, end = a.places * a.channels;
    const Element *x = static_cast<const Element*>(a.x) + start, *dy = static_cast<const Element*>(a.dy) + start;
    Element* dx = static_cast<Element*>(a.dx) + start;
    float *dweight = a.dweight + image * a.channels, *dbias = a.dbias + image * a.channels;
    fill(affine, a, image);
    int64_t at = 0;
    for (; at + wide <= a.channels; at += wide)
      silu_backward<Format, wide / width>(a, affine, at, x, dy, du, dweight, dbias);
    for (; at < a.channels; at += lanes)
      silu_backward<Format, lanes / width>(a, affine, at, x, dy, du, dweight, dbias);
    solve(a, image, dweight, dbias, affine, slope);
    for (int64_t place = 0; place < end; place += a.channels)
      for (int64_t c = 0; c < a.channels; c += width) {
        Vector flat = Format::load(x + place + c) * load(affine.scale + c) + load(affine.offset + c);
        Format::store(dx + place + c, load(du + place + c) * load(slope + c) + flat);
      }
  }
}

// ---- squared error of sigmoids, pixels a multiple of `lanes` ----

template <class Format>
static __attribute__((noinline)) void error_images(const SquaredError& a, int64_t first, int64_t last) {
  for (int64_t image = first; image < last; ++image) {
    const auto* logits = static_cast<const typename Format::Element*>(a.logits) + image * a.pixels;
    const float* x = a.x + image * a.pixels;
    Vector sums[lanes / width] = {};
    for (int64_t i = 0; i < a.pixels; i += lanes)
      PEGASUS_UNROLL
      for (int v = 0; v < lanes / width; ++v) {
        Vector error = load(x + i + v * width) - sigmoid(Format::load(logits + i + v * width));
        sums[v] += error * error;
      }
    float lane[lanes];
    __builtin_memcpy(lane, sums, sizeof lane);
    a.sse[image] = fold(lane);
  }
}

template <class Format>
static __attribute__((noinline)) void error_images_backward(const SquaredError& a, int64_t first, int64_t last) {
  using Element = typename Format::Element;
  for (int64_t image = first; image < last; ++image)
    for (int64_t i = image * a.pixels; i < (image + 1) * a.pixels; i += width) {
      Vector y = sigmoid(Format::load(static_cast<const Element*>(a.logits) + i));
      Vector slope = (2.0f * a.dsse[image]) * (y - load(a.x + i));
      Format::store(static_cast<Element*>(a.dlogits) + i, slope * (y * (1.0f - y)));
    }
}

constexpr auto flushing = FloatState::flushing;

extern const StepKernels step_kernels = {
    {in_state<flushing, adam_range<Float32>>, in_state<flushing, adam_range<Bfloat16>>},
    {in_state<flushing, squares_range<Float32>>, in_state<flushing, squares_range<Bfloat16>>},
    {in_state<flushing, norm_images<Float32>>, in_state<flushing, norm_images<Bfloat16>>},
    {in_state<flushing, norm_images_backward<Float32>>, in_state<flushing, norm_images_backward<Bfloat16>>},
    {in_state<flushing, error_images<Float32>>, in_state<flushing, error_images<Bfloat16>>},
    {in_state<flushing, error_images_backward<Float32>>, in_state<flushing, error_images_backward<Bfloat16>>},
};

}  // namespace PEGASUS_LEVEL
}  // namespace pegasus
