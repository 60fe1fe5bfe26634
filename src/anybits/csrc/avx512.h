// AVX-512 with VBMI (vpermb: 64 byte lookups at once) and VNNI (vpdpbusd, vpdpwssd: widening sums).
#pragma once

#include "dequantize.h"

#include <immintrin.h>

namespace {

// For table j of a step and activation i of an entry: what lane L takes from 32 activations, or their negatives after them.
// Entry L % 16 has +x[i] where bit i is set; lanes from 16 on belong to the columns of a word's upper half.
struct EntryPlaces {
    alignas(64) int16_t at[4][4][32] = {};
    constexpr EntryPlaces() {
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 4; i++)
                for (int lane = 0; lane < 32; lane++)
                    at[j][i][lane] = static_cast<int16_t>(4 * j + i + (lane & 16) + (lane >> i & 1 ? 0 : 32));
    }
};
constexpr EntryPlaces ENTRY_PLACES;

struct Avx512 : ShortIntegers {
    using V = __m512i;
    using F = __m512;
    static constexpr int TILE = 16, LANES = 16, BYTES = 64;
    static constexpr int LOOKUP_ROWS = 4;       // rows of x that go through an inner loop together
    static constexpr int OUTPUTS_TOGETHER = 2, ROWS_TOGETHER = 2;
    static constexpr bool OWN_DEQUANTIZE = true, OWN_TOTALS = true, OWN_DOTS = true;
    static constexpr bool ROW_WORDS = true;
    static constexpr int TABLE_FLIP = 0;
    static constexpr bool WORD_ENTRIES = true;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float v) { return _mm512_set1_ps(v); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, F v) { _mm512_storeu_ps(p, v); }
    static float total(F v) { return _mm512_reduce_add_ps(v); }

    // The totals of sixteen vectors, `stride` floats apart: each round adds halves of pairs.
    static void totals(const float *at, int64_t stride, float *out) {
        F v[16];
        for (int i = 0; i < 16; i++) v[i] = load(at + i * stride);
        for (int i = 0; i < 8; i++)
            v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE));
        for (int i = 0; i < 4; i++)
            v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD));
        for (int i = 0; i < 2; i++)
            v[i] = _mm512_add_ps(_mm512_shuffle_ps(v[i], v[i + 2], 0x44), _mm512_shuffle_ps(v[i], v[i + 2], 0xEE));
        const F last = _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xDD));
        const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
        store(out, _mm512_permutexvar_ps(order, last));
    }

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

    // The largest signed sum of eight neighbours: two entries are added in 16 bits.
    static float peak_of_pairs(const float *x, int64_t columns, float *sum) {
        F peak = zero(), total = zero();
        for (int64_t i = 0; i < columns; i += 16) {
            const F v = load(x + i);
            F a = _mm512_abs_ps(v);
            a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
            a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4E));
            a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xB1));
            peak = _mm512_max_ps(peak, a);
            total = _mm512_add_ps(total, v);
        }
        *sum = _mm512_reduce_add_ps(total);
        return _mm512_reduce_max_ps(peak);
    }

    // The 128 entries of a step as 16 bits, 32 to a vector: table j has the sums of nibble j of a word's lower half, then of its
    // upper half. `whole`: x are integers.
    static void entries_of(const float *x, float inverse, bool whole, V *out) {
        if (whole) {
            const __m256i low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(load(x)));
            const __m256i high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(load(x + 16)));
            const V q = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            const V negative = _mm512_sub_epi16(_mm512_setzero_si512(), q);
            for (int j = 0; j < 4; j++) {
                V terms[4];
                for (int i = 0; i < 4; i++)
                    terms[i] = _mm512_permutex2var_epi16(q, _mm512_load_si512(ENTRY_PLACES.at[j][i]), negative);
                out[j] = _mm512_add_epi16(_mm512_add_epi16(terms[0], terms[1]), _mm512_add_epi16(terms[2], terms[3]));
            }
            return;
        }
        const __mmask16 plus[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};  // entries with +x[i]
        for (int j = 0; j < 4; j++) {
            __m256i halves[2];
            for (int half = 0; half < 2; half++) {
                F terms[4];
                for (int i = 0; i < 4; i++) {
                    const float v = x[16 * half + 4 * j + i];
                    terms[i] = _mm512_mask_blend_ps(plus[i], set1(-v), set1(v));
                }
                const F sum = _mm512_add_ps(_mm512_add_ps(terms[0], terms[1]), _mm512_add_ps(terms[2], terms[3]));
                halves[half] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(sum, set1(inverse))));
            }
            out[j] = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
        }
    }

    // The tables of a step: entries as they are, or high and low bytes, 256 * high + low, of those of tables 0 and 2 and of
    // tables 1 and 3.
    static void write_entries(const float *x, float inverse, bool whole, bool words, uint8_t *out) {
        V entries[4];
        entries_of(x, inverse, whole, entries);
        if (words) {
            for (int j = 0; j < 4; j++) _mm512_storeu_si512(out + 64 * j, entries[j]);
            return;
        }
        for (int j = 0; j < 4; j++) {
            const V high = _mm512_srai_epi16(_mm512_add_epi16(entries[j], _mm512_set1_epi16(128)), 8);
            uint8_t *at = out + 64 * (j & 1) + 32 * (j >> 1);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), _mm512_cvtepi16_epi8(high));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(at + 128), _mm512_cvtepi16_epi8(entries[j]));
        }
    }

    // A vector is one step: 16 rows' words.
    template <int MC, Entries E, int STEPS>
    static inline __attribute__((always_inline)) void lookup(const uint8_t *plane, int steps, const uint8_t *const *tables,
                                                             F (*sums)[1]) {
        const int count = STEPS ? STEPS : steps;
        const uint8_t *T[MC];
        for (int m = 0; m < MC; m++) {
            T[m] = tables[m];
            if (MC > 1) asm("" : "+r"(T[m]));  // or the compiler keeps tables from plane to plane, on the stack
        }
        if constexpr (E == WORDS)
            lookup_words<MC>(plane, count, T, sums);
        else
            lookup_bytes<MC, E == TWO_BYTES>(plane, count, T, sums);
    }

    // Each half of a word has its 16 entries of a table: bit 4 of an index says which half. Two entries are added in 16 bits
    // and then widened: vpermw, vpaddw and vpdpwssd together are as fast as vpermw alone.
    template <int MC>
    static inline __attribute__((always_inline)) void lookup_words(const uint8_t *plane, int count, const uint8_t *const *T,
                                                                   F (*sums)[1]) {
        const V nibble = _mm512_set1_epi32(0x000f000f), half = _mm512_set1_epi32(0x00100000), one = _mm512_set1_epi16(1);
        V acc[MC][2];
        for (int m = 0; m < MC; m++) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
            V v = _mm512_loadu_si512(plane + t * 64);
            asm("" : "+v"(v));  // or every shift loads it again
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {  // (v >> 4 * nibble & 15) | half
                const V first = _mm512_ternarylogic_epi32(j ? _mm512_srli_epi16(v, 8) : v, nibble, half, 0xEA);
                const V second = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, 8 * j + 4), nibble, half, 0xEA);
