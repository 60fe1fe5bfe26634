// Affine levels, many rows of bf16 x: a block of two tiles becomes bf16 in the first cache, once for all rows of x, and
// vdpbf16ps multiplies and adds. What a matrix of bf16 weights would give, without ever writing it.
#pragma once

#include "avx512_bytes.h"

namespace {

constexpr int BF16_PLANES = 4;
constexpr int64_t BF16_BLOCK = 2 * BLOCK_BYTES;  // bytes of the levels of one block of one tile: [2 columns][16 rows][2]

// Tables of the two bytes of each level.
struct alignas(64) Bf16Tables {
    __m512i low[4], high[4];
};

// Activations of one row: [block][row of x][column], a step's columns in the order in which its levels come.
inline int16_t *bf16_activations_at(const Call &c, int64_t block, int row) {
    return reinterpret_cast<int16_t *>(c.tables) + (block * c.rows + row) * c.weight->block_columns;
}

inline void bf16_activations(const Call &c, int row) {
    const Header *h = c.weight;
    const int64_t k = h->shape.in_features;
    const int16_t *x = static_cast<const int16_t *>(c.x) + row * c.x_stride;
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                                       4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
    for (int64_t step = 0; step < h->steps; step++) {
        const int64_t column = step * STEP, block = column / h->block_columns, left = k - column;
        const __mmask32 some = left >= 32 ? ~0u : (1u << left) - 1;
        const __m512i v = _mm512_maskz_loadu_epi16(some, x + column);
        _mm512_storeu_si512(bf16_activations_at(c, block, row) + column % h->block_columns,
                            _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), v));
    }
}

template <int P, int DTYPE>
void fill_bf16_tables(const Header *h, int64_t tile, int64_t block, Bf16Tables *out) {
    const int64_t entries = affine_entries(h->shape, P), level_bytes = 16 * level_size(DTYPE);
    const uint8_t *level = affine_levels_at(h, P, tile) + block / h->blocks_per_group * entries * level_bytes;
    const float *steps = affine_steps_at(h, P, tile);
    __m512 scales[P], offset = _mm512_setzero_ps();
    for (int b = 0; b < P; b++) scales[b] = level_in_steps<Avx512, DTYPE>(level + b * level_bytes, steps + b * 16, 0);
    if (h->shape.has_offsets) offset = level_in_steps<Avx512, DTYPE>(level + P * level_bytes, steps + P * 16, 0);
    for (int g = 0; g < (P <= 2 ? 1 : 1 << (P - 2)); g++) {
        __m512i low = _mm512_setzero_si512(), high = low;
        for (int e = 3; e >= 0; e--) {
            __m512 value = offset;
            for (int b = 0; b < P; b++) {  // the order of PlaneWeight.dequantize
                const bool set = b < 2 ? e >> b & 1 : g >> (b - 2) & 1;
                value = set ? _mm512_add_ps(value, scales[b]) : _mm512_sub_ps(value, scales[b]);
            }
            const __m512i u = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
            low = _mm512_ternarylogic_epi32(_mm512_slli_epi32(low, 8), u, _mm512_set1_epi32(255), 0xF8);  // low << 8 | (u & 255)
            high = _mm512_or_si512(_mm512_slli_epi32(high, 8), _mm512_srli_epi32(u, 8));
        }
        out->low[g] = low, out->high[g] = high;
    }
}

// For lane 4 r + j of columns a and a + 1 of four: byte j % 2 of column a + j / 2, low bytes first, high ones 64 behind.
struct PairPlaces {
    alignas(64) uint8_t at[2][64] = {};
    constexpr PairPlaces() {
        for (int pair = 0; pair < 2; pair++)
            for (int lane = 0; lane < 64; lane++)
                at[pair][lane] = static_cast<uint8_t>((lane & ~3) + 2 * pair + (lane >> 1 & 1) + (lane & 1 ? 64 : 0));
    }
};
constexpr PairPlaces PAIR_PLACES;

template <int P>
void expand_bf16(const Header *h, int64_t tile, int64_t block, int64_t ahead, const Bf16Tables &tables, uint8_t *out) {
    constexpr int COUNT = P <= 2 ? 1 : 1 << (P - 2);
    const int64_t block_steps = h->block_columns / STEP, first = block * block_steps;
    const int64_t steps = h->steps - first < block_steps ? h->steps - first : block_steps;
    __m512i low[COUNT], high[COUNT];
    for (int i = 0; i < COUNT; i++) low[i] = tables.low[i], high[i] = tables.high[i];
    const __m512i pairs[2] = {_mm512_load_si512(PAIR_PLACES.at[0]), _mm512_load_si512(PAIR_PLACES.at[1])};
    const uint8_t *plane = plane_at(h, 0, tile) + first * 64;
    for (int64_t step = 0; step < steps; step++, plane += 64) {
        __m512i words[P];
        for (int b = 0; b < P; b++) {
            fetch_ahead(plane + b * h->plane_stride + ahead);
            words[b] = _mm512_loadu_si512(plane + b * h->plane_stride);
        }
#pragma GCC unroll 8
        for (int bit = 0; bit < 8; bit++, out += 128) {
            const LevelPlaces at = level_places<P>(words, bit);
            const __m512i l = find_levels<P>(low, at), u = find_levels<P>(high, at);
            _mm512_store_si512(out, _mm512_permutex2var_epi8(l, pairs[0], u));
            _mm512_store_si512(out + 64, _mm512_permutex2var_epi8(l, pairs[1], u));
        }
    }
}

