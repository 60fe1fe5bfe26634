// AVX2 with FMA and F16C: byte lookups (vpshufb) within 16-entry tables, sums of bytes in 16-bit halves.
#pragma once

#include "dequantize.h"
#include "word_levels.h"

#include <immintrin.h>

namespace {

struct Avx2 : ShortIntegers {
    using V = __m256i;
    using F = __m256;
    static constexpr int TILE = 32, LANES = 8, BYTES = 32;
    static constexpr int LOOKUP_ROWS = 2;       // rows of x that go through an inner loop together
    static constexpr int CODES_ROWS = 5;

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float v) { return _mm256_set1_ps(v); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, F v) { _mm256_storeu_ps(p, v); }
    static float total(F v) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    template <int DTYPE>
    static F level(const uint8_t *p, int f) {
        if constexpr (DTYPE == AB_F32) return _mm256_loadu_ps(reinterpret_cast<const float *>(p) + f * 8);
        if constexpr (DTYPE == AB_I8)
            return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + f * 8))));
        const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p) + f);
        if constexpr (DTYPE == AB_F16) return _mm256_cvtph_ps(h);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }

    static void load_f16(const uint16_t *p, float *out, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + i))));
        for (; i < n; i++) out[i] = f16_to_float(p[i]);
    }
    static void store_f16(const float *p, uint16_t *out, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(p + i), 0));
        for (; i < n; i++) out[i] = float_to_f16(p[i]);
    }

    static V table_at(const uint8_t *p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }

    // Sums of unsigned bytes: `all` adds whole 16-bit lanes (even byte + 256 * odd byte, modulo 2^16), `odd` the
    // odd bytes alone; a block has at most 32 lookups, so neither sum of bytes overflows 16 bits.
    struct ByteSums {
        V all, odd;
        void clear() { all = odd = _mm256_setzero_si256(); }
        void add(V bytes) {
            all = _mm256_add_epi16(all, bytes);
            odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
        }
        // The sums of rows 0-7, 8-15, 16-23, 24-31 as 32-bit integers.
        void rows(V *out) const {
            const V even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
            const V low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
            out[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(low));
            out[1] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(high));
            out[2] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(low, 1));
            out[3] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(high, 1));
        }
    };

    template <int MC, Entries E, int STEPS>
    static inline __attribute__((always_inline)) void lookup(const uint8_t *plane, int steps,
                                                             const uint8_t *const *tables, F (*sums)[4]) {
        constexpr bool WIDE = E == TWO_BYTES;
        const V nibble = _mm256_set1_epi8(0x0f);
        constexpr int TABLE = table_of(E);
        const int count = STEPS ? STEPS : steps;
        ByteSums high[MC], low[MC];
        for (int m = 0; m < MC; m++) high[m].clear(), low[m].clear();
        for (int t = 0; t < count; t++) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const V v = _mm256_loadu_si256(reinterpret_cast<const V *>(plane + t * 128 + j * 32));
                const V a = _mm256_and_si256(v, nibble), b = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
                for (int m = 0; m < MC; m++) {
                    const uint8_t *T = tables[m] + t * TABLE + j * 16;
                    high[m].add(_mm256_shuffle_epi8(table_at(T), a));
                    high[m].add(_mm256_shuffle_epi8(table_at(T + 64), b));
                    if constexpr (WIDE) {
                        low[m].add(_mm256_shuffle_epi8(table_at(T + 128), a));
                        low[m].add(_mm256_shuffle_epi8(table_at(T + 192), b));
                    }
                }
            }
        }
        const V bias = _mm256_set1_epi32(count * 8 * (WIDE ? 128 * 256 : 128));
        for (int m = 0; m < MC; m++) {
            V top[4], rest[4];
            high[m].rows(top);
            if constexpr (WIDE) {
                low[m].rows(rest);
                for (int i = 0; i < 4; i++)  // 255 * top + rest
                    top[i] = _mm256_add_epi32(_mm256_sub_epi32(_mm256_slli_epi32(top[i], 8), top[i]), rest[i]);
            }
            for (int i = 0; i < 4; i++) sums[m][i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(top[i], bias));
        }
    }

    static V bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
    static V load_bytes(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const V *>(p)); }
    static void store_bytes(uint8_t *p, V v) { _mm256_storeu_si256(reinterpret_cast<V *>(p), v); }
    static V both(V a, V b) { return _mm256_and_si256(a, b); }
    static V select(V mask, V a, V b) {
        return _mm256_xor_si256(b, _mm256_and_si256(mask, _mm256_xor_si256(a, b)));
    }
    template <int N>
    static V right(V v) { return _mm256_srli_epi16(v, N); }
    template <int N>
    static V left(V v) { return _mm256_slli_epi16(v, N); }
    static V down(V v, int n) { return _mm256_srl_epi16(v, _mm_cvtsi32_si128(n)); }

    // Interleaving bytes into 16-bit centroids works within 16 columns' halves: columns 0-7, 16-23, 8-15, 24-31.
    static void reorder(const int16_t *q, int16_t *out) {
        static constexpr int FROM[4] = {0, 16, 8, 24};
        for (int run = 0; run < 64; run += 32)
            for (int i = 0; i < 4; i++) memcpy(out + run + 8 * i, q + run + FROM[i], 16);
    }

    struct Words { V w[8]; };

    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 4 ? 1 : 1 << (P - 4), ENTRIES = 16 * COUNT;
        alignas(32) uint8_t low[ENTRIES], high[ENTRIES];
        explicit Table(const int16_t *c) {
            for (int i = 0; i < ENTRIES; i++) {  // a table shorter than 16 entries is repeated
                const uint16_t v = static_cast<uint16_t>(c[i & ((1 << P) - 1)]);
                low[i] = static_cast<uint8_t>(v), high[i] = static_cast<uint8_t>(v >> 8);
            }
        }
        // Entries [first, first + 16 * N) by halves; the halving bit of the code is moved to the top of its byte.
        template <int N>
        static V find(const uint8_t *entries, V index, V code) {
            if constexpr (N == 1) {
                return _mm256_shuffle_epi8(table_at(entries), index);
            } else {
                constexpr int BIT = N == 2 ? 4 : N == 4 ? 5 : N == 8 ? 6 : 7;
                const V a = find<N / 2>(entries, index, code), b = find<N / 2>(entries + 8 * N, index, code);
                return _mm256_blendv_epi8(a, b, _mm256_slli_epi16(code, 7 - BIT));
            }
        }
        void one(V code, V *out) const {
            const V index = _mm256_and_si256(code, _mm256_set1_epi8(0x0f));
            const V l = find<COUNT>(low, index, code), h = find<COUNT>(high, index, code);
            out[0] = _mm256_unpacklo_epi8(l, h), out[1] = _mm256_unpackhi_epi8(l, h);
        }
        void lookup(const V *codes, Words &out) const {
            for (int i = 0; i < 4; i++) one(codes[i], out.w + 2 * i);
        }
    };

    static F dot(const Words &w, const int16_t *x) {
        V sum = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            const V v = _mm256_loadu_si256(reinterpret_cast<const V *>(x + (i >> 1) * 64 + (i & 1) * 16));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.w[i], v));
        }
        return _mm256_cvtepi32_ps(sum);
    }

    // For word_levels.h: vectors of two rows, q and q + 16.
    using Sum = V;
    static Sum no_sum() { return _mm256_setzero_si256(); }
    static V zip_low(V a, V b) { return _mm256_unpacklo_epi8(a, b); }
    static V zip_high(V a, V b) { return _mm256_unpackhi_epi8(a, b); }
    static V add_words(V a, V b) { return _mm256_add_epi16(a, b); }
    static V find(V table, V code) { return _mm256_shuffle_epi8(table, _mm256_and_si256(code, bytes(0x0f))); }
    static V eight_words(const int16_t *p) { return table_at(reinterpret_cast<const uint8_t *>(p)); }
    static Sum add_word_products(Sum sum, V w, V x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
    static constexpr int row_of(int place) { return place / 8 * 4 + place % 4 + (place & 4 ? 16 : 0); }
    // What vhaddps does, in fewer operations.
    static F add_neighbours(F a, F b) { return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD)); }
    static F four_totals(const Sum *s) {
        const F first = add_neighbours(_mm256_cvtepi32_ps(s[0]), _mm256_cvtepi32_ps(s[1]));
        return add_neighbours(first, add_neighbours(_mm256_cvtepi32_ps(s[2]), _mm256_cvtepi32_ps(s[3])));
    }
    // 32 rows' values, rounded, as low and high bytes.
    static void narrow(const F *v, V *low, V *high) {
        V pairs[2];
        for (int i = 0; i < 2; i++) pairs[i] = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2 * i]), _mm256_cvtps_epi32(v[2 * i + 1]));
        const V order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), byte = _mm256_set1_epi16(255);
        const V l = _mm256_packus_epi16(_mm256_and_si256(pairs[0], byte), _mm256_and_si256(pairs[1], byte));
        const V h = _mm256_packus_epi16(_mm256_srli_epi16(pairs[0], 8), _mm256_srli_epi16(pairs[1], 8));
        *low = _mm256_permutevar8x32_epi32(l, order), *high = _mm256_permutevar8x32_epi32(h, order);
    }
};

}  // namespace
