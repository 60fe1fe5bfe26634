// Codebook levels with AMX. Centroids are bytes too: codes look their high and low bytes up, 64 at a time, into two tiles
// of 16 output rows and 64 columns. Activations share a scale for a span of 512 columns, so that sums stay integers for a
// whole span; rows of x are grouped by precision.
#pragma once

#include "amx.h"

namespace {

constexpr int SPAN_TILES = SPAN / 64;
constexpr float SPAN_LIMIT = 32500.0f;  // as two signed bytes

inline int64_t codebook_table_bytes(const Header *h, int count) {
    return h->spans * SPAN_TILES * 16 * 8 * count;
}

inline int64_t codebook_scale_floats(const Header *h, int) { return h->spans * 16; }

// A tile of x: row r holds columns 4 * r ... 4 * r + 3 of each of the group's rows, high bytes and then low bytes.
inline void codebook_lane(const Call &c, const Group &group, int lane, float *floats) {
    const Header *h = c.weight;
    load_x<Avx512>(c, c.order[group.first + lane], floats, h->spans * SPAN);
    uint8_t *out = c.tables + group.tables;
    float *scales = c.scales + group.scales;
    const int64_t row = 8 * group.count;
    for (int64_t span = 0; span < h->spans; span++, scales += 16) {
        const float *x = floats + span * SPAN;
        const float peak = peak_of(x, SPAN);
        const Grid grid = grid_of(peak, peak, SPAN_LIMIT, true);
        scales[lane] = 256 * grid.scale, scales[group.count + lane] = grid.scale;
        for (int i = lane ? 16 : 2 * group.count; i < 16; i++) scales[i] = 0;
        for (int tile = 0; tile < SPAN_TILES; tile++, out += 16 * row) {
            Bytes high = _mm512_setzero_si512(), low = high;
            if (grid.inverse > 0) split_bytes(x + 64 * tile, grid.inverse, &high, &low);
            alignas(64) int32_t words[2][16];
            _mm512_store_si512(words[0], high), _mm512_store_si512(words[1], low);
            for (int r = 0; r < 16; r++) {
                memcpy(out + r * row + 4 * lane, &words[0][r], 4);
                memcpy(out + r * row + 4 * (group.count + lane), &words[1][r], 4);
            }
        }
    }
}

// The bytes of a row's 2^P centroids, 256 * high + low; a table shorter than 64 entries is repeated.
template <int P>
struct ByteTables {
    static constexpr int COUNT = P <= 6 ? 1 : 1 << (P - 6);
    Bytes high[COUNT], low[COUNT];

    void fill(const int16_t *centroids) {
        const Avx512::Table<P> words(centroids);
        for (int i = 0; i < COUNT; i++) {
            const Bytes a = words.t[P <= 5 ? 0 : 2 * i], b = words.t[P <= 5 ? 0 : 2 * i + 1];
            low[i] = pack(a, b);
            high[i] = pack(upper(a), upper(b));
        }
    }
    static Bytes upper(Bytes v) { return _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8); }
    static Bytes pack(Bytes a, Bytes b) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
    }
    static Bytes find(const Bytes *t, Bytes code) {
        if constexpr (P <= 6) {
            return _mm512_permutexvar_epi8(code, t[0]);
        } else if constexpr (P == 7) {
            return _mm512_permutex2var_epi8(t[0], code, t[1]);
        } else {
            const Bytes a = _mm512_permutex2var_epi8(t[0], code, t[1]), b = _mm512_permutex2var_epi8(t[2], code, t[3]);
            return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), a, b);
        }
    }
};

struct alignas(64) CodebookBuffers {
    uint8_t weights[SPAN_TILES][2][TILE_BYTES];  // high bytes, low bytes
    int32_t sums[2][TILE_INTS];
};

// One span of one output row: row `at` of the tiles of weights.
template <int P>
inline void expand_centroids(const Header *h, const ByteTables<P> &tables, const uint8_t *plane, int64_t ahead, uint8_t *at) {
    Bytes planes[P], codes[8];
    for (int b = 0; b < P; b++) {
        planes[b] = _mm512_loadu_si512(plane + b * h->plane_stride);
        __builtin_prefetch(plane + b * h->plane_stride + ahead, 0, 2);
    }
    merge_codes<Avx512, P>(planes, codes);
    for (int i = 0; i < SPAN_TILES; i++) {
        _mm512_store_si512(at + 2 * i * TILE_BYTES, ByteTables<P>::find(tables.high, codes[i]));
        _mm512_store_si512(at + (2 * i + 1) * TILE_BYTES, ByteTables<P>::find(tables.low, codes[i]));
    }
}

// Sums over a span for a group of rows of x. Tiles 0 and 1 hold weights; see AB_GROUP_SUMS.
#define AB_SPAN_SUMS(NAME, X, HIGH, LOW)                                                  \
    inline void NAME(const uint8_t *x, int64_t row, const uint8_t *weights, int32_t *sums) { \
        _tile_zero(HIGH);                                                                  \
        _tile_zero(LOW);                                                                   \
        for (int i = 0; i < SPAN_TILES; i++, x += 16 * row, weights += 2 * TILE_BYTES) {   \
            _tile_loadd(X, x, row);                                                        \
            _tile_loadd(0, weights, TILE_ROW);                                             \
            _tile_loadd(1, weights + TILE_BYTES, TILE_ROW);                                \
            _tile_dpbssd(HIGH, 0, X);                                                      \
            _tile_dpbssd(LOW, 1, X);                                                       \
        }                                                                                  \
        _tile_stored(HIGH, sums, TILE_ROW);                                                \
        _tile_stored(LOW, sums + TILE_INTS, TILE_ROW);                                     \
    }
