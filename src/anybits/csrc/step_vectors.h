// 16 floats at a time for step.h, and bfloat16 on its way in and out: one register, or pairs of what the instruction set has.
// A vector wider than its registers would live in memory: compilers take it apart only after they have put it there.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#define STEP_INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;

typedef float four __attribute__((vector_size(16)));
typedef float eight __attribute__((vector_size(32)));
typedef float sixteen __attribute__((vector_size(64)));

// The integers beside a vector of floats.
template <class V>
struct Beside;
template <>
struct Beside<four> {
    typedef int32_t integers __attribute__((vector_size(16)));
    typedef uint32_t words __attribute__((vector_size(16)));
    typedef uint16_t halves __attribute__((vector_size(8)));
};
template <>
struct Beside<eight> {
    typedef int32_t integers __attribute__((vector_size(32)));
    typedef uint32_t words __attribute__((vector_size(32)));
    typedef uint16_t halves __attribute__((vector_size(16)));
};
template <>
struct Beside<sixteen> {
    typedef int32_t integers __attribute__((vector_size(64)));
    typedef uint32_t words __attribute__((vector_size(64)));
    typedef uint16_t halves __attribute__((vector_size(32)));
};

template <class T>
struct Pair {
    T a, b;
    Pair() = default;
    STEP_INLINE Pair(const T &first, const T &second) : a(first), b(second) {}
};

#if defined(__AVX512F__)
typedef sixteen floats;
#elif defined(__AVX2__)
typedef Pair<eight> floats;
#else
typedef Pair<Pair<four>> floats;
#endif

template <class T>
STEP_INLINE Pair<T> operator+(const Pair<T> &x, const Pair<T> &y) { return {x.a + y.a, x.b + y.b}; }
template <class T>
STEP_INLINE Pair<T> operator*(const Pair<T> &x, const Pair<T> &y) { return {x.a * y.a, x.b * y.b}; }
template <class T>
STEP_INLINE Pair<T> operator+(const Pair<T> &x, float y) { return {x.a + y, x.b + y}; }
template <class T>
STEP_INLINE Pair<T> operator-(const Pair<T> &x, float y) { return {x.a - y, x.b - y}; }
template <class T>
STEP_INLINE Pair<T> operator*(const Pair<T> &x, float y) { return {x.a * y, x.b * y}; }
template <class T>
STEP_INLINE Pair<T> operator/(const Pair<T> &x, const Pair<T> &y) { return {x.a / y.a, x.b / y.b}; }
template <class T>
STEP_INLINE Pair<T> operator/(const Pair<T> &x, float y) { return {x.a / y, x.b / y}; }
template <class T>
STEP_INLINE Pair<T> operator-(const Pair<T> &x) { return {-x.a, -x.b}; }
template <class T, class U>
STEP_INLINE Pair<T> &operator+=(Pair<T> &x, const U &y) { return x = x + y; }

// Each function for a vector that is one register, then for a pair of vectors.

template <class V>
struct Load {
    static STEP_INLINE V of_floats(const float *at) {
        V v;
        memcpy(&v, at, sizeof v);
        return v;
    }
    static STEP_INLINE V of_bf16(const uint16_t *at) {
        typename Beside<V>::halves h;
        memcpy(&h, at, sizeof h);
        const typename Beside<V>::words w = __builtin_convertvector(h, typename Beside<V>::words) << 16;
        return (V)w;
    }
    static STEP_INLINE V of_one(float f) { return V{} + f; }
};

template <class T>
struct Load<Pair<T>> {
    static constexpr int HALF = sizeof(T) / sizeof(float);
    static STEP_INLINE Pair<T> of_floats(const float *at) { return {Load<T>::of_floats(at), Load<T>::of_floats(at + HALF)}; }
    static STEP_INLINE Pair<T> of_bf16(const uint16_t *at) { return {Load<T>::of_bf16(at), Load<T>::of_bf16(at + HALF)}; }
    static STEP_INLINE Pair<T> of_one(float f) { return {Load<T>::of_one(f), Load<T>::of_one(f)}; }
};

STEP_INLINE floats load_floats(const float *at) { return Load<floats>::of_floats(at); }
STEP_INLINE floats splat(float f) { return Load<floats>::of_one(f); }

STEP_INLINE floats load_bf16(const uint16_t *at) {
#if defined(__AVX512F__)  // in vector extensions it becomes two instructions for each half
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#else
    return Load<floats>::of_bf16(at);
#endif
}

STEP_INLINE void store_floats(float *at, const floats &v) { memcpy(at, &v, sizeof v); }

// The words of bfloat16 numbers, in their upper halves: rounded to nearest even; NaN stays NaN.
template <class V>
STEP_INLINE typename Beside<V>::words words_of(V v) {
    typedef typename Beside<V>::words Words;
    const Words w = (Words)v, rounded = (w + 0x7fff + (w >> 16 & 1)) & 0xffff0000u, nan = (Words)(v != v);
    return (rounded & ~nan) | (nan & 0x7fc00000u);
}

template <class V>
STEP_INLINE void store_bf16(uint16_t *at, V v) {
    const typename Beside<V>::halves h = __builtin_convertvector(words_of(v) >> 16, typename Beside<V>::halves);
    memcpy(at, &h, sizeof h);
}

template <class T>
STEP_INLINE void store_bf16(uint16_t *at, const Pair<T> &v) {
    store_bf16(at, v.a), store_bf16(at + sizeof(T) / sizeof(float), v.b);
}

template <class V>
STEP_INLINE V rounded_bf16(V v) { return (V)words_of(v); }

template <class T>
STEP_INLINE Pair<T> rounded_bf16(const Pair<T> &v) { return {rounded_bf16(v.a), rounded_bf16(v.b)}; }

template <class V>
STEP_INLINE V larger(V a, V b) { return a > b ? a : b; }

template <class T>
STEP_INLINE Pair<T> larger(const Pair<T> &x, const Pair<T> &y) { return {larger(x.a, y.a), larger(x.b, y.b)}; }

// Halves are added until four are left: each step is one instruction.
STEP_INLINE float sum_of(four f) { return (f[0] + f[2]) + (f[1] + f[3]); }

STEP_INLINE float sum_of(eight v) {
    four parts[2];
    memcpy(parts, &v, sizeof v);
    return sum_of(parts[0] + parts[1]);
}

STEP_INLINE float sum_of(sixteen v) {
    eight parts[2];
    memcpy(parts, &v, sizeof v);
    return sum_of(parts[0] + parts[1]);
}

template <class T>
STEP_INLINE float sum_of(const Pair<T> &v) { return sum_of(v.a + v.b); }

// e^v with a relative error below 1e-6; 0 below -87, infinite above 88.
template <class V>
STEP_INLINE V exp_of(V v) {
    typedef typename Beside<V>::integers Integers;
    const V low = V{} - 87.0f, high = V{} + 88.0f;
    const V inside = v < low ? low : (v > high ? high : v);
    const V turns = inside * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
    const Integers n = (Integers)turns;
    const V whole = turns - 12582912.0f;
    const V r = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= (V)(((n - 0x4b400000) + 127) << 23);
    p = v < low ? V{} : (v > high ? V{} + INFINITY : p);
    return v != v ? v : p;
}

template <class T>
STEP_INLINE Pair<T> exp_of(const Pair<T> &v) { return {exp_of(v.a), exp_of(v.b)}; }

}  // namespace
