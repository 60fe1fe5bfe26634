// Many rows of x: a piece of a few tiles becomes an ordinary matrix in the caches, once for all rows of x, and is
// multiplied there. What bytes (avx512_bytes.h) and bf16 (avx512_bf16.h) have in common; a kind of levels L says
//   ROWS, TILES: rows of x and tiles that go through a piece together; BLOCKS: blocks of a piece; PLANES: precisions of affine levels that it
//   serves; COLUMNS: columns that a 32-bit lane holds, [COLUMNS columns][16 rows][COLUMNS]; Tables, fill<P, DTYPE>: what one block
//   of one tile is made from; fill_centroids<P>: the same for all blocks of a codebook's tile; store<P>: the levels of four columns;
//   products<M, T>: one piece for M rows of x and T tiles; store_tiles: what goes to y; long_codes: codebooks of more planes than CENTROID_PLANES, or NULL.
#pragma once

#include "avx512.h"

namespace {

constexpr int64_t LEVEL_BLOCKS_AT_ONCE = 4;  // blocks whose tables are made together: one after the other, each would wait for its division

// Bytes of one piece of one tile.
template <class L>
constexpr int64_t LEVEL_PIECE = L::BLOCKS * 16 * TABLE_COLUMNS * 4 / L::COLUMNS;

// A step's columns in the order in which their levels come: bit i of each byte of a word, then bit i + 1.
constexpr uint8_t LEVEL_ORDER[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                     4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};

constexpr uint8_t NATURAL_ORDER[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Moves bit `from` of each byte to bit `to`, and clears the others.
inline __m512i move_bit(__m512i v, int from, int to) {
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(static_cast<int64_t>(uint64_t{1} << (from + 8 * (7 - to)))), 0);
}

// Where the levels of four columns of 16 rows stand: the index but for bit 7, and that.
struct LevelPlaces {
    __m512i index;
    __mmask64 upper;
};

// Of bit `bit` of each byte of the planes' words.
template <int P>
inline LevelPlaces level_places(const __m512i *words, int bit) {
    alignas(64) static constexpr uint32_t ROWS[16] = {
        0x00000000, 0x04040404, 0x08080808, 0x0c0c0c0c, 0x10101010, 0x14141414, 0x18181818, 0x1c1c1c1c,
        0x20202020, 0x24242424, 0x28282828, 0x2c2c2c2c, 0x30303030, 0x34343434, 0x38383838, 0x3c3c3c3c};
    LevelPlaces places = {_mm512_or_si512(_mm512_load_si512(ROWS), move_bit(words[0], bit, 0)), 0};
    if constexpr (P >= 2) places.index = _mm512_or_si512(places.index, move_bit(words[1], bit, 1));
    if constexpr (P >= 3) places.index = _mm512_or_si512(places.index, move_bit(words[2], bit, 6));
    if constexpr (P >= 4) places.upper = _mm512_movepi8_mask(move_bit(words[3], bit, 7));
    return places;
}

template <int P>
inline __m512i find_levels(const __m512i *levels, const LevelPlaces &at) {
    if constexpr (P <= 2) {
        return _mm512_permutexvar_epi8(at.index, levels[0]);
    } else {
        const __m512i low = _mm512_permutex2var_epi8(levels[0], at.index, levels[1]);
        if constexpr (P == 3) return low;
        return _mm512_mask_blend_epi8(at.upper, low, _mm512_permutex2var_epi8(levels[2], at.index, levels[3]));
    }
}

// The four columns of each of 32 bits of the planes' words.
template <class L, int P>
inline uint8_t *expand_step(const typename L::Tables &tables, const __m512i *words, uint8_t *out) {
#pragma GCC unroll 8
    for (int bit = 0; bit < 8; bit++, out += 256 / L::COLUMNS) L::template store<P>(tables, words, bit, out);
    return out;
}

// Columns of a block at precision P. `ahead`: bytes from a plane's words to those of the next piece. Returns where the next block's go.
template <class L, int P>
uint8_t *expand_levels(const Header *h, int64_t tile, int64_t block, int64_t ahead, const typename L::Tables &from, uint8_t *out) {
    const int64_t block_steps = h->block_columns / STEP, first = block * block_steps;
    const int64_t steps = h->steps - first < block_steps ? h->steps - first : block_steps;
    const typename L::Tables tables = from;  // in registers, whatever is stored
    const uint8_t *plane = plane_at(h, 0, tile) + first * 64;
    for (int64_t step = 0; step < steps; step++, plane += 64) {
        __m512i words[P];
        for (int b = 0; b < P; b++) {
            fetch_ahead(plane + b * h->plane_stride + ahead);
            words[b] = _mm512_loadu_si512(plane + b * h->plane_stride);
        }
        out = expand_step<L, P>(tables, words, out);
    }
    return out;
}

// `taken` rows of x, at most M, and `count` lanes of columns of a piece.
template <class L, int M, int T>
inline void level_products(const Call &c, int taken, int64_t piece, int from, int64_t count, const uint8_t *levels,
                           const typename L::Tables *tables, float *y) {
    if (taken == M) return L::template products<M, T>(c, piece, from, count, levels, tables, y);
    if constexpr (M > 1) level_products<L, M - 1, T>(c, taken, piece, from, count, levels, tables, y);
}

template <class L, int T>
void level_rows(const Call &c, const Segment &s, int tiles, int64_t piece, int64_t count, const uint8_t *levels,
                const typename L::Tables *tables, float *y) {
    if constexpr (T > 1)
        if (tiles < T) return level_rows<L, T - 1>(c, s, tiles, piece, count, levels, tables, y);
    for (int done = 0, taken; done < s.count; done += taken) {
        const int left = s.count - done, turns = (left + L::ROWS - 1) / L::ROWS;
        taken = (left + turns - 1) / turns;
        level_products<L, L::ROWS, T>(c, taken, piece, s.first + done, count, levels, tables, y);
    }
}

// Calls add(first tile, tiles), which adds to the results in `scratch`, for a few tiles at a time, and stores these.
template <class L, class F>
void level_tiles(const Call &c, int64_t first, int64_t last, float *scratch, const F &add) {
    for (int64_t tile = first; tile < last; tile += L::TILES) {
        const int tiles = last - tile < L::TILES ? static_cast<int>(last - tile) : L::TILES;
        memset(scratch, 0, static_cast<size_t>(tiles * c.rows * 16) * sizeof(float));
        add(tile, tiles);
        L::store_tiles(c, tile, tiles, scratch);
    }
}

template <class L, int P, int DTYPE>
void level_segment(const Call &c, const Segment &s, int64_t tile, int tiles, int64_t first, int64_t last, float *y) {
    const Header *h = c.weight;
    typename L::Tables tables[LEVEL_BLOCKS_AT_ONCE][L::TILES];
    alignas(64) uint8_t levels[L::TILES * LEVEL_PIECE<L>];
    const int64_t block_bytes = h->block_columns / STEP * 64, row_bytes = affine_entries(h->shape, P) * 16 * level_size(DTYPE);
    // Words of the next blocks, or the first of the next tiles: what is fetched sooner, many rows of x push out of the second-level cache.
    const int64_t ahead = last < h->blocks ? LEVEL_BLOCKS_AT_ONCE * block_bytes : L::TILES * h->tile_bytes - first * block_bytes;
    const int64_t groups = ceil_div(LEVEL_BLOCKS_AT_ONCE, h->blocks_per_group);
    for (int t = 0; t < tiles; t++) {
        const uint8_t *next = affine_block_levels(h, P, tile + t, last);
        for (int64_t i = 0; i < groups * row_bytes; i += 64) fetch_ahead(next + i);
        for (int64_t block = first; block < last; block++) L::template fill<P, DTYPE>(h, tile + t, block, &tables[block - first][t]);
    }
    for (int64_t block = first, end; block < last; block = end) {
        end = block + L::BLOCKS < last ? block + L::BLOCKS : last;
        for (int t = 0; t < tiles; t++) {
            uint8_t *out = levels + t * LEVEL_PIECE<L>;
            for (int64_t i = block; i < end; i++) out = expand_levels<L, P>(h, tile + t, i, ahead, tables[i - first][t], out);
        }
        const int64_t columns = (end == h->blocks ? h->steps * STEP : end * h->block_columns) - block * h->block_columns;
        level_rows<L, L::TILES>(c, s, tiles, block / L::BLOCKS, columns / L::COLUMNS, levels, tables[block - first], y);
    }
}

template <class L, int DTYPE>
void level_multiply_as(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*segment[AB_MAX_PLANES + 1])(const Call &, const Segment &, int64_t, int, int64_t, int64_t, float *) = {
        nullptr, level_segment<L, 1, DTYPE>, level_segment<L, 2, DTYPE>, level_segment<L, 3, DTYPE>, level_segment<L, 4, DTYPE>};
    if constexpr (L::PLANES > 4) segment[5] = level_segment<L, 5, DTYPE>, segment[6] = level_segment<L, 6, DTYPE>;
    if constexpr (L::PLANES > 6) segment[7] = level_segment<L, 7, DTYPE>, segment[8] = level_segment<L, 8, DTYPE>;
    static_assert(L::PLANES == 6 || L::PLANES == 8, "a precision is missing above");
    const int64_t blocks = c.weight->blocks;
    level_tiles<L>(c, first, last, scratch, [&](int64_t tile, int tiles) {
        for (int64_t block = 0; block < blocks; block += LEVEL_BLOCKS_AT_ONCE) {
            const int64_t end = block + LEVEL_BLOCKS_AT_ONCE < blocks ? block + LEVEL_BLOCKS_AT_ONCE : blocks;
            for (int i = 0; i < c.segment_count; i++)
                segment[c.segments[i].precision](c, c.segments[i], tile, tiles, block, end, scratch);
        }
    });
}

