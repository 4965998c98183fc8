// CPU kernels of 3 x 3 convolutions, of one instruction set: Winograd's minimal filtering (Lavin and Gray 2016).
// setup.py compiles this file once for each, to the same bits; those of the products (winograd.cpp, MKL) may differ.
//
// 4 x 4 outputs of a channel see 6 x 6 inputs d, and are A' [G w G' * B' d B] A with the kernel w: 36 products, which
// over channels are 36 matrix products, instead of 144. Here are B' d B, A' m A, and of an output's gradient A y A',
// with which the kernel's gradient is G' [A y A' * B' d B] G. Points 0, 1, -1, 2, -2 and infinity; G is in fused.py.
#include "kernels.h"
#include "vectors.h"

namespace pegasus {
namespace PEGASUS_LEVEL {

// One dimension of a transform: `given` vectors of `taken`, both `step` apart.
struct Input {  // B'
  static constexpr int taken = 6, given = 6, before = 1;  // before: places that are seen in front of a tile
  static PEGASUS_INLINE void run(const Vector* d, Vector* y, int step) {
    const Vector a = d[4 * step] - 4.0f * d[2 * step], b = d[3 * step] - 4.0f * d[step];
    const Vector e = d[4 * step] - d[2 * step], f = 2.0f * (d[3 * step] - d[step]);
    y[0] = 4.0f * d[0] - 5.0f * d[2 * step] + d[4 * step];
    y[step] = a + b;
    y[2 * step] = a - b;
    y[3 * step] = e + f;
    y[4 * step] = e - f;
    y[5 * step] = 4.0f * d[step] - 5.0f * d[3 * step] + d[5 * step];
  }
};

struct Output {  // A'
  static constexpr int taken = 6, given = 4;
  static PEGASUS_INLINE void run(const Vector* m, Vector* y, int step) {
    const Vector a = m[step] + m[2 * step], b = m[step] - m[2 * step];
    const Vector e = m[3 * step] + m[4 * step], f = m[3 * step] - m[4 * step];
    y[0] = m[0] + a + e;
    y[step] = b + 2.0f * f;
    y[2 * step] = a + 4.0f * e;
    y[3 * step] = b + 8.0f * f + m[5 * step];
  }
};

struct Gradient {  // A
  static constexpr int taken = 4, given = 6, before = 0;
  static PEGASUS_INLINE void run(const Vector* d, Vector* y, int step) {
    const Vector a = d[0] + d[2 * step], b = d[step] + d[3 * step];
    const Vector e = d[0] + 4.0f * d[2 * step], f = 2.0f * d[step] + 8.0f * d[3 * step];
    y[0] = d[0];
    y[step] = a + b;
    y[2 * step] = a - b;
    y[3 * step] = e + f;
    y[4 * step] = e - f;
    y[5 * step] = d[3 * step];
  }
};

template <class Transform>
static PEGASUS_INLINE void both_ways(const Vector* in, Vector* out) {
  constexpr int taken = Transform::taken, given = Transform::given;
  Vector half[given * taken];
  PEGASUS_UNROLL
  for (int column = 0; column < taken; ++column) Transform::run(in + column, half + column, taken);
  PEGASUS_UNROLL
  for (int row = 0; row < given; ++row) Transform::run(half + row * taken, out + row * given, 1);
}

// Images' tiles to planes. Places outside of an image are zero.
template <class Transform>
static __attribute__((noinline)) void take(const Tiles& of, int64_t first, int64_t last) {
  constexpr int taken = Transform::taken;
  const Tiles a = of;  // a copy, which no store can change
  const float* places[taken * taken];
  float* to = a.planes + first * (a.rows / 4) * (a.columns / 4) * a.channels;
  for (int64_t image = first; image < last; ++image)
    for (int64_t row = -Transform::before; row + 4 <= a.rows; row += 4)
      for (int64_t column = -Transform::before; column + 4 <= a.columns; column += 4, to += a.channels) {
        for (int i = 0; i < taken * taken; ++i) {
          const int64_t y = row + i / taken, x = column + i % taken;
          places[i] = y >= 0 && y < a.rows && x >= 0 && x < a.columns ? a.place(image, y, x) : a.outside;
        }
        for (int64_t c = 0; c < a.channels; c += width) {
          Vector in[taken * taken], out[36];
          PEGASUS_UNROLL
          for (int i = 0; i < taken; ++i)
            PEGASUS_UNROLL
            for (int j = 0; j < taken; ++j) in[i * taken + j] = Float32::load(places[i * taken + j] + c);
          both_ways<Transform>(in, out);
          PEGASUS_UNROLL
          for (int i = 0; i < 6; ++i)
            PEGASUS_UNROLL
            for (int j = 0; j < 6; ++j) Float32::store(to + (i * 6 + j) * a.stride + c, out[i * 6 + j]);
        }
      }
}

// Planes to images, to which the bias is added.
static __attribute__((noinline)) void give(const Tiles& of, int64_t first, int64_t last) {
  const Tiles a = of;
  const float* from = a.planes + first * (a.rows / 4) * (a.columns / 4) * a.channels;
  for (int64_t image = first; image < last; ++image)
    for (int64_t row = 0; row < a.rows; row += 4)
      for (int64_t column = 0; column < a.columns; column += 4, from += a.channels)
        for (int64_t c = 0; c < a.channels; c += width) {
          Vector in[36], out[16], bias = {};
          if (a.bias) bias = Float32::load(a.bias + c);
          PEGASUS_UNROLL
          for (int plane = 0; plane < 36; ++plane) in[plane] = Float32::load(from + plane * a.stride + c);
          both_ways<Output>(in, out);
          PEGASUS_UNROLL
          for (int i = 0; i < 16; ++i) Float32::store(a.place(image, row + i / 4, column + i % 4) + c, out[i] + bias);
        }
}

constexpr auto flushing = FloatState::flushing;

extern const TileKernels tile_kernels = {
    {in_state<flushing, take<Input>>, in_state<flushing, take<Gradient>>}, in_state<flushing, give>};

}  // namespace PEGASUS_LEVEL
}  // namespace pegasus
