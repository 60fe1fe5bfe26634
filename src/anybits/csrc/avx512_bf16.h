// Many rows of bf16 x: levels.h with levels in bf16, which vdpbf16ps multiplies and adds. What a matrix of bf16
// weights would give, without ever writing it.
#pragma once

#include "avx512_bytes.h"
#include "bf16_levels.h"

namespace {

// Activations of one row: [piece][row of x][column], a step's columns in LEVEL_ORDER.
struct Bf16Activations {
    static constexpr int BLOCKS = 4;
    int16_t *x;
    int64_t columns, rows;
    explicit Bf16Activations(const Call &c) : x(reinterpret_cast<int16_t *>(c.tables)), columns(LevelPieces<Bf16Activations>(c.weight).columns), rows(c.rows) {}
    int16_t *at(int64_t piece, int row) const { return x + (piece * rows + row) * columns; }
};

constexpr int64_t FETCH_ROW = 1024;  // columns

inline void bf16_affine_activations(const Call &c, int row) {
    const Header *h = c.weight;
    const Bf16Activations to(c);
    const int64_t k = h->shape.in_features;
    const int16_t *x = static_cast<const int16_t *>(c.x) + row * c.x_stride;
    const __m512i order = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(LEVEL_ORDER)));
    for (int64_t piece = 0, first = 0; first < h->steps * STEP; piece++, first += to.columns) {
        int16_t *out = to.at(piece, row);
        const int64_t last = first + to.columns < h->steps * STEP ? first + to.columns : h->steps * STEP;
        for (int64_t column = first; column < last; column += STEP, out += STEP) {
            const __mmask32 some = k - column >= STEP ? ~0u : (1u << (k - column)) - 1;
            __builtin_prefetch(x + column + FETCH_ROW);
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi16(some, x + column)));
        }
    }
}

// Eight vectors of eight groups of four columns: rows become columns.
inline void transpose_fours(__m512i *v) {
    __m512i w[8];
    for (int i = 0; i < 8; i += 2) w[i] = _mm512_unpacklo_epi64(v[i], v[i + 1]), w[i + 1] = _mm512_unpackhi_epi64(v[i], v[i + 1]);
    for (int odd = 0; odd < 2; odd++) {  // quarter q of w[odd + 2 i] is groups 2 q + odd of vectors 2 i and 2 i + 1
        const __m512i a = _mm512_shuffle_i64x2(w[odd], w[odd + 2], 0x88), b = _mm512_shuffle_i64x2(w[odd], w[odd + 2], 0xDD);
        const __m512i c = _mm512_shuffle_i64x2(w[odd + 4], w[odd + 6], 0x88), d = _mm512_shuffle_i64x2(w[odd + 4], w[odd + 6], 0xDD);
        v[odd] = _mm512_shuffle_i64x2(a, c, 0x88), v[4 + odd] = _mm512_shuffle_i64x2(a, c, 0xDD);
        v[2 + odd] = _mm512_shuffle_i64x2(b, d, 0x88), v[6 + odd] = _mm512_shuffle_i64x2(b, d, 0xDD);
    }
}

inline void bf16_codebook_activations(const Call &c, int row) {
    static_assert(Bf16Activations::BLOCKS * CENTROID_BLOCK == SPAN, "a piece is a span");
    const Bf16Activations to(c);
    const int64_t k = c.weight->shape.in_features;
    const int16_t *x = static_cast<const int16_t *>(c.x) + row * c.x_stride;
    for (int64_t span = 0; span < c.weight->spans; span++) {
        int16_t some[SPAN];
        const int64_t left = k - span * SPAN;
        if (left < SPAN) memset(some, 0, sizeof some), memcpy(some, x + span * SPAN, static_cast<size_t>(left) * sizeof *x);
        const int16_t *from = left < SPAN ? some : x + span * SPAN;
        for (int64_t i = 0; i < SPAN; i += 32) __builtin_prefetch(x + span * SPAN + i + FETCH_ROW);
        for (int half = 0; half < 2; half++) {  // as order_span does
            __m512i v[8];
            for (int bit = 0; bit < 8; bit++) v[bit] = _mm512_loadu_si512(from + 64 * bit + 32 * half);
            transpose_fours(v);
            for (int word = 0; word < 8; word++) _mm512_storeu_si512(to.at(span, row) + 32 * (8 * half + word), v[word]);
        }
    }
}

struct Bf16Levels {
    using Tables = Bf16Tables;
    static constexpr int ROWS = 6, TILES = 4, BLOCKS = Bf16Activations::BLOCKS, PLANES = AB_MAX_PLANES, COLUMNS = 2;

    template <int P, int DTYPE>
    static void fill(const Header *h, int64_t tile, int64_t block, Tables *out) {
        const int64_t level_bytes = 16 * level_size(DTYPE);
        const uint8_t *level = affine_block_levels(h, P, tile, block);
        const float *steps = affine_steps_at(h, P, tile);
        __m512 scales[P], offset = _mm512_setzero_ps();
        for (int b = 0; b < P; b++) scales[b] = level_in_steps<Avx512, DTYPE>(level + b * level_bytes, steps + b * 16, 0);
        if (h->shape.has_offsets) offset = level_in_steps<Avx512, DTYPE>(level + P * level_bytes, steps + P * 16, 0);
        fill_bf16_tables<P>(scales, offset, out);
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
        store_bf16<P>(tables, words, bit, out);
    }