template <class L>
void level_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    with_level_dtype(c.weight, [&](auto dtype) { level_multiply_as<L, dtype()>(c, first, last, scratch); });
}

// ---- codebooks: a span's words, turned to lie as those of affine levels do, and one table for each tile

constexpr int CENTROID_PLANES = 4;
constexpr int64_t CENTROID_BLOCK = TABLE_COLUMNS;

// Columns of a span in the order in which their levels come: word after word, bit i of its bytes, then bit i + 1.
template <class T>
inline void order_span(const T *x, T *out) {
    for (int word = 0; word < 16; word++)
        for (int bit = 0; bit < 8; bit++) memcpy(out + 32 * word + 4 * bit, x + 64 * bit + 4 * word, 4 * sizeof(T));
}

// Sixteen vectors of sixteen words: rows become columns.
inline void transpose(__m512i *v) {
    __m512i w[16];
    for (int i = 0; i < 16; i += 2) w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + 2 + j]);
        }
    for (int half = 0; half < 16; half += 8)
        for (int j = 0; j < 4; j++) {  // word j of each quarter, of eight rows
            w[half + j] = _mm512_shuffle_i32x4(v[half + j], v[half + 4 + j], 0x88);
            w[half + 4 + j] = _mm512_shuffle_i32x4(v[half + j], v[half + 4 + j], 0xDD);
        }
    for (int j = 0; j < 4; j++) {
        v[j] = _mm512_shuffle_i32x4(w[j], w[8 + j], 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(w[j], w[8 + j], 0xDD);
        v[4 + j] = _mm512_shuffle_i32x4(w[4 + j], w[12 + j], 0x88);
        v[12 + j] = _mm512_shuffle_i32x4(w[4 + j], w[12 + j], 0xDD);
    }
}