#pragma GCC unroll 8
                for (int m = 0; m < MC; m++) {
                    const uint8_t *at = T[m] + t * WIDE_TABLE + 128 * j;
                    const V pair = _mm512_add_epi16(_mm512_permutexvar_epi16(first, _mm512_loadu_si512(at)),
                                                    _mm512_permutexvar_epi16(second, _mm512_loadu_si512(at + 64)));
                    V &sum = acc[m][MC > 2 ? 0 : j];
                    sum = _mm512_dpwssd_epi32(sum, pair, one);
                }
            }
        }
        for (int m = 0; m < MC; m++)
            sums[m][0] = _mm512_cvtepi32_ps(MC > 2 ? acc[m][0] : _mm512_add_epi32(acc[m][0], acc[m][1]));
    }

    // The four bytes of a word index four tables that stand side by side in one register, so a table's place is bits 4 and 5
    // of its byte's index.
    template <int MC, bool WIDE>
    static inline __attribute__((always_inline)) void lookup_bytes(const uint8_t *plane, int count,
                                                                   const uint8_t *const *T, F (*sums)[1]) {
        const V nibble = _mm512_set1_epi32(0x0f0f0f0f), one = _mm512_set1_epi8(1);
        const V place = _mm512_set1_epi32(WIDE ? 0x30102000 : 0x30201000);
        constexpr int TABLE = WIDE ? WIDE_TABLE : SHORT_TABLE;
        V high[MC][2], low[MC][2];
        for (int m = 0; m < MC; m++) high[m][0] = high[m][1] = low[m][0] = low[m][1] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
            const V v = _mm512_loadu_si512(plane + t * 64);
            V index[2];  // (v & nibble) | place
            index[0] = _mm512_ternarylogic_epi32(v, nibble, place, 0xEA);
            index[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v, 4), nibble, place, 0xEA);
