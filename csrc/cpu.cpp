// The CPU kernels of one instruction set. setup.py compiles this file once for each, with -DPEGASUS_LEVEL=its name.
//
// Bits do not depend on the instruction set: the kl of a row is summed in 16 virtual lanes (column j in lane j % 16)
// that one fixed tree adds up, a row's last columns are padded with what adds zero, and every thread computes in the
// processor's default floating-point state.
#include "kernels.h"
#include "vectors.h"

namespace pegasus {
namespace PEGASUS_LEVEL {

constexpr int chunk = 128;  // columns handled at a time: a multiple of lanes and of 2 * width

template <class T, class Void>
static PEGASUS_INLINE T* row_of(Void* base, int64_t row, int64_t stride) {
  return static_cast<T*>(base) + row * stride;
}

// Where a row's noise comes from.
struct Noise {
  const Key<Wide>& key;
  uint64_t seed, row;
};

constexpr int blocks = 2;  // vectors of Philox blocks computed side by side

// Which group of columns each 64-bit lane takes: the order that makes interleave's halves adjacent columns.
struct GroupOrder {
  uint64_t lane[blocks * width / 2] = {};
  constexpr GroupOrder() {
    for (int i = 0; i < blocks * width / 2; ++i)
      lane[i] = i / (width / 2) * (width / 2) + i % 2 * (width / 4) + i % (width / 2) / 2;
  }
};
constexpr GroupOrder group_order;

// The normals of `count` columns, rounded up to whole groups of lanes, from `group` on. Words first, then normals: a
// processor overlaps the passes of a short loop, where one long pass would fill its window.
static PEGASUS_INLINE void normals(Noise noise, uint64_t group, int count, Vector eps[chunk / width]) {
  constexpr int pairs = chunk / width / 2;
  Wide groups[blocks];
  __builtin_memcpy(groups, group_order.lane, sizeof groups);
  for (int b = 0; b < blocks; ++b) groups[b] += group;
  Words even[pairs], odd[pairs];
  count = (count + lanes - 1) / lanes * lanes;
  for (int pair = 0; pair * 2 * width < count; pair += blocks) {
    Wide word[blocks][4];
    noise_blocks<blocks>(groups, noise.row, noise.key, word);
    PEGASUS_UNROLL
    for (int b = 0; b < blocks; ++b) {
      even[pair + b] = bits<Words>((word[b][0] & 0xFFFFFFFF) | (word[b][2] << 32));  // w0 w2 w0 w2 ...
      odd[pair + b] = bits<Words>((word[b][1] & 0xFFFFFFFF) | (word[b][3] << 32));   // w1 w3 w1 w3 ...
      groups[b] += uint64_t{blocks * width / 2};
    }
  }
  for (int pair = 0; pair * 2 * width < count; ++pair) {
    Vector first, second;
    box_muller<Vector>(even[pair], odd[pair], first, second);
    interleave(first, second, eps + 2 * pair);
  }
}

// The first `count` columns of a chunk; columns past it, up to the end of a group of lanes, may be computed too.
template <class Format, class Element>
static PEGASUS_INLINE void forward_chunk(Noise noise, uint64_t group, int count, const Element* mu,
                                         const Element* logvar, Element* z, Vector sums[lanes / width]) {
  Vector eps[chunk / width];
  normals(noise, group, count, eps);
  for (int at = 0; at < count; at += lanes) {
    PEGASUS_UNROLL
    for (int i = 0; i < lanes / width; ++i) {
      int column = at + i * width;
      Vector sample;
      sums[i] += forward_element<Vector>(Format::load(mu + column), Format::load(logvar + column),
                                         eps[column / width], sample);
      Format::store(z + column, sample);
    }
  }
}

template <class Format, class Element>
static PEGASUS_INLINE void backward_chunk(Noise noise, uint64_t group, int count, const Element* mu,
                                          const Element* logvar, const Element* dz, float half_dkl, Element* dmu,
                                          Element* dlogvar) {
  Vector eps[chunk / width];
  normals(noise, group, count, eps);
  for (int at = 0; at < count; at += width) {
    Vector to_mu, to_logvar;
    backward_element<Vector>(Format::load(mu + at), Format::load(logvar + at), eps[at / width], Format::load(dz + at),
                             Vector{} + half_dkl, to_mu, to_logvar);
    Format::store(dmu + at, to_mu);
    Format::store(dlogvar + at, to_logvar);
  }
}

// A row's last columns, padded with zeros to a whole chunk: zeros add nothing to the kl.
template <class Element>
struct Padded {
  Element value[chunk] = {};
  Padded() = default;
  Padded(const Element* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  }
  void copy_to(Element* to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = value[i];
  }
};

template <class Format, class Element>
static PEGASUS_INLINE float forward_row(Format, Noise noise, int64_t columns, const Element* mu,
                                                   const Element* logvar, Element* z) {
  Vector sums[lanes / width] = {};
  int64_t at = 0;
  for (; at + chunk <= columns; at += chunk)
    forward_chunk<Format>(noise, at / 4, chunk, mu + at, logvar + at, z + at, sums);
  if (int64_t rest = columns - at) {
    Padded<Element> tail_mu(mu + at, rest), tail_logvar(logvar + at, rest), tail_z;
    forward_chunk<Format>(noise, at / 4, rest, tail_mu.value, tail_logvar.value, tail_z.value, sums);
    tail_z.copy_to(z + at, rest);
  }
  float lane[lanes];
  __builtin_memcpy(lane, sums, sizeof lane);
  return fold(lane) * 0.5f;
}

template <class Format, class Element>
static PEGASUS_INLINE void backward_row(Format, Noise noise, int64_t columns, const Element* mu,
                                                   const Element* logvar, const Element* dz, float half_dkl,
                                                   Element* dmu, Element* dlogvar) {
  int64_t at = 0;
  for (; at + chunk <= columns; at += chunk)
    backward_chunk<Format>(noise, at / 4, chunk, mu + at, logvar + at, dz + at, half_dkl, dmu + at, dlogvar + at);
  if (int64_t rest = columns - at) {
    Padded<Element> tail_mu(mu + at, rest), tail_logvar(logvar + at, rest), tail_dz(dz + at, rest), to_mu, to_logvar;
    backward_chunk<Format>(noise, at / 4, rest, tail_mu.value, tail_logvar.value, tail_dz.value, half_dkl,
                           to_mu.value, to_logvar.value);
    to_mu.copy_to(dmu + at, rest);
    to_logvar.copy_to(dlogvar + at, rest);
  }
}

// float64: plain, a group of four at a time, with the mathematics library's functions.
struct Float64 {
  using Element = double;
};

static double forward_row(Float64, Noise noise, int64_t columns, const double* mu, const double* logvar, double* z) {
  double lane[lanes] = {}, eps[4];
  for (int64_t column = 0; column < columns; ++column) {
    if (column % 4 == 0) normals_of_group<double>(column / 4, noise.row, noise.seed, eps);
    lane[column % lanes] += forward_element(mu[column], logvar[column], eps[column % 4], z[column]);
  }
  return fold(lane) * 0.5;
}

static void backward_row(Float64, Noise noise, int64_t columns, const double* mu, const double* logvar,
                         const double* dz, double half_dkl, double* dmu, double* dlogvar) {
  double eps[4];
  for (int64_t column = 0; column < columns; ++column) {
    if (column % 4 == 0) normals_of_group<double>(column / 4, noise.row, noise.seed, eps);
    backward_element(mu[column], logvar[column], eps[column % 4], dz[column], half_dkl, dmu[column], dlogvar[column]);
  }
}

template <class Format, class Real>
static __attribute__((noinline)) void forward_rows(const Arguments& a, int64_t first_row, int64_t last_row) {
  using Element = typename Format::Element;
  const uint64_t seed = *a.seed;
  const Key<Wide> key(seed);
  for (int64_t row = first_row; row < last_row; ++row) {
    Noise noise{key, seed, static_cast<uint64_t>(row) + static_cast<uint64_t>(a.row_offset)};
    static_cast<Real*>(a.kl)[row] =
        forward_row(Format{}, noise, a.columns, row_of<const Element>(a.mu, row, a.mu_stride),
                    row_of<const Element>(a.logvar, row, a.logvar_stride), row_of<Element>(a.z, row, a.columns));
  }
}

template <class Format, class Real>
static __attribute__((noinline)) void backward_rows(const Arguments& a, int64_t first_row, int64_t last_row) {
  using Element = typename Format::Element;
  const uint64_t seed = *a.seed;
  const Key<Wide> key(seed);
  for (int64_t row = first_row; row < last_row; ++row) {
    Noise noise{key, seed, static_cast<uint64_t>(row) + static_cast<uint64_t>(a.row_offset)};
    backward_row(Format{}, noise, a.columns, row_of<const Element>(a.mu, row, a.mu_stride),
                 row_of<const Element>(a.logvar, row, a.logvar_stride), row_of<const Element>(a.dz, row, a.dz_stride),
                 *row_of<const Real>(a.dkl, row, a.dkl_stride) / 2, row_of<Element>(a.dmu, row, a.columns),
                 row_of<Element>(a.dlogvar, row, a.columns));
  }
}

constexpr auto ieee = FloatState::ieee;

#define PEGASUS_NAME(level) #level
#define PEGASUS_NAME_OF(level) PEGASUS_NAME(level)

extern const CpuKernels kernels = {
    PEGASUS_NAME_OF(PEGASUS_LEVEL),
    {in_state<ieee, forward_rows<Float32, float>>, in_state<ieee, forward_rows<Float64, double>>,
     in_state<ieee, forward_rows<Bfloat16, float>>, in_state<ieee, forward_rows<Float16, float>>},
    {in_state<ieee, backward_rows<Float32, float>>, in_state<ieee, backward_rows<Float64, double>>,
     in_state<ieee, backward_rows<Bfloat16, float>>, in_state<ieee, backward_rows<Float16, float>>},
};

}  // namespace PEGASUS_LEVEL
}  // namespace pegasus
