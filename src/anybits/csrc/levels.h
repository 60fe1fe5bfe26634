// Affine levels and many rows of x: a block of two tiles becomes an ordinary matrix in the first cache, once for all rows of
// x, and is multiplied there. What bytes (avx512_bytes.h) and bf16 (avx512_bf16.h) have in common; a kind of levels L says
//   PLANES: precisions that it serves; COLUMNS: columns that a 32-bit lane holds, [COLUMNS columns][16 rows][COLUMNS];
//   Tables, fill<P, DTYPE>: what one block of one tile is made from; store<P>: the levels of four columns;
//   products<M, T>: one block for M rows of x and T tiles.
#pragma once

#include "avx512.h"

namespace {

constexpr int LEVEL_ROWS = 8;               // rows of x that go through a block together
constexpr int64_t LEVEL_BLOCKS_AT_ONCE = 8;  // blocks whose tables are made together: one after the other, each would wait for its division

// Bytes of one block of one tile.
template <class L>
constexpr int64_t LEVEL_BLOCK = 16 * TABLE_COLUMNS * 4 / L::COLUMNS;

// A step's columns in the order in which their levels come: bit i of each byte of a word, then bit i + 1.
constexpr uint8_t LEVEL_ORDER[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                     4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};

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

// Columns of a block at precision P.
template <class L, int P>
void expand_levels(const Header *h, int64_t tile, int64_t block, const typename L::Tables &from, uint8_t *out) {
    const int64_t block_steps = h->block_columns / STEP, first = block * block_steps, ahead = 2 * h->tile_bytes;
    const int64_t steps = h->steps - first < block_steps ? h->steps - first : block_steps;
    const typename L::Tables tables = from;  // in registers, whatever is stored
    const uint8_t *plane = plane_at(h, 0, tile) + first * 64;
    for (int64_t step = 0; step < steps; step++, plane += 64) {
        __m512i words[P];
        for (int b = 0; b < P; b++) {
            fetch_ahead(plane + b * h->plane_stride + ahead);
            words[b] = _mm512_loadu_si512(plane + b * h->plane_stride);
        }
#pragma GCC unroll 8
        for (int bit = 0; bit < 8; bit++, out += 256 / L::COLUMNS) L::template store<P>(tables, words, bit, out);
    }
}

// `count`: lanes of columns in the block.
template <class L, int T>
void level_rows(const Call &c, const Segment &s, int64_t block, int64_t count, const uint8_t *levels,
                const typename L::Tables *tables, float *y) {
    for (int done = 0, taken; done < s.count; done += taken) {
        const int left = s.count - done, from = s.first + done;
        taken = left < LEVEL_ROWS ? left : LEVEL_ROWS;
        switch (taken) {
            case 8: L::template products<8, T>(c, block, from, count, levels, tables, y); break;
            case 7: L::template products<7, T>(c, block, from, count, levels, tables, y); break;
            case 6: L::template products<6, T>(c, block, from, count, levels, tables, y); break;
            case 5: L::template products<5, T>(c, block, from, count, levels, tables, y); break;
            case 4: L::template products<4, T>(c, block, from, count, levels, tables, y); break;
            case 3: L::template products<3, T>(c, block, from, count, levels, tables, y); break;
            case 2: L::template products<2, T>(c, block, from, count, levels, tables, y); break;
            default: L::template products<1, T>(c, block, from, count, levels, tables, y);
        }
    }
}

template <class L, int P, int DTYPE>
void level_segment(const Call &c, const Segment &s, int64_t tile, int tiles, int64_t first, int64_t last, float *y) {
    const Header *h = c.weight;
    typename L::Tables tables[LEVEL_BLOCKS_AT_ONCE][2];
    alignas(64) uint8_t levels[2 * LEVEL_BLOCK<L>];
    for (int64_t block = first; block < last; block++)
        for (int t = 0; t < tiles; t++) L::template fill<P, DTYPE>(h, tile + t, block, &tables[block - first][t]);
    for (int64_t block = first; block < last; block++) {
        const int64_t left = h->steps * STEP - block * h->block_columns;
        const int64_t count = (left < h->block_columns ? left : h->block_columns) / L::COLUMNS;
        const typename L::Tables *here = tables[block - first];
        for (int t = 0; t < tiles; t++) expand_levels<L, P>(h, tile + t, block, here[t], levels + t * LEVEL_BLOCK<L>);
        if (tiles == 2)
            level_rows<L, 2>(c, s, block, count, levels, here, y);
        else
            level_rows<L, 1>(c, s, block, count, levels, here, y);
    }
}

template <class L, int DTYPE>
void level_multiply_as(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*segment[AB_MAX_PLANES + 1])(const Call &, const Segment &, int64_t, int, int64_t, int64_t, float *) = {
        nullptr, level_segment<L, 1, DTYPE>, level_segment<L, 2, DTYPE>, level_segment<L, 3, DTYPE>, level_segment<L, 4, DTYPE>};
    if constexpr (L::PLANES > 4) segment[5] = level_segment<L, 5, DTYPE>, segment[6] = level_segment<L, 6, DTYPE>;
    static_assert(L::PLANES == 4 || L::PLANES == 6, "a precision is missing above");
    const int64_t blocks = c.weight->blocks;
    for (int64_t tile = first; tile < last; tile += 2) {
        const int tiles = last - tile < 2 ? 1 : 2;
        memset(scratch, 0, static_cast<size_t>(tiles * c.rows * 16) * sizeof(float));
        for (int64_t block = 0; block < blocks; block += LEVEL_BLOCKS_AT_ONCE) {
            const int64_t end = block + LEVEL_BLOCKS_AT_ONCE < blocks ? block + LEVEL_BLOCKS_AT_ONCE : blocks;
            for (int i = 0; i < c.segment_count; i++)
                segment[c.segments[i].precision](c, c.segments[i], tile, tiles, block, end, scratch);
        }
        store_tiles<Avx512>(c, tile, tiles, scratch);
    }
}

template <class L>
void level_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    switch (c.weight->shape.level_dtype) {
        case AB_F16: return level_multiply_as<L, AB_F16>(c, first, last, scratch);
        case AB_BF16: return level_multiply_as<L, AB_BF16>(c, first, last, scratch);
        case AB_I8: return level_multiply_as<L, AB_I8>(c, first, last, scratch);
        default: return level_multiply_as<L, AB_F32>(c, first, last, scratch);
    }
}

// Whether making levels costs less than tables of sums. `rows`: from how many rows of x on, by the highest precision; levels are
// made for each precision.
inline bool levels_pay(const Call &c, const int *rows, int planes) {
    const int highest = c.segments[0].precision;
    return c.weight->shape.levels == AB_AFFINE && highest <= planes && c.rows >= rows[highest] * c.segment_count;
}

}  // namespace