#pragma GCC unroll 8
            for (int m = 0; m < MC; m++)
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    const uint8_t *at = T[m] + t * TABLE + 64 * i;
                    high[m][i] = _mm512_dpbusd_epi32(high[m][i], one, _mm512_permutexvar_epi8(index[i], _mm512_loadu_si512(at)));
                    if constexpr (WIDE)
                        low[m][i] = _mm512_dpbusd_epi32(low[m][i], one,
                                                        _mm512_permutexvar_epi8(index[i], _mm512_loadu_si512(at + 128)));
                }
        }
        for (int m = 0; m < MC; m++) {
            V sum = _mm512_add_epi32(high[m][0], high[m][1]);
            if constexpr (WIDE)
                sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_add_epi32(low[m][0], low[m][1]));
            sums[m][0] = _mm512_cvtepi32_ps(sum);
        }
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
    static V down(V v, int n) { return _mm512_srl_epi16(v, _mm_cvtsi32_si128(n)); }

    // Even columns, then odd ones: a 16-bit lane of codes holds an even column below an odd one.
    static void reorder(const int16_t *q, int16_t *out) {
        const V a = _mm512_loadu_si512(q), b = _mm512_loadu_si512(q + 32), low = _mm512_set1_epi32(0xffff);
        const V order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        const V even = _mm512_packus_epi32(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
        const V odd = _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi64(order, even));
        _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi64(order, odd));
    }

    struct Words { V w[8]; };

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
        void lookup(const V *codes, Words &out) const {
            for (int i = 0; i < 4; i++) out.w[2 * i] = find(codes[i]), out.w[2 * i + 1] = find(_mm512_srli_epi16(codes[i], 8));
        }
    };

    static V add_products(V sum, V centroids, V x) { return _mm512_dpwssd_epi32(sum, centroids, x); }

    // M rows of x and R output rows at a time, in sums enough that none waits for the one before; each load serves R of them.
    // `I`: whose products they are.
    template <int M, int R, class I = Avx512>
    static inline __attribute__((always_inline)) void dots(const typename I::Words *w, const typename I::X *const *x, F (*out)[R]) {
        constexpr int CHAINS = M == 2 && R == 1 ? 2 : 1, COUNT = sizeof w->w / sizeof *w->w;
        V sums[M][R][CHAINS];
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R; r++)
                for (int j = 0; j < CHAINS; j++) sums[m][r][j] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                V v = _mm512_loadu_si512(x[m] + BYTES / sizeof **x * i);
                if (R > 1) asm("" : "+v"(v));  // or each product loads it again
#pragma GCC unroll 2
                for (int r = 0; r < R; r++) sums[m][r][i % CHAINS] = I::add_products(sums[m][r][i % CHAINS], w[r].w[i], v);
            }
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R; r++) {
                V *s = sums[m][r];
                if constexpr (CHAINS == 4) s[0] = _mm512_add_epi32(s[0], s[2]), s[1] = _mm512_add_epi32(s[1], s[3]);
                if constexpr (CHAINS > 1) s[0] = _mm512_add_epi32(s[0], s[1]);
                out[m][r] = _mm512_cvtepi32_ps(s[0]);
            }
    }
};

}  // namespace
