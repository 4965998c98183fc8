// The op on a CPU, for one instruction set. setup.py compiles this file once for each, with
// -DPEGASUS_LEVEL=its name.
//
// Bits do not depend on the instruction set: a kl is summed in 16 virtual lanes (column j in lane
// j % 16), which one fixed tree adds up every few chunks, and from there in double; a row's last
// columns are padded with what adds zero; and every thread computes in the processor's default
// floating-point state.
#include "kernels.h"
#include "vectors.h"

namespace pegasus::PEGASUS_LEVEL {

constexpr int chunk = 128;  // columns computed at a time: a multiple of lanes and of 2 * width
constexpr int blocks = 2;   // vectors of Philox blocks computed side by side
constexpr int few = 4;      // chunks after which lanes are added up: long sums in float are inexact

// What a row's noise depends on.
struct Noise {
  const Key<Wide>& key;
  uint64_t seed, row;
};

// The normals of `count` columns, rounded up to a multiple of `lanes`, from `group` on. Words
// first, then normals: a processor overlaps the passes of a short loop, where one long pass would
// fill its window.
static PEGASUS_INLINE void normals(Noise noise, uint64_t group, int count,
                                   Vector eps[chunk / width]) {
  constexpr int pairs = chunk / width / 2, half = width / 2;
  Wide order = {};  // of groups in lanes: the one that interleave needs
  PEGASUS_UNROLL
  for (int i = 0; i < half; ++i) order[i] = i % 2 * (half / 2) + i / 2;
  Wide groups[blocks];
  for (int b = 0; b < blocks; ++b) groups[b] = order + (group + b * half);
  Words even[pairs], odd[pairs];
  count = (count + lanes - 1) / lanes * lanes;
  for (int pair = 0; pair * 2 * width < count; pair += blocks) {
    Wide word[blocks][4];
    noise_blocks<blocks>(groups, noise.row, noise.key, word);
    PEGASUS_UNROLL
    for (int b = 0; b < blocks; ++b) {
      const Wide* w = word[b];
      even[pair + b] = bits<Words>((w[0] & 0xFFFFFFFF) | (w[2] << 32));  // w0 w2 w0 w2 ...
      odd[pair + b] = bits<Words>((w[1] & 0xFFFFFFFF) | (w[3] << 32));   // w1 w3 w1 w3 ...
      groups[b] += uint64_t{blocks * half};
    }
  }
  for (int pair = 0; pair * 2 * width < count; ++pair) {
    Vector first, second;
    box_muller<Vector>(even[pair], odd[pair], first, second);
    interleave(first, second, eps + 2 * pair);
  }
}

template <class Format>
struct Columns {
  const typename Format::Element* in[3];
  typename Format::Element* out[2];
};

// The gradient of a row's kl, halved, where kl is used.
template <class Real>
struct Dkl {
  bool used;
  Real half;
};

// A column or a vector of columns; returns their shares of 2 kl, or zero.
template <class F, bool backward, class Format>
static PEGASUS_INLINE F compute(Columns<Format> columns, int64_t at, F eps,
                                Dkl<typename Format::Real> dkl) {
  F x[3], y[2], share = {};
  for (int i = 0; i < inputs[backward]; ++i) x[i] = load<F, Format>(columns.in[i] + at);
  if constexpr (backward)
    backward_element<F>(x[0], x[1], eps, x[2], dkl.used, F{} + dkl.half, y[0], y[1]);
  else
    share = forward_element<F>(x[0], x[1], eps, y[0]);
  for (int i = 0; i < outputs[backward]; ++i) store<F, Format>(columns.out[i] + at, y[i]);
  return share;
}

// `count` columns from `at` on, and those behind them up to a multiple of `lanes`.
template <bool backward, class Format>
static PEGASUS_INLINE void compute_chunk(Noise noise, uint64_t group, int count,
                                         Columns<Format> columns, int64_t at, Dkl<float> dkl,
                                         Vector sums[lanes / width]) {
  Vector eps[chunk / width];
  normals(noise, group, count, eps);
  for (int j = 0; j < count; j += lanes) {
    PEGASUS_UNROLL
    for (int i = 0; i < lanes / width; ++i)
      sums[i] += compute<Vector, backward>(columns, at + j + i * width, eps[j / width + i], dkl);
  }
}

// Adds up the lanes, and clears them.
static PEGASUS_INLINE double drain(Vector sums[lanes / width]) {
  float lane[lanes];
  __builtin_memcpy(lane, sums, sizeof lane);
  for (int i = 0; i < lanes / width; ++i) sums[i] = Vector{};
  return fold(lane);
}

// `size` columns from `group` on; returns their 2 kl, or zero. The last ones are padded to a whole
// chunk with zeros, which add nothing to the kl.
template <bool backward, class Format>
static PEGASUS_INLINE double compute_segment(Noise noise, uint64_t group, int64_t size,
                                             Columns<Format> columns, Dkl<float> dkl) {
  constexpr int in = inputs[backward], out = outputs[backward];
  Vector sums[lanes / width] = {};
  double sum = 0;
  int64_t at = 0;
  for (; at + chunk <= size; at += chunk) {
    compute_chunk<backward>(noise, group + at / 4, chunk, columns, at, dkl, sums);
    if (!backward && at / chunk % few == few - 1) sum += drain(sums);
  }
  if (const int64_t rest = size - at) {
    typename Format::Element padded[in + out][chunk] = {};
    const size_t bytes = rest * sizeof padded[0][0];
    Columns<Format> last = {};
    for (int i = 0; i < in; ++i) last.in[i] = padded[i];
    for (int i = 0; i < out; ++i) last.out[i] = padded[in + i];
    for (int i = 0; i < in; ++i) __builtin_memcpy(padded[i], columns.in[i] + at, bytes);
    compute_chunk<backward>(noise, group + at / 4, rest, last, 0, dkl, sums);
    for (int i = 0; i < out; ++i) __builtin_memcpy(columns.out[i] + at, last.out[i], bytes);
  }
  return backward ? 0 : sum + drain(sums);
}

// float64: column by column, with the mathematics library's functions.
template <bool backward>
static double compute_segment(Noise noise, uint64_t group, int64_t size, Columns<Float64> columns,
                              Dkl<double> dkl) {
  double lane[lanes] = {}, eps[4];
  for (int64_t j = 0; j < size; ++j) {
    if (j % 4 == 0) normals_of_group<double>(group + j / 4, noise.row, noise.seed, eps);
    lane[j % lanes] += compute<double, backward>(columns, j, eps[j % 4], dkl);
  }
  return fold(lane);
}

template <class Format, bool backward>
static __attribute__((noinline)) void compute_segments(const Arguments& a, int64_t first,
                                                       int64_t last) {
  using Element = typename Format::Element;
  using Real = typename Format::Real;
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  const Key<Wide> key(seed);
  int64_t row = first / a.segments, part = first % a.segments;
  for (int64_t index = first; index < last; ++index) {
    const int64_t at = part * segment;
    const int64_t size = a.columns - at < segment ? a.columns - at : segment;
    const Noise noise{key, seed, static_cast<uint64_t>(row) + static_cast<uint64_t>(a.row_offset)};
    Columns<Format> columns = {};
    for (int i = 0; i < inputs[backward]; ++i)
      columns.in[i] = static_cast<const Element*>(a.in[i]) + row * a.stride[i] + at;
    for (int i = 0; i < outputs[backward]; ++i)
      columns.out[i] = static_cast<Element*>(a.out[i]) + row * a.columns + at;
    Dkl<Real> dkl{a.dkl != nullptr, 0};
    if (a.dkl) dkl.half = static_cast<const Real*>(a.dkl)[row * a.dkl_stride] / 2;
    const double sum = compute_segment<backward>(noise, at / 4, size, columns, dkl);
    if (a.kl) a.sums[index] = sum;
    if (++part == a.segments) {
      part = 0;
      ++row;
    }
  }
}

template <class Format, bool backward>
constexpr SegmentsKernel kernel = in_state<FloatState::ieee, compute_segments<Format, backward>>;

extern const CpuKernels kernels = {
    PEGASUS_LEVEL_NAME,
    {{kernel<Float32, 0>, kernel<Float64, 0>, kernel<Bfloat16, 0>, kernel<Float16, 0>},
     {kernel<Float32, 1>, kernel<Float64, 1>, kernel<Bfloat16, 1>, kernel<Float16, 1>}}};

}  // namespace pegasus::PEGASUS_LEVEL
