// The op's formulas, for a float or double (CUDA, float64) and for a vector of floats (CPU).
//
//   z = mu + std * eps,  std = exp(logvar / 2),  kl = 1/2 sum [exp(logvar) + mu^2 - 1 - logvar]
//
// Layout of the noise: row r, columns 4g to 4g+3 take their normals from one block of Philox4x32-10
// (Salmon et al. 2011) with counter (g low, g high, r low, r high) and key (seed low, seed high),
// in 32-bit words. The block's words w0..w3 become radius(w0) * direction(w1) and
// radius(w2) * direction(w3), two normals each (Box and Muller 1958).
//
// Float formulas are minimax polynomials of this file, so that every instruction set gives the same
// bits where a * b + c is not contracted. Everything is static, in a namespace of its own for each
// instruction set: the linker must not give all of them the copy that was compiled for AVX-512.
#pragma once
#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define PEGASUS_INLINE __host__ __device__ __forceinline__
#define PEGASUS_UNROLL _Pragma("unroll")
#else
#define PEGASUS_INLINE inline __attribute__((always_inline))
#define PEGASUS_UNROLL _Pragma("GCC unroll 16")
#endif
#ifndef PEGASUS_LEVEL
#define PEGASUS_LEVEL scalar
#endif

namespace pegasus::PEGASUS_LEVEL {

// What differs between one number and a vector of them, with the integers of the same width.
template <class F> struct Lanes;
template <class F> using WordOf = typename Lanes<F>::Word;
template <class F> using IntOf = typename Lanes<F>::Int;

template <>
struct Lanes<float> {
  using Int = int32_t;
  using Word = uint32_t;
  static PEGASUS_INLINE float from_int(int32_t i) { return static_cast<float>(i); }
  static PEGASUS_INLINE float from_word(uint32_t w) { return static_cast<float>(w); }
  static PEGASUS_INLINE float root(float x) { return sqrtf(x); }
};

template <class To, class From>
static PEGASUS_INLINE To bits(From x) { return __builtin_bit_cast(To, x); }

// ---- Philox: words sit in the low halves of 64-bit lanes; the high halves may hold anything ----
constexpr uint32_t multiplier0 = 0xD2511F53, multiplier1 = 0xCD9E8D57;
constexpr uint32_t weyl0 = 0x9E3779B9, weyl1 = 0xBB67AE85;

template <>
struct Lanes<uint64_t> {
  static PEGASUS_INLINE uint64_t multiply(uint64_t a, uint32_t b) { return (a & 0xFFFFFFFF) * b; }
};

// The round keys of one seed.
template <class L>
struct Key {
  L first[10], second[10];
  explicit PEGASUS_INLINE Key(uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed);
    uint32_t high = static_cast<uint32_t>(seed >> 32);
    PEGASUS_UNROLL
    for (int round = 0; round < 10; ++round, low += weyl0, high += weyl1) {
      first[round] = L{} + uint64_t{low};
      second[round] = L{} + uint64_t{high};
    }
  }
};

// The blocks of (row, group[i]): ten rounds on their counters, whose layout is set here alone.
// The rounds of one block wait for each other; several blocks at a time keep multipliers busy.
template <int count, class L>
static PEGASUS_INLINE void noise_blocks(const L group[count], uint64_t row, const Key<L>& key,
                                        L word[count][4]) {
  PEGASUS_UNROLL
  for (int i = 0; i < count; ++i) {
    word[i][0] = group[i];
    word[i][1] = group[i] >> 32;
    word[i][2] = L{} + row;
    word[i][3] = L{} + (row >> 32);
  }
  PEGASUS_UNROLL
  for (int round = 0; round < 10; ++round)
    PEGASUS_UNROLL
    for (int i = 0; i < count; ++i) {
      L product0 = Lanes<L>::multiply(word[i][0], multiplier0);
      L product1 = Lanes<L>::multiply(word[i][2], multiplier1);
      word[i][0] = (product1 >> 32) ^ (word[i][1] ^ key.first[round]);
      word[i][1] = product1;
      word[i][2] = (product0 >> 32) ^ (word[i][3] ^ key.second[round]);
      word[i][3] = product0;
    }
}

