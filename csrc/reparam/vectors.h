// A vector of floats as wide as the instruction set's, its integers, and the element types that it
// is loaded from and stored to.
#pragma once
#include "formulas.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PEGASUS_QUOTE(text) #text
#define PEGASUS_QUOTE_VALUE(macro) PEGASUS_QUOTE(macro)
#define PEGASUS_LEVEL_NAME PEGASUS_QUOTE_VALUE(PEGASUS_LEVEL)

namespace pegasus::PEGASUS_LEVEL {

#if defined(__AVX512F__)
constexpr int width = 16;
#define PEGASUS_INTRINSIC(name) _mm512_##name
typedef __m512i Bits;
#elif defined(__AVX2__)
constexpr int width = 8;
#define PEGASUS_INTRINSIC(name) _mm256_##name
typedef __m256i Bits;
#else
constexpr int width = 4;
#if defined(__SSE2__)
#define PEGASUS_INTRINSIC(name) _mm_##name
typedef __m128i Bits;
#endif
#endif

typedef float Vector __attribute__((vector_size(4 * width)));
typedef int32_t Integers __attribute__((vector_size(4 * width)));
typedef uint32_t Words __attribute__((vector_size(4 * width)));
typedef uint64_t Wide __attribute__((vector_size(4 * width)));  // half as many lanes, of 64 bits
typedef uint16_t Shorts __attribute__((vector_size(2 * width)));

// To a0 b0 a1 b1 and a2 b2 a3 b3 of each 128 bits.
static PEGASUS_INLINE void interleave(Vector a, Vector b, Vector out[2]) {
#if defined(PEGASUS_INTRINSIC)
  out[0] = PEGASUS_INTRINSIC(unpacklo_ps)(a, b);
  out[1] = PEGASUS_INTRINSIC(unpackhi_ps)(a, b);
#else
  out[0] = Vector{a[0], b[0], a[1], b[1]};
  out[1] = Vector{a[2], b[2], a[3], b[3]};
#endif
}

template <>
struct Lanes<Wide> {
  static PEGASUS_INLINE Wide multiply(Wide a, uint32_t b) {
#if defined(PEGASUS_INTRINSIC)
    return (Wide)PEGASUS_INTRINSIC(mul_epu32)((Bits)a, (Bits)(Wide{} + uint64_t{b}));
#else
    return (a & 0xFFFFFFFF) * uint64_t{b};
#endif
  }
};

template <>
struct Lanes<Vector> {
  using Int = Integers;
  using Word = Words;
  static PEGASUS_INLINE Vector from_int(Integers i) { return __builtin_convertvector(i, Vector); }
  // Rounds once; only AVX-512 has an instruction for it.
  static PEGASUS_INLINE Vector from_word(Words w) {
#if defined(__AVX512F__)
    return _mm512_cvtepu32_ps((Bits)w);
#else
    return from_int(bits<Integers>(w >> 16)) * 65536.0f + from_int(bits<Integers>(w & 0xFFFFu));
#endif
  }
  static PEGASUS_INLINE Vector root(Vector x) {
#if defined(PEGASUS_INTRINSIC)
    return PEGASUS_INTRINSIC(sqrt_ps)(x);
#else
    return Vector{sqrtf(x[0]), sqrtf(x[1]), sqrtf(x[2]), sqrtf(x[3])};
#endif
  }
};

// F is Vector, or double for Float64.
template <class F, class Format>
static PEGASUS_INLINE F load(const typename Format::Element* from) {
  if constexpr (sizeof *from == 2) {
    Shorts x;
    __builtin_memcpy(&x, from, sizeof x);
#if defined(__AVX512F__)  // gcc makes four shuffles of the conversion
    return Format::template widen<F>((Words)_mm512_cvtepu16_epi32((__m256i)x));
#else
    return Format::template widen<F>(__builtin_convertvector(x, Words));
#endif
  } else {
    F x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  }
}

template <class F, class Format>
static PEGASUS_INLINE void store(typename Format::Element* to, F x) {
  if constexpr (sizeof *to == 2) {
    const Words words = Format::template narrow<F>(x);
#if defined(__AVX512F__)
    const Shorts shorts = (Shorts)_mm512_cvtepi32_epi16((Bits)words);
#else
    const Shorts shorts = __builtin_convertvector(words, Shorts);
#endif
    __builtin_memcpy(to, &shorts, sizeof shorts);
  } else {
    __builtin_memcpy(to, &x, sizeof x);
  }
}

// Virtual lanes of every sum: column j is added in lane j % 16, whatever the width.
constexpr int lanes = 16;

template <class T>
static PEGASUS_INLINE T fold(T lane[lanes]) {
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// Sets this thread's floating-point state for a scope, whatever the caller's: round to nearest, and
// either IEEE's gradual underflow (ieee) or zero in place of denormals (flushing), which take many
// times as long as other numbers.
class FloatState {
 public:
#if defined(__SSE2__)
  using Number = unsigned;
  static constexpr Number ieee = 0x1F80, flushing = 0x9FC0;
  static Number get() { return _mm_getcsr(); }
  static void set(Number state) { _mm_setcsr(state); }
#elif defined(__aarch64__)
  using Number = uint64_t;
  static constexpr Number ieee = 0, flushing = Number{1} << 24;
  static Number get() {
    Number state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(Number state) { asm volatile("msr fpcr, %0" ::"r"(state) : "memory"); }
#else
  using Number = int;
  static constexpr Number ieee = 0, flushing = 1;
  static Number get() { return 0; }
  static void set(Number) {}
#endif
  explicit FloatState(Number state) : saved(get()) { set(state); }
  ~FloatState() { set(saved); }

 private:
  Number saved;
};

// A kernel in a floating-point state, which is set outside the function that computes: within one
// function the compiler may move arithmetic across the change.
template <FloatState::Number state, auto kernel, class... Parameters>
static auto in_state(Parameters... parameters) {
  FloatState set(state);
  return kernel(parameters...);
}

}  // namespace pegasus::PEGASUS_LEVEL