// words[b][i]: word i of a span of `count` output rows from n on, in plane b. `ahead`: bytes to what comes next.
template <int P>
inline void span_words(const Header *h, int64_t n, int64_t count, int64_t span, int64_t ahead, __m512i (*words)[16]) {
    for (int b = 0; b < P; b++) {
        const uint8_t *plane = plane_at(h, b, n) + span * 64;
        for (int64_t r = 0; r < 16; r++) {
            const bool some = r < count;
            if (some) fetch_ahead(plane + r * h->tile_bytes + ahead);
            words[b][r] = some ? _mm512_loadu_si512(plane + r * h->tile_bytes) : _mm512_setzero_si512();
        }
        transpose(words[b]);
    }
}

// Which centroid entry `entry` of table `group` is (see level_places): a code has plane 0's bit first.
template <int P>
constexpr int code_of(int group, int entry) {
    int code = 0;
    for (int b = 0; b < P; b++) code = code << 1 | (b < 2 ? entry >> b & 1 : group >> (b - 2) & 1);
    return code;
}

// Output rows of each tile, at most 16.
template <int T>
struct RowCounts {
    int64_t of[T];
    RowCounts(const Header *h, int64_t tile, int tiles) {
        for (int t = 0; t < tiles; t++) {
            const int64_t left = h->shape.out_features - (tile + t) * 16;
            of[t] = left < 16 ? left : 16;
        }
    }
};