// ---- float: exp, Box and Muller's radius and direction ----
// exp(x), exp(x) - 1 and exp(x) - 1 - x, each with all of its own digits.
template <class F>
struct Exponential {
  F value, minus_one, minus_line;  // what is not used costs nothing
};

// exp(x) = 2^n * p(r). Infinite and NaN where IEEE's is; zero where that would be a denormal.
template <class F>
static PEGASUS_INLINE Exponential<F> exponential(F x) {
  F shifted = x * 1.44269504f + 12582912.0f;  // + 1.5 * 2^23: low bits hold the nearest integer n
  F n = shifted - 12582912.0f;
  F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, one product exact
  F r2 = r * r;
  F q = (0.00138144672f * r2 + (0.00836878084f * r + 0.0416683927f)) * r2 +
        (0.166665196f * r + 0.49999994f);
  F near_line = q * r2;
  F near_one = near_line + r;
  F p = near_one + 1.0f;
  F y = bits<F>(bits<WordOf<F>>(p) + (bits<WordOf<F>>(shifted) << 23));
  y = x < 88.72284f ? y : x + static_cast<float>(INFINITY);
  y = x < -87.33654f ? F{} : y;
  F minus_one = y - 1.0f;  // where n is 0, r is x, and both differences would lose digits
  return {y, n == 0.0f ? near_one : minus_one, n == 0.0f ? near_line : minus_one - x};
}

// sqrt(-2 log u) with u = (word + 1) / 2^32 in (0, 1]: all 32 bits count, so it reaches 6.66.
template <class F>
static PEGASUS_INLINE F radius(WordOf<F> word) {
  F x = Lanes<F>::from_word(word) + 1.0f;
  IntOf<F> exponent = (bits<IntOf<F>>(x) - 0x3F3504F3) >> 23;  // mantissa in [sqrt 1/2, sqrt 2)
  F f = bits<F>(bits<IntOf<F>>(x) - (exponent << 23)) - 1.0f;
  F f2 = f * f;
  F high = (-0.174696867f * f + 0.28615043f) * f2 + (-0.298359483f * f + 0.33141017f);
  F low = (-0.399241447f * f + 0.500035107f) * f2 + (-0.666679025f * f + 0.99999982f);
  F q = high * (f2 * f2) + low;  // -2 log(1 + f) = q f^2 - 2 f
  F log_of_power = Lanes<F>::from_int(exponent - 32) * -1.38629436f;
  return Lanes<F>::root(log_of_power + (q * f2 - (f + f)));
}

// A point of the unit circle. The word's low 30 bits are an angle, at most an eighth of a turn to
// either side of zero. Bit 31 is the sign of its cosine, and bit 30 exchanges cosine and sine:
// together they reach all four quarters.
template <class F>
static PEGASUS_INLINE void direction(WordOf<F> word, F& first, F& second) {
  F t = Lanes<F>::from_int(bits<IntOf<F>>(word << 2)) * 3.6572952e-10f;  // pi / 2^33
  F t2 = t * t;
  F s = ((-0.000195152825f * t2 + 0.0083321603f) * t2 - 0.166666552f) * (t2 * t) + t;
  F c4 = (2.44331568e-05f * t2 - 0.00138873165f) * t2 + 0.0416666456f;
  F c = c4 * (t2 * t2) - 0.5f * t2 + 1.0f;
  WordOf<F> cosine = bits<WordOf<F>>(c) ^ (word & 0x80000000u);
  WordOf<F> swap = (bits<WordOf<F>>(s) ^ cosine) & bits<WordOf<F>>(bits<IntOf<F>>(word << 1) >> 31);
  first = bits<F>(cosine ^ swap);
  second = bits<F>(bits<WordOf<F>>(s) ^ swap);
}

// ---- formats: how elements are stored, and the type to compute in ----
// widen takes a 16-bit format's bits in a 32-bit word; narrow rounds to nearest, ties to even.
template <class T>
struct Plain {
  using Element = T;
  using Real = T;
  template <class F> static PEGASUS_INLINE F widen(F x) { return x; }
  template <class F> static PEGASUS_INLINE F narrow(F x) { return x; }
};
using Float32 = Plain<float>;
using Float64 = Plain<double>;

