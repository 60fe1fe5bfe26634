// Many rows of bf16 x: levels.h with levels in bf16, which vdpbf16ps multiplies and adds. What a matrix of bf16
// weights would give, without ever writing it.
#pragma once

#include "avx512_bytes.h"

namespace {

constexpr int BF16_PLANES = 4;

// Tables of the two bytes of each level.
struct alignas(64) Bf16Tables {
    __m512i low[4], high[4];
};

// Activations of one row: [block][row of x][column], a step's columns in LEVEL_ORDER.
inline int16_t *bf16_activations_at(const Call &c, int64_t block, int row) {
    const int64_t columns = LevelBlocks(c.weight).columns;
    return reinterpret_cast<int16_t *>(c.tables) + (block * c.rows + row) * columns;
}

inline void bf16_affine_activations(const Call &c, int row) {
    const Header *h = c.weight;
    const int64_t k = h->shape.in_features;
    const int16_t *x = static_cast<const int16_t *>(c.x) + row * c.x_stride;
    const __m512i order = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(LEVEL_ORDER)));
    for (int64_t step = 0; step < h->steps; step++) {
        const int64_t column = step * STEP, block = column / h->block_columns, left = k - column;
        const __mmask32 some = left >= 32 ? ~0u : (1u << left) - 1;
        const __m512i v = _mm512_maskz_loadu_epi16(some, x + column);
        _mm512_storeu_si512(bf16_activations_at(c, block, row) + column % h->block_columns,
                            _mm512_permutexvar_epi16(order, v));
    }
}

inline void bf16_codebook_activations(const Call &c, int row) {
    const int64_t k = c.weight->shape.in_features, parts = SPAN / CENTROID_BLOCK;
    const int16_t *x = static_cast<const int16_t *>(c.x) + row * c.x_stride;
    for (int64_t span = 0; span < c.weight->spans; span++) {
        int16_t some[SPAN] = {0}, ordered[SPAN];
        const int64_t left = k - span * SPAN;
        if (left < SPAN) memcpy(some, x + span * SPAN, static_cast<size_t>(left) * sizeof *x);
        order_span(left < SPAN ? some : x + span * SPAN, ordered);
        for (int64_t part = 0; part < parts; part++)
            memcpy(bf16_activations_at(c, span * parts + part, row), ordered + part * CENTROID_BLOCK, CENTROID_BLOCK * sizeof *x);
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

struct Bf16Levels {
    using Tables = Bf16Tables;
    static constexpr int ROWS = 6, TILES = 4, PLANES = BF16_PLANES, COLUMNS = 2;  // 8 and 2 are 5 % slower, in bytes 15 % faster

    template <int P, int DTYPE>
    static void fill(const Header *h, int64_t tile, int64_t block, Tables *out) {
        const int64_t level_bytes = 16 * level_size(DTYPE);
        const uint8_t *level = affine_block_levels(h, P, tile, block);
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

    template <int P>
    static void fill_centroids(const Header *h, int64_t n, int64_t count, Tables *out) {
        alignas(64) uint8_t low[4][64] = {{0}}, high[4][64] = {{0}};
        for (int64_t r = 0; r < count; r++) {
            const int16_t *centroids = centroids_at(h, P, n + r);
            const float scale = row_scales(h, P)[n + r];
            for (int group = 0; group < (P <= 2 ? 1 : 1 << (P - 2)); group++)
                for (int entry = 0; entry < 4; entry++) {
                    const uint16_t value = float_to_bf16(static_cast<float>(centroids[code_of<P>(group, entry)]) * scale);
                    low[group][4 * r + entry] = static_cast<uint8_t>(value), high[group][4 * r + entry] = static_cast<uint8_t>(value >> 8);
                }
        }
        for (int group = 0; group < 4; group++) out->low[group] = _mm512_load_si512(low[group]), out->high[group] = _mm512_load_si512(high[group]);
    }

    template <int P>
    static inline __attribute__((always_inline)) void store(const Tables &tables, const __m512i *words, int bit, uint8_t *out) {
        const LevelPlaces at = level_places<P>(words, bit);
        const __m512i low = find_levels<P>(tables.low, at), high = find_levels<P>(tables.high, at);
        for (int pair = 0; pair < 2; pair++)
            _mm512_store_si512(out + 64 * pair, _mm512_permutex2var_epi8(low, _mm512_load_si512(PAIR_PLACES.at[pair]), high));
    }

    // For rows of x `from` ... `from + M - 1` of a segment and T tiles; y is [tile][position][16].
    template <int M, int T>
    static inline __attribute__((always_inline)) void products(const Call &c, int64_t block, int from, int64_t count,
                                                               const uint8_t *levels, const Tables *, float *y) {
        const int16_t *x[M];
        __m512 sums[M][T];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            x[m] = bf16_activations_at(c, block, c.order[from + m]);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sums[m][t] = _mm512_loadu_ps(y + (t * c.rows + from + m) * 16);
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; i++) {
            __m512bh w[T];
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) w[t] = reinterpret_cast<__m512bh>(_mm512_load_si512(levels + t * LEVEL_BLOCK<Bf16Levels> + 64 * i));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t two;
                memcpy(&two, x[m] + 2 * i, 4);
                const __m512bh v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) sums[m][t] = _mm512_dpbf16_ps(sums[m][t], w[t], v);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) _mm512_storeu_ps(y + (t * c.rows + from + m) * 16, sums[m][t]);
    }
};

// For levels_pay. 4 bits would gain from 16 rows on; up to 32 a row's result does not depend on its batch.
constexpr int BF16_ROWS[] = {0, 128, 96, 40, 33}, BF16_CENTROIDS_ROWS[] = {0, 33, 33, 33, 33};

struct Bf16Instance {
    static Form form(const Call &c) {
        const Form other = kernels_avx512()->form(c);
        const int *rows = c.weight->shape.levels == AB_CODEBOOK ? BF16_CENTROIDS_ROWS : BF16_ROWS;
        return c.dtype == AB_BF16 && !c.eight_bits && levels_pay(c, rows, BF16_PLANES) ? BF16 : other;
    }
    static void activations(const Call &c, int row, float *floats) {
        if (c.form != BF16) return kernels_avx512()->activations(c, row, floats);
        c.weight->shape.levels == AB_CODEBOOK ? bf16_codebook_activations(c, row) : bf16_affine_activations(c, row);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.form != BF16) return kernels_avx512()->multiply(c, first, last, scratch);
        multiply_levels<Bf16Levels>(c, first, last, scratch);
    }
    static const Kernels *kernels() {
        const Kernels *other = kernels_avx512();
        if (!other) return nullptr;
        static const Kernels all = {other->tile_rows, other->row_words, form, activations, multiply, other->dequantize, nullptr};
        return &all;
    }
};

}  // namespace