// Bytes from a span's words to those of the next span, or of the first of the next rows: what is fetched sooner, many rows of x
// push out of the second-level cache.
template <class L>
inline int64_t span_ahead(const Header *h, int64_t span) {
    return span + 1 < h->spans ? 64 : 16 * L::TILES * h->tile_bytes - span * 64;
}

// Fetches a span of a tile, which may have left the second-level cache since fetch_ahead.
template <int P>
inline void fetch_span(const Header *h, int64_t n, int64_t count, int64_t span) {
    for (int b = 0; b < P; b++)
        for (int64_t r = 0; r < count; r++) __builtin_prefetch(plane_at(h, b, n + r) + span * 64);
}

template <class L, int P>
void centroid_segment(const Call &c, const Segment &s, int64_t tile, int tiles, float *y) {
    const Header *h = c.weight;
    constexpr int64_t COLUMNS = L::BLOCKS * CENTROID_BLOCK, PIECES = SPAN / COLUMNS;
    typename L::Tables tables[L::TILES];
    __m512i words[L::TILES][P][16];
    alignas(64) uint8_t levels[L::TILES * LEVEL_PIECE<L>];
    const RowCounts<L::TILES> rows(h, tile, tiles);
    for (int t = 0; t < tiles; t++) L::template fill_centroids<P>(h, (tile + t) * 16, rows.of[t], &tables[t]);
    for (int64_t span = 0; span < h->spans; span++) {
        for (int t = 0; t < tiles; t++) {
            if (t + 1 < tiles) fetch_span<P>(h, (tile + t + 1) * 16, rows.of[t + 1], span);
            span_words<P>(h, (tile + t) * 16, rows.of[t], span, span_ahead<L>(h, span), words[t]);
        }
        for (int64_t piece = 0; piece < PIECES; piece++) {
            for (int t = 0; t < tiles; t++) {
                const typename L::Tables here = tables[t];  // in registers, whatever is stored
                uint8_t *out = levels + t * LEVEL_PIECE<L>;
                for (int64_t word = COLUMNS / 32 * piece; word < COLUMNS / 32 * (piece + 1); word++) {
                    __m512i planes[P];
                    for (int b = 0; b < P; b++) planes[b] = words[t][b][word];
                    out = expand_step<L, P>(here, planes, out);
                }
            }
            level_rows<L, L::TILES>(c, s, tiles, span * PIECES + piece, COLUMNS / L::COLUMNS, levels, tables, y);
        }
    }
}

template <class L>
void centroid_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*const segment[CENTROID_PLANES + 1])(const Call &, const Segment &, int64_t, int, float *) = {
        nullptr, centroid_segment<L, 1>, centroid_segment<L, 2>, centroid_segment<L, 3>, centroid_segment<L, 4>};
    level_tiles<L>(c, first, last, scratch, [&](int64_t tile, int tiles) {
        for (int i = 0; i < c.segment_count; i++) {
            const int precision = c.segments[i].precision;
            auto *const run = precision <= CENTROID_PLANES ? segment[precision] : L::long_codes(precision);
            run(c, c.segments[i], tile, tiles, scratch);
        }
    });
}

// ---- both

// How the activations of a row lie, [piece][row of x][column].
template <class L>
struct LevelPieces {
    int64_t columns, count;
    explicit LevelPieces(const Header *h) : columns(L::BLOCKS * h->block_columns), count(ceil_div(h->blocks, L::BLOCKS)) {
        if (h->shape.levels == AB_CODEBOOK) columns = L::BLOCKS * CENTROID_BLOCK, count = h->spans * SPAN / columns;
    }
};

template <class L>
void multiply_levels(const Call &c, int64_t first, int64_t last, float *scratch) {
    if (c.weight->shape.levels == AB_CODEBOOK) return centroid_multiply<L>(c, first, last, scratch);
    level_multiply<L>(c, first, last, scratch);
}

// Whether making levels costs less than what few rows do. `rows`: from how many rows of x on, by the highest precision; levels
// are made for each precision.
inline bool levels_pay(const Call &c, const int *rows, int planes) {
    const int highest = c.segments[0].precision;
    return highest <= planes && c.rows >= rows[highest] * c.segment_count;
}

}  // namespace