struct Bfloat16 {
  using Element = uint16_t;
  using Real = float;
  template <class F> static PEGASUS_INLINE F widen(WordOf<F> h) { return bits<F>(h << 16); }
  template <class F>
  static PEGASUS_INLINE WordOf<F> narrow(F value) {
    WordOf<F> x = bits<WordOf<F>>(value);
    WordOf<F> rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
    return (x & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded;
  }
};

struct Float16 {
  using Element = uint16_t;
  using Real = float;
  template <class F>
  static PEGASUS_INLINE F widen(WordOf<F> h) {
    WordOf<F> magnitude = h & 0x7FFFu;
    WordOf<F> finite = bits<WordOf<F>>(bits<F>(magnitude << 13) * 0x1p112f);  // denormals too
    WordOf<F> special = magnitude >= 0x7C00u ? 0x7F800000u : WordOf<F>{};
    return bits<F>(finite | special | ((h & 0x8000u) << 16));
  }
  template <class F>
  static PEGASUS_INLINE WordOf<F> narrow(F value) {
    WordOf<F> x = bits<WordOf<F>>(value);
    WordOf<F> magnitude = x & 0x7FFFFFFFu;
    WordOf<F> half = ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    // floats from 1/2 on have the spacing of float16's denormals
    WordOf<F> denormal = bits<WordOf<F>>(bits<F>(magnitude) + 0.5f) - 0x3F000000u;
    half = magnitude < 0x38800000u ? denormal : half;
    half = magnitude >= 0x47800000u ? 0x7C00u : half;
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    return half | ((x >> 16) & 0x8000u);
  }
};

// ---- two normals of two words ----
template <class F>
static PEGASUS_INLINE void box_muller(WordOf<F> w0, WordOf<F> w1, F& first, F& second) {
  F r = radius<F>(w0);
  direction<F>(w1, first, second);
  first = r * first;
  second = r * second;
}

// double: by the mathematics library
static PEGASUS_INLINE Exponential<double> exponential(double x) {
  return {exp(x), expm1(x), expm1(x) - x};
}

static PEGASUS_INLINE void box_muller(uint32_t w0, uint32_t w1, double& first, double& second) {
  double r = sqrt(fmax(-2.0 * log((w0 + 1.0) * 0x1p-32), 0.0));
  double t = static_cast<int32_t>(w1 << 2) * (1.5707963267948966 * 0x1p-32);
  double cosine = w1 >> 31 ? -cos(t) : cos(t);
  double sine = sin(t);
  first = r * (w1 & 0x40000000u ? sine : cosine);
  second = r * (w1 & 0x40000000u ? cosine : sine);
}

// ---- one element, and one group of four ----
// Returns the element's share of 2 kl: with e = std - 1, exp(logvar) - 1 - logvar is
// e^2 + 2 (e - logvar / 2), which loses no digits near zero.
template <class F>
static PEGASUS_INLINE F forward_element(F mu, F logvar, F eps, F& z) {
  Exponential<F> std = exponential(logvar * 0.5f);
  z = mu + std.value * eps;
  return std.minus_one * std.minus_one + (std.minus_line + std.minus_line) + mu * mu;
}

// half_dkl: half the gradient of the row's kl. Without with_kl it is left out: times an infinite
// exp(logvar), zero would be NaN.
template <class F>
static PEGASUS_INLINE void backward_element(F mu, F logvar, F eps, F dz, bool with_kl, F half_dkl,
                                            F& dmu, F& dlogvar) {
  Exponential<F> std = exponential(logvar * 0.5f);
  dmu = dz;
  dlogvar = dz * std.value * eps * 0.5f;
  if (!with_kl) return;
  dmu += (half_dkl + half_dkl) * mu;
  dlogvar += half_dkl * (std.value * std.value - 1.0f);
}

template <class F>
static PEGASUS_INLINE void normals_of_group(uint64_t group, uint64_t row, uint64_t seed, F eps[4]) {
  uint64_t word[1][4];
  noise_blocks<1>(&group, row, Key<uint64_t>(seed), word);
  uint32_t w[4];
  for (int i = 0; i < 4; ++i) w[i] = static_cast<uint32_t>(word[0][i]);
  box_muller(w[0], w[1], eps[0], eps[1]);
  box_muller(w[2], w[3], eps[2], eps[3]);
}

}  // namespace pegasus::PEGASUS_LEVEL
