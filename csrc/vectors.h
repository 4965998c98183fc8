// A vector of floats as wide as the instruction set's, its integers, and the three element types it loads and stores.
#pragma once
#include "formulas.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pegasus {
namespace PEGASUS_LEVEL {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * width)));
typedef int32_t Integers __attribute__((vector_size(4 * width)));
typedef uint32_t Words __attribute__((vector_size(4 * width)));
typedef uint64_t Wide __attribute__((vector_size(4 * width)));  // half as many lanes, of 64 bits
typedef uint16_t Shorts __attribute__((vector_size(2 * width)));

// multiply: low halves to 64-bit products. root: sqrt. interleave: a0 b0 a1 b1 | a2 b2 a3 b3 of each 128 bits.
#if defined(__AVX512F__)
static PEGASUS_INLINE Wide multiply(Wide a, uint32_t b) {
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
static PEGASUS_INLINE Vector root(Vector x) { return _mm512_sqrt_ps(x); }
static PEGASUS_INLINE void interleave(Vector a, Vector b, Vector out[2]) {
  out[0] = _mm512_unpacklo_ps(a, b);
  out[1] = _mm512_unpackhi_ps(a, b);
}
#elif defined(__AVX2__)
static PEGASUS_INLINE Wide multiply(Wide a, uint32_t b) {
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
static PEGASUS_INLINE Vector root(Vector x) { return _mm256_sqrt_ps(x); }
static PEGASUS_INLINE void interleave(Vector a, Vector b, Vector out[2]) {
  out[0] = _mm256_unpacklo_ps(a, b);
  out[1] = _mm256_unpackhi_ps(a, b);
}
#elif defined(__SSE2__)
static PEGASUS_INLINE Wide multiply(Wide a, uint32_t b) { return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b)); }
static PEGASUS_INLINE Vector root(Vector x) { return _mm_sqrt_ps(x); }
static PEGASUS_INLINE void interleave(Vector a, Vector b, Vector out[2]) {
  out[0] = _mm_unpacklo_ps(a, b);
  out[1] = _mm_unpackhi_ps(a, b);
}
#else
static PEGASUS_INLINE Wide multiply(Wide a, uint32_t b) { return (a & 0xFFFFFFFF) * uint64_t{b}; }
static PEGASUS_INLINE Vector root(Vector x) { return Vector{sqrtf(x[0]), sqrtf(x[1]), sqrtf(x[2]), sqrtf(x[3])}; }
static PEGASUS_INLINE void interleave(Vector a, Vector b, Vector out[2]) {
  out[0] = Vector{a[0], b[0], a[1], b[1]};
  out[1] = Vector{a[2], b[2], a[3], b[3]};
}
#endif

template <>
struct Lanes<Wide> {
  static PEGASUS_INLINE Wide multiply(Wide a, uint32_t b) { return PEGASUS_LEVEL::multiply(a, b); }
};

template <>
struct Lanes<Vector> {
  using Int = Integers;
  using Word = Words;
  static PEGASUS_INLINE Vector from_int(Integers i) { return __builtin_convertvector(i, Vector); }
  static PEGASUS_INLINE Vector from_word(Words w) {  // rounds once; only AVX-512 has an instruction for it
#if defined(__AVX512F__)
    return _mm512_cvtepu32_ps((__m512i)w);
#else
    return from_int(bits<Integers>(w >> 16)) * 65536.0f + from_int(bits<Integers>(w & 0xFFFFu));
#endif
  }
  static PEGASUS_INLINE Vector root(Vector x) { return PEGASUS_LEVEL::root(x); }
};

struct Float32 {
  using Element = float;
  static PEGASUS_INLINE Vector load(const float* from) {
    Vector x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  }
  static PEGASUS_INLINE void store(float* to, Vector x) { __builtin_memcpy(to, &x, sizeof x); }
};

// Words from and to their low halves; gcc makes four shuffles of each where AVX-512 has an instruction.
static PEGASUS_INLINE Words from_shorts(Shorts x) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}
static PEGASUS_INLINE Shorts to_shorts(Words x) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

// A 16-bit format, by what it says of its bits.
template <class Format>
struct Short {
  using Element = uint16_t;
  static PEGASUS_INLINE Vector load(const uint16_t* from) {
    Shorts x;
    __builtin_memcpy(&x, from, sizeof x);
    return Format::template widen<Vector>(from_shorts(x));
  }
  static PEGASUS_INLINE void store(uint16_t* to, Vector x) {
    Shorts y = to_shorts(Format::template narrow<Vector>(x));
    __builtin_memcpy(to, &y, sizeof y);
  }
};

struct Bfloat16 : Short<Bfloat16Bits> {};
struct Float16 : Short<Float16Bits> {};

constexpr int lanes = 16;  // virtual ones, of every sum: column j is added in lane j % 16, whatever the width

template <class T>
static PEGASUS_INLINE T fold(T lane[lanes]) {
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// Sets this thread's floating-point state for a scope, whatever its caller's: round to nearest, and IEEE's gradual
// underflow (ieee) or zero for denormals (flushing), which cost many times as much as other numbers.
class FloatState {
 public:
#if defined(__SSE2__)
  enum State : unsigned { ieee = 0x1F80, flushing = 0x9FC0 };
  explicit FloatState(State state) : saved(_mm_getcsr()) { _mm_setcsr(state); }
  ~FloatState() { _mm_setcsr(saved); }

 private:
  unsigned saved;
#elif defined(__aarch64__)
  enum State : uint64_t { ieee = 0, flushing = uint64_t{1} << 24 };
  explicit FloatState(State state) {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{state}) : "memory");
  }
  ~FloatState() { asm volatile("msr fpcr, %0" ::"r"(saved) : "memory"); }

 private:
  uint64_t saved;
#else
  enum State { ieee, flushing };
  explicit FloatState(State) {}
#endif
};

// A kernel in a floating-point state, which is set outside the function that computes: within one function the compiler
// may move arithmetic across it.
template <FloatState::State state, auto kernel, class... Parameters>
static auto in_state(Parameters... parameters) {
  FloatState set(state);
  return kernel(parameters...);
}

}  // namespace PEGASUS_LEVEL
}  // namespace pegasus
