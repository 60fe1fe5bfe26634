// AVX-512 with VBMI (vpermb: 64 byte lookups at once) and VNNI (vpdpbusd, vpdpwssd: widening sums).
#pragma once

#include "dequantize.h"

#include <immintrin.h>

namespace {

struct Avx512 {
    using V = __m512i;
    using F = __m512;
    static constexpr int TILE = 16, LANES = 16, BYTES = 64;
    static constexpr int LOOKUP_ROWS = 4, DOT_ROWS = 4;  // rows of x that go through an inner loop together
    static constexpr bool OWN_DEQUANTIZE = true;
    static constexpr bool ROW_WORDS = true;
    static constexpr int TABLE_FLIP = 0;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float v) { return _mm512_set1_ps(v); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, F v) { _mm512_storeu_ps(p, v); }
    static float total(F v) { return _mm512_reduce_add_ps(v); }

    template <int DTYPE>
    static F level(const uint8_t *p, int f) {
        if constexpr (DTYPE == AB_F32) return _mm512_loadu_ps(reinterpret_cast<const float *>(p) + f * 16);
        if constexpr (DTYPE == AB_I8)
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p) + f)));
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p) + f);
        if constexpr (DTYPE == AB_F16) return _mm512_cvtph_ps(h);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }

    static void load_f16(const uint16_t *p, float *out, int64_t n) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + i))));
        for (; i < n; i++) out[i] = f16_to_float(p[i]);
    }
    static void store_f16(const float *p, uint16_t *out, int64_t n) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(p + i), 0));
        for (; i < n; i++) out[i] = float_to_f16(p[i]);
    }

    // A vector is one step: 16 rows' words. The four bytes of a word index four tables that stand side by side
    // in one register, so the byte's place in the word is bits 4 and 5 of its index.
    template <int MC, bool WIDE, int STEPS>
    static inline __attribute__((always_inline)) void lookup(const uint8_t *plane, int steps,
                                                             const uint8_t *const *tables, F (*sums)[1]) {
        const V nibble = _mm512_set1_epi32(0x0f0f0f0f), place = _mm512_set1_epi32(0x30201000);
        const V one = _mm512_set1_epi8(1), top = _mm512_set1_epi8(WIDE ? -1 : 1);  // 255 as an unsigned byte
        constexpr int TABLE = WIDE ? WIDE_TABLE : FAST_TABLE;
        V acc[MC][2];
        for (int m = 0; m < MC; m++) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
        const int count = STEPS ? STEPS : steps;
        const uint8_t *T[MC];
        for (int m = 0; m < MC; m++) {
            T[m] = tables[m];
            if (MC > 1) asm("" : "+r"(T[m]));  // or the compiler keeps tables from plane to plane, on the stack
        }
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
            const V v = _mm512_loadu_si512(plane + t * 64);
            const V low = _mm512_ternarylogic_epi32(v, nibble, place, 0xEA);  // (v & nibble) | place
            const V high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v, 4), nibble, place, 0xEA);
