// Levels of 16 output rows in bf16, four columns at a time: Bf16Tables and what becomes of them, for levels.h.
#pragma once

#include "levels.h"

namespace {

// Tables of the two bytes of each level. More than four planes are added up: three at a time have tables of their own, two vectors
// of each byte, of integers in steps of `steps`: two of each row, rows 0 ... 7 and 8 ... 15.
struct alignas(64) Bf16Tables {
    __m512i low[6], high[6];
    __m512 steps[2];
};

constexpr int SUMMED_PLANES = 3;

// For four columns of 16 rows [row][4], low bytes first and high ones 64 behind: two of them [row][2] in 16 bits, and the same with
// rows 0 ... 7 in the low and rows 8 ... 15 in the high halves of lanes.
struct PairPlaces {
    alignas(64) uint8_t rows[2][64] = {}, halves[2][64] = {};
    constexpr PairPlaces() {
        for (int pair = 0; pair < 2; pair++)
            for (int lane = 0; lane < 64; lane++) {
                const int high = lane & 1 ? 64 : 0, word = lane >> 1, half = word & 1, inner = word >> 1;
                rows[pair][lane] = static_cast<uint8_t>(4 * (word / 2) + 2 * pair + word % 2 + high);
                halves[pair][lane] = static_cast<uint8_t>(4 * (8 * half + inner / 2) + 2 * pair + inner % 2 + high);
            }
    }
};
constexpr PairPlaces PAIR_PLACES;

// For byte 4 r + e: the low byte of value r of [e][16] in 16 bits.
struct BytePlaces {
    alignas(64) uint8_t low[64] = {}, high[64] = {};
    constexpr BytePlaces() {
        for (int lane = 0; lane < 64; lane++) {
            low[lane] = static_cast<uint8_t>(32 * (lane & 3) + 2 * (lane >> 2));
            high[lane] = static_cast<uint8_t>(low[lane] + 1);
        }
    }
};
constexpr BytePlaces BYTE_PLACES;

// A table of both bytes from two entries' values of 16 rows in each vector.
inline void split_entries(__m512i first, __m512i second, __m512i *low, __m512i *high) {
    *low = _mm512_permutex2var_epi8(first, _mm512_load_si512(BYTE_PLACES.low), second);
    *high = _mm512_permutex2var_epi8(first, _mm512_load_si512(BYTE_PLACES.high), second);
}

inline __m512 signed_sum(__m512 sum, bool set, __m512 scale) { return set ? _mm512_add_ps(sum, scale) : _mm512_sub_ps(sum, scale); }

// Sums of up to four planes and `offset`, in the order of PlaneWeight.dequantize: take(group, entries) gets those of each group's four entries.
template <int P, class F>
inline void level_sums(__m512 offset, const __m512 *scales, const F &take) {
    __m512 pairs[4];
    for (int e = 0; e < 4; e++) {
        pairs[e] = signed_sum(offset, e & 1, scales[0]);
        if (P >= 2) pairs[e] = signed_sum(pairs[e], e & 2, scales[1]);
    }
    for (int g = 0; g < (P <= 2 ? 1 : 1 << (P - 2)); g++) {
        __m512 sums[4];
        for (int e = 0; e < 4; e++) {
            sums[e] = pairs[e];
            for (int b = 2; b < P; b++) sums[e] = signed_sum(sums[e], g >> (b - 2) & 1, scales[b]);
        }
        take(g, sums);
    }
}

inline __m512i bf16_of_two(__m512 first, __m512 second) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)); }

// Two vectors of integers that 16 bits hold, one behind the other.
inline __m512i words_of_two(__m512 first, __m512 second) {
    const __m256i a = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(first)), b = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(second));
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// Tables of planes `FIRST` and up to two behind it, of P in all.
template <int P, int FIRST>
inline void fill_summed_tables(__m512 offset, const __m512 *scales, Bf16Tables *out) {
    constexpr int COUNT = P - FIRST < SUMMED_PLANES ? P - FIRST : SUMMED_PLANES, AT = FIRST / SUMMED_PLANES * 2;
    level_sums<COUNT>(offset, scales + FIRST, [&](int g, const __m512 *sums) {
        split_entries(words_of_two(sums[0], sums[1]), words_of_two(sums[2], sums[3]), &out->low[AT + g], &out->high[AT + g]);
    });
    if constexpr (FIRST + COUNT < P) fill_summed_tables<P, FIRST + COUNT>(_mm512_setzero_ps(), scales, out);
}

// Of a block. The largest sum of five planes and more has 32765 steps, so that three roundings stay in 16 bits.
template <int P>
inline void fill_bf16_tables(__m512 *scales, __m512 offset, Bf16Tables *out) {
    if constexpr (P <= 4) {
        level_sums<P>(offset, scales, [&](int g, const __m512 *sums) {
            split_entries(bf16_of_two(sums[0], sums[1]), bf16_of_two(sums[2], sums[3]), &out->low[g], &out->high[g]);
        });
    } else {
        __m512 peak = _mm512_abs_ps(offset);
        for (int b = 0; b < P; b++) peak = _mm512_add_ps(peak, _mm512_abs_ps(scales[b]));
        const __mmask16 some = _mm512_cmp_ps_mask(peak, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(32765.0f), peak);
        const __m512 step = _mm512_mul_ps(peak, _mm512_set1_ps(1.0f / 32765.0f / 65536.0f));  // of the upper 16 bits of 32
        for (int b = 0; b < P; b++) scales[b] = _mm512_mul_ps(scales[b], inverse);
        fill_summed_tables<P, 0>(_mm512_mul_ps(offset, inverse), scales, out);
        alignas(64) static constexpr int32_t TWICE[2][16] = {{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7},
                                                             {8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15}};
        for (int half = 0; half < 2; half++) out->steps[half] = _mm512_permutexvar_ps(_mm512_load_si512(TWICE[half]), step);
    }
}