AB_SPAN_SUMS(full_span_sums, 2, 3, 4)
AB_SPAN_SUMS(last_span_sums, 5, 6, 7)
#undef AB_SPAN_SUMS

// Groups of one precision over a tile of output rows; y [group][output row][16] takes sums by lane.
template <int P>
void codebook_groups(const Call &c, const Group *groups, int count, int64_t first, int64_t rows, CodebookBuffers *buffers,
                     float *y) {
    const Header *h = c.weight;
    ByteTables<P> tables[CODEBOOK_TILE];
    for (int64_t n = 0; n < rows; n++) tables[n].fill(centroids_at(h, P, first + n));
    TileShapes shapes;
    const int left = groups[count - 1].count;
    for (int tile = 0; tile < 5; tile++) shapes.set(tile, 16, TILE_ROW);
    for (int tile = 5; tile < 8; tile++) shapes.set(tile, 16, 8 * left);
    shapes.use();
    for (int64_t span = 0; span < h->spans; span++) {
        for (int64_t n = 0; n < rows; n++)
            expand_centroids<P>(h, tables[n], plane_at(h, 0, first + n) + span * 64, CODEBOOK_TILE * h->tile_bytes,
                                buffers->weights[0][0] + n * TILE_ROW);
        written();
        for (int i = 0; i < count; i++) {
            const Group &group = groups[i];
            auto *const span_sums = group.count == GROUP_ROWS ? full_span_sums : last_span_sums;
            span_sums(c.tables + group.tables + span * SPAN_TILES * 128 * group.count, 8 * group.count,
                      buffers->weights[0][0], buffers->sums[0]);
            const Floats scale = _mm512_loadu_ps(c.scales + group.scales + span * 16);
            for (int n = 0; n < CODEBOOK_TILE; n++) {
                const Bytes high = _mm512_slli_epi32(_mm512_load_si512(buffers->sums[0] + 16 * n), 8);
                const Bytes sum = _mm512_add_epi32(high, _mm512_load_si512(buffers->sums[1] + 16 * n));
                float *at = y + (i * CODEBOOK_TILE + n) * 16;
                Avx512::store(at, Avx512::fma(_mm512_cvtepi32_ps(sum), scale, Avx512::load(at)));
            }
        }
    }
}

inline void codebook_batch(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*const by_precision[])(const Call &, const Group *, int, int64_t, int64_t, CodebookBuffers *, float *) = {
        codebook_groups<1>, codebook_groups<2>, codebook_groups<3>, codebook_groups<4>,
        codebook_groups<5>, codebook_groups<6>, codebook_groups<7>, codebook_groups<8>};
    const int64_t n = c.weight->shape.out_features;
    alignas(64) CodebookBuffers buffers;
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t row = tile * CODEBOOK_TILE, rows = n - row < CODEBOOK_TILE ? n - row : CODEBOOK_TILE;
        memset(scratch, 0, static_cast<size_t>(c.group_count * CODEBOOK_TILE * 16) * sizeof(float));
        for (int i = 0, next; i < c.group_count; i = next) {
            for (next = i + 1; next < c.group_count && c.groups[next].precision == c.groups[i].precision;) next++;
            by_precision[c.groups[i].precision - 1](c, c.groups + i, next - i, row, rows, &buffers,
                                                    scratch + i * CODEBOOK_TILE * 16);
        }
        for (int i = 0; i < c.group_count; i++) {
            const Group &group = c.groups[i];
            for (int m = 0; m < group.count; m++) {
                float values[CODEBOOK_TILE];
                for (int64_t r = 0; r < rows; r++) {
                    const float *at = scratch + (i * CODEBOOK_TILE + r) * 16;
                    values[r] = (at[m] + at[group.count + m]) * row_scales(c.weight, group.precision)[row + r];
                }
                store_rows<Avx512>(c, c.order[group.first + m], row, values, rows);
            }
        }
    }
}

// AVX-512's kernels, and these for bf16.
struct AmxInstance {
    static int64_t table_bytes(const Header *h, int count) {
        return h->shape.levels == AB_AFFINE ? affine_table_bytes(h, count) : codebook_table_bytes(h, count);
    }
    static int64_t scale_floats(const Header *h, int count) {
        return h->shape.levels == AB_AFFINE ? affine_scale_floats(h, count) : codebook_scale_floats(h, count);
    }
    static void activations(const Call &c, const Group &group, int lane, float *floats) {
        c.weight->shape.levels == AB_AFFINE ? affine_lane(c, group, lane, floats) : codebook_lane(c, group, lane, floats);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        c.weight->shape.levels == AB_AFFINE ? affine_batch(c, first, last, scratch) : codebook_batch(c, first, last, scratch);
    }
    static constexpr Batch batch = {{4, 1}, table_bytes, scale_floats, activations, multiply};
    static constexpr Kernels kernels = {Avx512::TILE,
                                        Avx512::ROW_WORDS,
                                        Avx512Instance::form,
                                        Avx512Instance::activations,
                                        Avx512Instance::multiply,
                                        dequantize_rows<Avx512>,
                                        &batch};
};

}  // namespace