    // Four whole tiles as cache lines of y, one after the other.
    static void store_tiles(const Call &c, int64_t tile, int tiles, const float *scratch) {
        const int64_t n = c.weight->shape.out_features;
        if (tiles < TILES || (tile + TILES) * 16 > n) return ::store_tiles<Avx512>(c, tile, tiles, scratch);
        for (int p = 0; p < c.rows; p++) {
            uint16_t *y = static_cast<uint16_t *>(c.y) + c.order[p] * n + tile * 16;
            for (int t = 0; t < TILES; t += 2) {
                const float *from = scratch + (t * c.rows + p) * 16;
                _mm512_storeu_si512(y + 16 * t, bf16_of_two(_mm512_loadu_ps(from), _mm512_loadu_ps(from + c.rows * 16)));
            }
        }
    }

    // Codebooks of five planes and more: rows are looked up one by one, and their pairs of columns turned.
    template <int P>
    static void long_segment(const Call &c, const Segment &s, int64_t tile, int tiles, float *y) {
        const Header *h = c.weight;
        alignas(64) RowTables<P> tables[TILES][16];
        alignas(64) uint8_t levels[TILES * LEVEL_PIECE<Bf16Levels>];
        SpanValues values;
        memset(&values, 0, sizeof values);
        const RowCounts<TILES> rows(h, tile, tiles);
        for (int t = 0; t < tiles; t++)
            for (int64_t r = 0, n = (tile + t) * 16; r < rows.of[t]; r++) tables[t][r].fill(centroids_at(h, P, n + r), row_scales(h, P)[n + r]);
        for (int64_t span = 0; span < h->spans; span++) {
            const int64_t ahead = span_ahead<Bf16Levels>(h, span);
            for (int t = 0; t < tiles; t++) {
                if (t + 1 < tiles) fetch_span<P>(h, (tile + t + 1) * 16, rows.of[t + 1], span);
                for (int64_t r = 0; r < rows.of[t]; r++)
                    row_values<P>(h, (tile + t) * 16 + r, span, ahead, tables[t][r], static_cast<int>(r), values);
                store_span(values, levels + t * LEVEL_PIECE<Bf16Levels>);
            }
            level_rows<Bf16Levels, TILES>(c, s, tiles, span, SPAN / COLUMNS, levels, nullptr, y);
        }
    }
    using CentroidSegment = void (*)(const Call &, const Segment &, int64_t, int, float *);
    static CentroidSegment long_codes(int precision) {
        constexpr CentroidSegment of[] = {long_segment<5>, long_segment<6>, long_segment<7>, long_segment<8>};
        return of[precision - 5];
    }

    // For rows of x `from` ... `from + M - 1` of a segment and T tiles; y is [tile][position][16]. The rows behind these are fetched
    // into the first-level cache: a product that waits for the second one soon fills the scheduler.
    template <int M, int T>
    static inline __attribute__((always_inline)) void products(const Call &c, int64_t piece, int from, int64_t count,
                                                               const uint8_t *levels, const Tables *, float *y) {
        const Bf16Activations a(c);
        const int16_t *x[M], *next[M];
        __m512 sums[M][T];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            x[m] = a.at(piece, c.order[from + m]);
            const int behind = from + M + m;
            next[m] = behind < c.rows ? a.at(piece, c.order[behind]) : a.at(piece + 1, c.order[behind - c.rows]);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sums[m][t] = _mm512_loadu_ps(y + (t * c.rows + from + m) * 16);
        }
        for (int64_t line = 0; line < count; line += 16) {
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) __builtin_prefetch(next[m] + 2 * line, 0, 3);
#pragma GCC unroll 4
            for (int64_t i = line; i < line + 16; i++) {
                __m512bh w[T];
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) w[t] = reinterpret_cast<__m512bh>(_mm512_load_si512(levels + t * LEVEL_PIECE<Bf16Levels> + 64 * i));
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    int32_t two;
                    memcpy(&two, x[m] + 2 * i, 4);
                    const __m512bh v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++) sums[m][t] = _mm512_dpbf16_ps(sums[m][t], w[t], v);
                }
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) _mm512_storeu_ps(y + (t * c.rows + from + m) * 16, sums[m][t]);
    }
};

// For levels_pay. Up to 16 rows a row's result does not depend on its batch.
constexpr int BF16_ROWS[] = {0, 17, 17, 17, 17, 17, 17, 17, 17}, BF16_CENTROIDS_ROWS[] = {0, 17, 17, 17, 17, 17, 17, 17, 17};

struct Bf16Instance {
    static Form form(const Call &c) {
        const Form other = kernels_avx512()->form(c);
        const int *rows = c.weight->shape.levels == AB_CODEBOOK ? BF16_CENTROIDS_ROWS : BF16_ROWS;
        const bool bytes = c.eight_bits && c.segments[0].precision <= BYTE_PLANES;
        return c.dtype == AB_BF16 && !bytes && levels_pay(c, rows, AB_MAX_PLANES) ? BF16 : other;
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