// Levels of up to four planes for columns 0 and 1, and 2 and 3, as `places` has them.
template <int P>
inline __attribute__((always_inline)) void find_words(const __m512i *low, const __m512i *high, const __m512i *words, int bit,
                                                      const uint8_t (*places)[64], __m512i *out) {
    const LevelPlaces at = level_places<P>(words, bit);
    const __m512i l = find_levels<P>(low, at), h = find_levels<P>(high, at);
    for (int pair = 0; pair < 2; pair++) out[pair] = _mm512_permutex2var_epi8(l, _mm512_load_si512(places[pair]), h);
}

// Adds those of planes FIRST and behind it to `sums`.
template <int P, int FIRST>
inline __attribute__((always_inline)) void add_words(const Bf16Tables &tables, const __m512i *words, int bit, __m512i *sums) {
    constexpr int COUNT = P - FIRST < SUMMED_PLANES ? P - FIRST : SUMMED_PLANES, AT = FIRST / SUMMED_PLANES * 2;
    __m512i more[2];
    find_words<COUNT>(tables.low + AT, tables.high + AT, words + FIRST, bit, PAIR_PLACES.halves, more);
    for (int pair = 0; pair < 2; pair++) sums[pair] = FIRST ? _mm512_add_epi16(sums[pair], more[pair]) : more[pair];
    if constexpr (FIRST + COUNT < P) add_words<P, FIRST + COUNT>(tables, words, bit, sums);
}

template <int P>
inline __attribute__((always_inline)) void store_bf16(const Bf16Tables &tables, const __m512i *words, int bit, uint8_t *out) {
    __m512i pairs[2];
    if constexpr (P <= 4) {
        find_words<P>(tables.low, tables.high, words, bit, PAIR_PLACES.rows, pairs);
    } else {
        add_words<P, 0>(tables, words, bit, pairs);
        for (int pair = 0; pair < 2; pair++) {
            // What the lower half leaves below the upper one is less than a step.
            const __m512 first = _mm512_cvtepi32_ps(_mm512_slli_epi32(pairs[pair], 16)), second = _mm512_cvtepi32_ps(pairs[pair]);
            pairs[pair] = bf16_of_two(_mm512_mul_ps(first, tables.steps[0]), _mm512_mul_ps(second, tables.steps[1]));
        }
    }
    for (int pair = 0; pair < 2; pair++) _mm512_store_si512(out + 64 * pair, pairs[pair]);
}

// ---- codebooks

// A row's 2^P centroids as bf16: [16 or more], in whole vectors of two bytes' tables.
inline __m256i bf16_centroids(const int16_t *centroids, float scale) {
    const __m512i v = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(centroids)));
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(scale))));
}

// Of five planes and more: the bytes of a row's centroids, 64 in a vector; 32 are there twice.
template <int P>
struct RowTables {
    static constexpr int COUNT = P <= 6 ? 1 : 1 << (P - 6);
    __m512i low[COUNT], high[COUNT];
    void fill(const int16_t *centroids, float scale) {
        for (int i = 0; i < 4 * COUNT; i++) {
            const __m256i v = bf16_centroids(centroids + (16 * i & ((1 << P) - 1)), scale);
            _mm_store_si128(reinterpret_cast<__m128i *>(low) + i, _mm256_cvtepi16_epi8(v));
            _mm_store_si128(reinterpret_cast<__m128i *>(high) + i, _mm256_cvtepi16_epi8(_mm256_srli_epi16(v, 8)));
        }
    }
};

template <int P>
inline __m512i find_bytes(const __m512i *table, __m512i codes) {
    if constexpr (P <= 6) {
        return _mm512_permutexvar_epi8(codes, table[0]);
    } else {
        const __m512i first = _mm512_permutex2var_epi8(table[0], codes, table[1]);
        if constexpr (P == 7) return first;
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), first, _mm512_permutex2var_epi8(table[2], codes, table[3]));
    }
}

// values[i][half][row]: columns 64 i + 16 q + 8 half ... + 7 of a span, q = 0 ... 3.
using SpanValues = __m512i[8][2][16];

// A span of one output row.
template <int P>
inline void row_values(const Header *h, int64_t n, int64_t span, int64_t ahead, const RowTables<P> &from, int row, SpanValues &values) {
    const RowTables<P> tables = from;  // in registers, whatever is stored
    const uint8_t *plane = plane_at(h, 0, n) + span * 64;
    __m512i planes[P], codes[8];
    for (int b = 0; b < P; b++) {
        fetch_ahead(plane + b * h->plane_stride + ahead);
        planes[b] = _mm512_loadu_si512(plane + b * h->plane_stride);
    }
    merge_codes<Avx512, P>(planes, codes);
    for (int i = 0; i < 8; i++) {
        const __m512i low = find_bytes<P>(tables.low, codes[i]), high = find_bytes<P>(tables.high, codes[i]);
        values[i][0][row] = _mm512_unpacklo_epi8(low, high);
        values[i][1][row] = _mm512_unpackhi_epi8(low, high);
    }
}

// Pairs of columns of 16 rows, in the order of order_span: pair p of 64 i ... 64 i + 63 is two words' bits i.
inline void store_span(SpanValues &values, uint8_t *out) {
    for (int i = 0; i < 8; i++)
        for (int half = 0; half < 2; half++) {
            transpose(values[i][half]);
            for (int j = 0; j < 16; j++) {
                const int pair = j / 4 * 8 + half * 4 + j % 4;
                _mm512_store_si512(out + 64 * (pair / 2 * 16 + 2 * i + pair % 2), values[i][half][j]);
            }
        }
}

}  // namespace