// One block for rows of x `from` ... `from + M - 1` of a segment and T tiles; y is [tile][position][16].
template <int M, int T>
inline __attribute__((always_inline)) void bf16_products(const Call &c, int64_t block, int from, int64_t pairs,
                                                         const uint8_t *levels, float *y) {
    const int16_t *x[M];
    __m512 sums[M][T];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        x[m] = bf16_activations_at(c, block, c.order[from + m]);
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) sums[m][t] = _mm512_loadu_ps(y + (t * c.rows + from + m) * 16);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < pairs; i++) {
        __m512bh w[T];
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) w[t] = reinterpret_cast<__m512bh>(_mm512_load_si512(levels + t * BF16_BLOCK + 64 * i));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            int32_t two;
            memcpy(&two, x[m] + 2 * i, 4);
            const __m512bh v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
#pragma GCC unroll 2
            for (int t = 0; t < T; t++) sums[m][t] = _mm512_dpbf16_ps(sums[m][t], w[t], v);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) _mm512_storeu_ps(y + (t * c.rows + from + m) * 16, sums[m][t]);
}

template <int T>
void bf16_rows(const Call &c, int64_t block, const Segment &s, int64_t pairs, const uint8_t *levels, float *y) {
    for (int done = 0, taken; done < s.count; done += taken) {
        const int left = s.count - done, from = s.first + done;
        taken = left < BYTE_ROWS ? left : BYTE_ROWS;
        switch (taken) {
            case 8: bf16_products<8, T>(c, block, from, pairs, levels, y); break;
            case 7: bf16_products<7, T>(c, block, from, pairs, levels, y); break;
            case 6: bf16_products<6, T>(c, block, from, pairs, levels, y); break;
            case 5: bf16_products<5, T>(c, block, from, pairs, levels, y); break;
            case 4: bf16_products<4, T>(c, block, from, pairs, levels, y); break;
            case 3: bf16_products<3, T>(c, block, from, pairs, levels, y); break;
            case 2: bf16_products<2, T>(c, block, from, pairs, levels, y); break;
            default: bf16_products<1, T>(c, block, from, pairs, levels, y);
        }
    }
}

template <int P, int DTYPE>
void bf16_segment(const Call &c, const Segment &s, int64_t tile, int tiles, int64_t first, int64_t last, float *y) {
    const Header *h = c.weight;
    Bf16Tables tables[BLOCKS_AT_ONCE][2];
    alignas(64) uint8_t levels[2 * BF16_BLOCK];
    for (int64_t block = first; block < last; block++)
        for (int t = 0; t < tiles; t++) fill_bf16_tables<P, DTYPE>(h, tile + t, block, &tables[block - first][t]);
    for (int64_t block = first; block < last; block++) {
        const int64_t left = h->steps * STEP - block * h->block_columns;
        const int64_t pairs = (left < h->block_columns ? left : h->block_columns) / 2;
        for (int t = 0; t < tiles; t++)
            expand_bf16<P>(h, tile + t, block, 2 * h->tile_bytes, tables[block - first][t], levels + t * BF16_BLOCK);
        if (tiles == 2)
            bf16_rows<2>(c, block, s, pairs, levels, y);
        else
            bf16_rows<1>(c, block, s, pairs, levels, y);
    }
}

template <int DTYPE>
void bf16_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*const segment[])(const Call &, const Segment &, int64_t, int, int64_t, int64_t, float *) = {
        bf16_segment<1, DTYPE>, bf16_segment<2, DTYPE>, bf16_segment<3, DTYPE>, bf16_segment<4, DTYPE>};
    multiply_pairs(c, first, last, scratch, segment);
}

// Rows of x from which bf16 levels cost less than tables of sums, by the highest precision. 4 bits would gain from 16 rows on;
// up to 32 a row's result does not depend on its batch.
constexpr int BF16_ROWS[] = {0, 128, 96, 40, 33};

struct Bf16Instance {
    static Form form(const Call &c) {
        const int highest = c.segments[0].precision;
        const bool fits = c.weight->shape.levels == AB_AFFINE && highest <= BF16_PLANES && c.dtype == AB_BF16;
        return fits && !c.eight_bits && c.rows >= BF16_ROWS[highest] * c.segment_count ? BF16 : kernels_avx512()->form(c);
    }
    static void activations(const Call &c, int row, float *floats) {
        if (c.form != BF16) return kernels_avx512()->activations(c, row, floats);
        bf16_activations(c, row);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.form != BF16) return kernels_avx512()->multiply(c, first, last, scratch);
        switch (c.weight->shape.level_dtype) {
            case AB_F16: return bf16_multiply<AB_F16>(c, first, last, scratch);
            case AB_BF16: return bf16_multiply<AB_BF16>(c, first, last, scratch);
            case AB_I8: return bf16_multiply<AB_I8>(c, first, last, scratch);
            default: return bf16_multiply<AB_F32>(c, first, last, scratch);
        }
    }
    static const Kernels *kernels() {
        const Kernels *other = kernels_avx512();
        if (!other) return nullptr;
        static const Kernels all = {other->tile_rows, other->row_words, form, activations, multiply, other->dequantize, nullptr};
        return &all;
    }
};

}  // namespace