#pragma GCC unroll 8
            for (int m = 0; m < MC; m++) {
                const uint8_t *at = T[m] + t * TABLE;
                acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], top, _mm512_permutexvar_epi8(low, _mm512_loadu_si512(at)));
                acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], top, _mm512_permutexvar_epi8(high, _mm512_loadu_si512(at + 64)));
                if constexpr (WIDE) {
                    acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], one, _mm512_permutexvar_epi8(low, _mm512_loadu_si512(at + 128)));
                    acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], one, _mm512_permutexvar_epi8(high, _mm512_loadu_si512(at + 192)));
                }
            }
        }
        for (int m = 0; m < MC; m++) sums[m][0] = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[m][0], acc[m][1]));
    }

    static F any_level(const Header *h, const uint8_t *p, const float *steps, int64_t entry) {
        const uint8_t *at = p + entry * TILE * level_size(h->shape.level_dtype);
        if (h->shape.level_dtype == AB_I8) return level_in_steps<Avx512, AB_I8>(at, steps + entry * TILE, 0);
        if (h->shape.level_dtype == AB_F16) return level<AB_F16>(at, 0);
        return h->shape.level_dtype == AB_BF16 ? level<AB_BF16>(at, 0) : level<AB_F32>(at, 0);
    }

    // Sixteen floats rounded to bf16, to nearest even.
    static __m256i rounded(F v) {
        const V u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const V up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
    }

    // A whole step of a whole tile, the last column first: its bits are the signs of the words.
    template <int P>
    static void dequantize_step(const uint32_t (*words)[16], const float (*scales)[16], const float *offsets, int dtype,
                                void *out, int64_t at, int64_t stride) {
        const V top = _mm512_set1_epi32(static_cast<int>(0x80000000u));
        const F offset = load(offsets);
        V bits[P], scale[P];
        for (int b = 0; b < P; b++) bits[b] = _mm512_loadu_si512(words[b]), scale[b] = _mm512_loadu_si512(scales[b]);
        for (int64_t k = STEP - 1; k >= 0; k--) {
            F v = offset;
            for (int b = 0; b < P; b++) {  // scale ^ (~bits & top)
                v = _mm512_add_ps(v, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits[b], scale[b], top, 0xC6)));
                bits[b] = _mm512_slli_epi32(bits[b], 1);
            }
            const int64_t to = at + k * stride;
            if (dtype == AB_F32)
                _mm512_storeu_ps(static_cast<float *>(out) + to, v);
            else
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(static_cast<uint16_t *>(out) + to), rounded(v));
        }
    }

    // Whole spans of a codebook row as bf16: `values` are the centroids, at least 32 of them.
    template <int P>
    static void dequantize_spans(const uint8_t *plane, int64_t stride, int64_t spans, const float *values, uint16_t *out) {
        constexpr int COUNT = 1 << P < 16 ? 16 : 1 << P;
        alignas(64) int16_t halves[COUNT];
        for (int i = 0; i < COUNT; i += 16) _mm256_store_si256(reinterpret_cast<__m256i *>(halves + i), rounded(load(values + i)));
        const Table<P> table(halves);
        const V first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for (int64_t span = 0; span < spans; span++, plane += 64) {
            V planes[P], codes[8];
            for (int b = 0; b < P; b++) planes[b] = load_bytes(plane + b * stride);
            merge_codes<Avx512, P>(planes, codes);
            for (int i = 0; i < 8; i++, out += 64) {
                const V even = table.find(codes[i]), odd = table.find(_mm512_srli_epi16(codes[i], 8));
                const V low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
                _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, first, high));
                _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(low, second, high));
            }
        }
    }

    static V bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
    static V load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
    static void store_bytes(uint8_t *p, V v) { _mm512_storeu_si512(p, v); }
    static V both(V a, V b) { return _mm512_and_si512(a, b); }
    static V select(V mask, V a, V b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }
    template <int N>
    static V right(V v) { return _mm512_srli_epi16(v, N); }
    template <int N>
    static V left(V v) { return _mm512_slli_epi16(v, N); }

    // Even columns, then odd ones: a 16-bit lane of codes holds an even column below an odd one.
    static void reorder(const int16_t *q, int16_t *out) {
        const V a = _mm512_loadu_si512(q), b = _mm512_loadu_si512(q + 32), low = _mm512_set1_epi32(0xffff);
        const V order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        const V even = _mm512_packus_epi32(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
        const V odd = _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi64(order, even));
        _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi64(order, odd));
    }

    struct Words { V w[4]; };

    // A table shorter than 32 entries is repeated, so leftover index bits do not matter.
    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 5 ? 1 : 1 << (P - 5);
        V t[COUNT];
        explicit Table(const int16_t *c) {
            if constexpr (P == 1) {
                int32_t v;
                memcpy(&v, c, 4);
                t[0] = _mm512_set1_epi32(v);
            } else if constexpr (P == 2) {
                int64_t v;
                memcpy(&v, c, 8);
                t[0] = _mm512_set1_epi64(v);
            } else if constexpr (P == 3) {
                t[0] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(c)));
            } else if constexpr (P == 4) {
                t[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(c)));
            } else {
                for (int i = 0; i < COUNT; i++) t[i] = _mm512_loadu_si512(c + 32 * i);
            }
        }
        V find(V code) const {
            if constexpr (P <= 5) {
                return _mm512_permutexvar_epi16(code, t[0]);
            } else if constexpr (P == 6) {
                return _mm512_permutex2var_epi16(t[0], code, t[1]);
            } else {
                const V a = _mm512_permutex2var_epi16(t[0], code, t[1]), b = _mm512_permutex2var_epi16(t[2], code, t[3]);
                const V low = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), a, b);
                if constexpr (P == 7) {
                    return low;
                } else {
                    const V d = _mm512_permutex2var_epi16(t[4], code, t[5]);
                    const V e = _mm512_permutex2var_epi16(t[6], code, t[7]);
                    const V high = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), d, e);
                    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(128)), low, high);
                }
            }
        }
        void lookup(V a, V b, Words &out) const {
            out.w[0] = find(a), out.w[1] = find(_mm512_srli_epi16(a, 8));
            out.w[2] = find(b), out.w[3] = find(_mm512_srli_epi16(b, 8));
        }
    };

    static F dot(const Words &w, const int16_t *x) {
        V sum = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w.w[0], _mm512_loadu_si512(x));
        for (int i = 1; i < 4; i++) sum = _mm512_dpwssd_epi32(sum, w.w[i], _mm512_loadu_si512(x + 32 * i));
        return _mm512_cvtepi32_ps(sum);
    }
};

}  // namespace
