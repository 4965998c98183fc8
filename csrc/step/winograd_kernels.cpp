// Transforms for 3 x 3 convolutions by Winograd's minimal filtering (Lavin and Gray 2016), for one
// instruction set: setup.py compiles this file once for each. Bits do not depend on it; those of
// the matrix products (winograd.cpp, MKL) may.
//
// 4 x 4 outputs of a channel depend on 6 x 6 inputs d. They are A' [G w G' * B' d B] A for the
// kernel w: 36 products instead of 144, which over all channels are 36 matrix products. Here are
// B' d B, G w G', A' m A and, of an output's gradient, A y A', with which the kernel's gradient is
// G' [A y A' * B' d B] G. Points 0, 1, -1, 2, -2 and infinity. Weights (K, 3, 3, C) are taken for K
// images of one tile.
#include "../reparam/vectors.h"
#include "kernels.h"

namespace pegasus::PEGASUS_LEVEL {

// One dimension of a transform: `inputs` vectors to `outputs`, `step` apart in both arrays.
struct InputTransform {  // B'
  static constexpr int inputs = 6, outputs = 6;
  static constexpr int tile = 4;    // pixels from one tile to the next
  static constexpr int margin = 1;  // pixels read before and behind the tile
  static PEGASUS_INLINE void run(const Vector* d, Vector* y, int step) {
    const Vector a = d[4 * step] - 4.0f * d[2 * step];
    const Vector b = d[3 * step] - 4.0f * d[step];
    const Vector e = d[4 * step] - d[2 * step];
    const Vector f = 2.0f * (d[3 * step] - d[step]);
    y[0] = 4.0f * d[0] - 5.0f * d[2 * step] + d[4 * step];
    y[step] = a + b;
    y[2 * step] = a - b;
    y[3 * step] = e + f;
    y[4 * step] = e - f;
    y[5 * step] = 4.0f * d[step] - 5.0f * d[3 * step] + d[5 * step];
  }
};

struct OutputTransform {  // A'
  static constexpr int inputs = 6, outputs = 4;
  static PEGASUS_INLINE void run(const Vector* m, Vector* y, int step) {
    const Vector a = m[step] + m[2 * step];
    const Vector b = m[step] - m[2 * step];
    const Vector e = m[3 * step] + m[4 * step];
    const Vector f = m[3 * step] - m[4 * step];
    y[0] = m[0] + a + e;
    y[step] = b + 2.0f * f;
    y[2 * step] = a + 4.0f * e;
    y[3 * step] = b + 8.0f * f + m[5 * step];
  }
};

struct GradientTransform {  // A
  static constexpr int inputs = 4, outputs = 6, tile = 4, margin = 0;
  static PEGASUS_INLINE void run(const Vector* d, Vector* y, int step) {
    const Vector a = d[0] + d[2 * step];
    const Vector b = d[step] + d[3 * step];
    const Vector e = d[0] + 4.0f * d[2 * step];
    const Vector f = 2.0f * d[step] + 8.0f * d[3 * step];
    y[0] = d[0];
    y[step] = a + b;
    y[2 * step] = a - b;
    y[3 * step] = e + f;
    y[4 * step] = e - f;
    y[5 * step] = d[3 * step];
  }
};

template <bool turned>  // by half a turn, for the gradient of inputs
struct WeightTransform {  // G
  static constexpr int inputs = 3, outputs = 6, tile = 3, margin = 0;
  static PEGASUS_INLINE void run(const Vector* w, Vector* y, int step) {
    const Vector first = w[turned ? 2 * step : 0];
    const Vector last = w[turned ? 0 : 2 * step];
    const Vector a = (-1 / 6.0f) * (first + last);
    const Vector b = (-1 / 6.0f) * w[step];
    const Vector e = (1 / 24.0f) * first + (1 / 6.0f) * last;
    const Vector f = (1 / 12.0f) * w[step];
    y[0] = 0.25f * first;
    y[step] = a + b;
    y[2 * step] = a - b;
    y[3 * step] = e + f;
    y[4 * step] = e - f;
    y[5 * step] = last;
  }
};

struct WeightGradientTransform {  // G'
  static constexpr int inputs = 6, outputs = 3;
  static PEGASUS_INLINE void run(const Vector* m, Vector* y, int step) {
    const Vector a = (-1 / 6.0f) * (m[step] + m[2 * step]);
    const Vector b = (-1 / 6.0f) * (m[step] - m[2 * step]);
    const Vector e = m[3 * step] + m[4 * step];
    const Vector f = m[3 * step] - m[4 * step];
    y[0] = 0.25f * m[0] + a + (1 / 24.0f) * e;
    y[step] = b + (1 / 12.0f) * f;
    y[2 * step] = a + (1 / 6.0f) * e + m[5 * step];
  }
};

template <class Transform>
static PEGASUS_INLINE void transform(const Vector* in, Vector* out) {
  constexpr int inputs = Transform::inputs;
  constexpr int outputs = Transform::outputs;
  Vector half[outputs * inputs];
  PEGASUS_UNROLL
  for (int column = 0; column < inputs; ++column)
    Transform::run(in + column, half + column, inputs);
  PEGASUS_UNROLL
  for (int row = 0; row < outputs; ++row)
    Transform::run(half + row * inputs, out + row * outputs, 1);
}

static PEGASUS_INLINE float* pixel(const Tiles& a, int64_t image, int64_t row, int64_t column) {
  return a.images + ((image * a.rows + row) * a.columns + column) * a.channels;
}

static PEGASUS_INLINE int64_t tiles_per_image(const Tiles& a, int tile) {
  return (a.rows / tile) * (a.columns / tile);
}

// One tile's numbers of all channels, from its pixels to the planes from `to` on.
template <class Transform>
static PEGASUS_INLINE void tile_to_planes(const Tiles& a, const float* const* pixels, float* to) {
  constexpr int inputs = Transform::inputs;
  for (int64_t c = 0; c < a.channels; c += width) {
    Vector in[inputs * inputs];
    Vector out[36];
    PEGASUS_UNROLL
    for (int i = 0; i < inputs; ++i)
      PEGASUS_UNROLL
      for (int j = 0; j < inputs; ++j)
        in[i * inputs + j] = load<Vector, Float32>(pixels[i * inputs + j] + c);
    transform<Transform>(in, out);
    PEGASUS_UNROLL
    for (int i = 0; i < 6; ++i)
      PEGASUS_UNROLL
      for (int j = 0; j < 6; ++j)
        store<Vector, Float32>(to + (i * 6 + j) * a.stride + c, out[i * 6 + j]);
  }
}

// Images to planes. Pixels beyond an image are zero.
template <class Transform>
static __attribute__((noinline)) void to_planes(const Tiles& arguments, int64_t first,
                                                int64_t last) {
  constexpr int inputs = Transform::inputs;
  constexpr int tile = Transform::tile;
  constexpr int margin = Transform::margin;
  const Tiles a = arguments;  // a copy, which the compiler knows that no store changes
  const float* pixels[inputs * inputs];
  float* to = a.planes + first * tiles_per_image(a, tile) * a.channels;
  for (int64_t image = first; image < last; ++image)
    for (int64_t row = -margin; row + tile <= a.rows; row += tile)
      for (int64_t column = -margin; column + tile <= a.columns; column += tile) {
        for (int i = 0; i < inputs * inputs; ++i) {
          const int64_t y = row + i / inputs;
          const int64_t x = column + i % inputs;
          const bool inside = y >= 0 && y < a.rows && x >= 0 && x < a.columns;
          pixels[i] = inside ? pixel(a, image, y, x) : a.zeros;
        }
        tile_to_planes<Transform>(a, pixels, to);
        to += a.channels;
      }
}

// Planes to images, plus the bias.
template <class Transform>
static __attribute__((noinline)) void to_outputs(const Tiles& arguments, int64_t first,
                                                 int64_t last) {
  constexpr int tile = Transform::outputs;
  const Tiles a = arguments;
  const float* from = a.planes + first * tiles_per_image(a, tile) * a.channels;
  for (int64_t image = first; image < last; ++image)
    for (int64_t row = 0; row < a.rows; row += tile)
      for (int64_t column = 0; column < a.columns; column += tile, from += a.channels)
        for (int64_t c = 0; c < a.channels; c += width) {
          Vector in[36];
          Vector out[tile * tile];
          Vector bias = {};
          if (a.bias) bias = load<Vector, Float32>(a.bias + c);
          PEGASUS_UNROLL
          for (int plane = 0; plane < 36; ++plane)
            in[plane] = load<Vector, Float32>(from + plane * a.stride + c);
          transform<Transform>(in, out);
          PEGASUS_UNROLL
          for (int i = 0; i < tile * tile; ++i) {
            float* to = pixel(a, image, row + i / tile, column + i % tile) + c;
            store<Vector, Float32>(to, out[i] + bias);
          }
        }
}

constexpr auto flushing = FloatState::flushing;

extern const TileKernels tile_kernels = {
    PEGASUS_LEVEL_NAME,
    in_state<flushing, to_planes<InputTransform>>,
    in_state<flushing, to_planes<GradientTransform>>,
    in_state<flushing, to_outputs<OutputTransform>>,
    in_state<flushing, to_planes<WeightTransform<false>>>,
    in_state<flushing, to_planes<WeightTransform<true>>>,
    in_state<flushing, to_outputs<WeightGradientTransform>>,
};

}  // namespace pegasus::PEGASUS_LEVEL
