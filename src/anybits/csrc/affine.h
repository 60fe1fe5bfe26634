// Affine levels: y = sum over blocks of (sum_b scale_b * T_b) * s + offset * S, where T_b is the signed sum of
// a block's activations under plane b. Four activations have 16 signed sums; a table of them, indexed by four
#pragma once

#include "call.h"
#include "convert.h"

namespace {

constexpr int WIDE_TABLE = 256, SHORT_TABLE = 128;  // bytes of a step's tables: 8 of 16 entries, one or two bytes each

// How entries are kept: one byte, two bytes of two tables, or whole 16-bit numbers for two rows of x and more.
enum Entries { ONE_BYTE, TWO_BYTES, WORDS };

constexpr int table_of(Entries entries) { return entries == ONE_BYTE ? SHORT_TABLE : WIDE_TABLE; }

// Calls run with the dtype of a weight's levels as a constant: run(dtype) finds it as dtype().
template <int DTYPE>
struct LevelDtype {
    constexpr int operator()() const { return DTYPE; }
};

template <class F>
inline void with_level_dtype(const Header *h, const F &run) {
    switch (h->shape.level_dtype) {
        case AB_F16: return run(LevelDtype<AB_F16>());
        case AB_BF16: return run(LevelDtype<AB_BF16>());
        case AB_I8: return run(LevelDtype<AB_I8>());
        default: run(LevelDtype<AB_F32>());
    }
}

constexpr float WIDE_LIMIT = 255.0f * 127.0f, SHORT_LIMIT = 127.0f;

template <class I>
void load_x(const Call &c, int row, float *out, int64_t padded) {
    const int64_t k = c.weight->shape.in_features;
    const char *base = static_cast<const char *>(c.x) + row * c.x_stride * (c.dtype == AB_F32 ? 4 : 2);
    if (c.dtype == AB_F32) {
        memcpy(out, base, static_cast<size_t>(k) * 4);
    } else if (c.dtype == AB_BF16) {
        const uint16_t *p = reinterpret_cast<const uint16_t *>(base);
        for (int64_t i = 0; i < k; i++) out[i] = bf16_to_float(p[i]);
    } else {
        I::load_f16(reinterpret_cast<const uint16_t *>(base), out, k);
    }
    for (int64_t i = k; i < padded; i++) out[i] = 0;
}

// The 16 signed sums of four activations as bytes; entry e has +x[i] where bit i of e is set.
template <class I>
inline void write_table(const float *x, float inverse, bool wide, uint8_t *high, uint8_t *low) {
    alignas(64) int32_t h[16], l[16];
    for (int e = 0; e < 16; e++) {
        float v = (e & 1 ? x[0] : -x[0]) + (e & 2 ? x[1] : -x[1]);
        v += (e & 4 ? x[2] : -x[2]) + (e & 8 ? x[3] : -x[3]);
        v = __builtin_rintf(v * inverse);
        const float top = wide ? __builtin_rintf(v * (1.0f / 255.0f)) : v;
        h[e] = static_cast<int32_t>(top);
        l[e] = static_cast<int32_t>(v - 255.0f * top);
    }
    for (int e = 0; e < 16; e++) high[e] = static_cast<uint8_t>(h[e] ^ I::TABLE_FLIP);
    if (wide)
        for (int e = 0; e < 16; e++) low[e] = static_cast<uint8_t>(l[e] ^ I::TABLE_FLIP);
}

// The largest signed sum of four neighbours, an entry, decides the scale; `sum` is the sum of the block.
inline float peak_of_fours(const float *x, int64_t columns, float *sum) {
    float peak = 0, total = 0;
    for (int64_t i = 0; i < columns; i += 4) {
        const float a = __builtin_fabsf(x[i]) + __builtin_fabsf(x[i + 1]);
        const float b = __builtin_fabsf(x[i + 2]) + __builtin_fabsf(x[i + 3]);
        peak = a + b > peak ? a + b : peak;
        total += (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3]);
    }
    *sum = total;
    return peak;
}

// Where the activations of a block become integers: x * inverse, rounded; scale takes sums of them back.
struct Grid {
    float scale, inverse;
};

// `power`: the scale is a power of two, so that a bf16 activation above 1/128 of the limit is kept exactly. A block that
// is not all finite gets a scale that is NaN: its integers mean nothing.
inline Grid grid_of(float peak, float sum, float limit, bool power) {
    if (!(peak - peak == 0 && sum - sum == 0)) return {sum - sum + (peak - peak), 0};
    if (peak == 0) return {0, 0};
    if (!power) return {peak / limit, limit / peak};
    const uint32_t ratio = bits_of_float(peak / limit), up = (ratio + 0x7fffff) >> 23, exponent = up < 1 ? 1 : up;
    return {float_of_bits(exponent << 23), float_of_bits((254 - exponent) << 23)};
}

// The largest magnitude. Magnitudes are ordered as their bits are, and what is not finite is above all of them.
inline float peak_of(const float *x, int64_t count) {
    uint32_t peak = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = bits_of_float(x[i]) & 0x7fffffff;
        peak = magnitude > peak ? magnitude : peak;
    }
    return float_of_bits(peak);
}

// One block in place: integers where every entry of a table is to be an exact sum of them. With bf16, every kernel
// adds up the same integers, in tables or in matrices, and so gets the same result.
template <class I>
inline Grid affine_block(const Call &c, float *x, int64_t columns, float *sum) {
    const bool small = c.form == SHORT_TABLES, exact = c.dtype == AB_BF16 && !small;
    float peak;
    if constexpr (I::WORD_ENTRIES)
        peak = small ? peak_of_fours(x, columns, sum) : I::peak_of_pairs(x, columns, sum);
    else
        peak = peak_of_fours(x, columns, sum);
    Grid grid = grid_of(peak, *sum, small ? SHORT_LIMIT : WIDE_LIMIT, exact);
    if (!(grid.inverse > 0)) {
        memset(x, 0, static_cast<size_t>(columns) * sizeof(float));
    } else if (exact) {
        for (int64_t i = 0; i < columns; i++) x[i] = __builtin_rintf(x[i] * grid.inverse);
        grid.inverse = 1;
    }
    return grid;
}

// The eight tables of a step as bytes. Byte j of a word: low nibble, then high nibble.
template <class I>
inline void write_step(const float *x, float inverse, bool wide, uint8_t *out) {
    for (int j = 0; j < 4; j++) {
        write_table<I>(x + 8 * j, inverse, wide, out + 16 * j, out + 128 + 16 * j);
        write_table<I>(x + 8 * j + 4, inverse, wide, out + 64 + 16 * j, out + 192 + 16 * j);
    }
}

template <class I>
void affine_activations(const Call &c, int row, float *floats) {
    const Header *h = c.weight;
    const int64_t padded = h->steps * STEP;
    const bool wide = c.form != SHORT_TABLES;
    const int64_t table = wide ? WIDE_TABLE : SHORT_TABLE;
    load_x<I>(c, row, floats, padded);
    uint8_t *out = c.tables + row * c.table_stride;
    for (int64_t block = 0; block < h->blocks; block++) {
        const int64_t first = block * h->block_columns;
        const int64_t last = first + h->block_columns < padded ? first + h->block_columns : padded;
        float sum;
        const Grid grid = affine_block<I>(c, floats + first, last - first, &sum);
        c.scales[row * c.scale_stride + block] = grid.scale;
        c.sums[row * c.scale_stride + block] = sum;
        for (int64_t k = first; k < last; k += STEP, out += table) {
            if constexpr (I::WORD_ENTRIES) {
                if (wide) {
                    I::write_entries(floats + k, grid.inverse, c.dtype == AB_BF16, c.rows > 1, out);
                    continue;
                }
            }
            write_step<I>(floats + k, grid.inverse, wide, out);
        }
    }
}

constexpr int64_t STREAM_AHEAD = 4096;  // bytes of each plane that are fetched ahead

// Into the second-level cache: the first level's few buffers for misses would bound the bandwidth of a core.
inline void fetch_ahead(const uint8_t *at) { __builtin_prefetch(at, 0, 2); }

// What the inner loop needs of the rows of x that go through it together.
template <int MC>
struct Chunk {
    const uint8_t *tables[MC];
    const float *scales[MC];
    const float *sums[MC];
    float *y[MC];  // [tile_rows] partial results
};

// Lanes of the f-th vector of an entry's levels; those in 8 bits times their steps, which other levels have none of.
template <class I, int DTYPE>
inline typename I::F level_in_steps(const uint8_t *level, const float *steps, int f) {
    const typename I::F value = I::template level<DTYPE>(level, f);
    if constexpr (DTYPE == AB_I8) return I::fma(value, I::load(steps + f * I::LANES), I::zero());
    return value;
}

// Blocks first ... last - 1 of one tile for MC rows of x at one precision. STEPS is the steps of a block when
// that is known, so that its tables can stay in registers from plane to plane; 0 otherwise.
template <class I, int MC, Entries E, int DTYPE, int STEPS>
void affine_tile(const Header *h, int precision, int64_t tile, int64_t first, int64_t last, const Chunk<MC> &chunk,
                 int64_t prefetch) {
    using F = typename I::F;
    constexpr int FV = I::TILE / I::LANES;
    constexpr int TABLE = table_of(E);
    const int64_t level_bytes = I::TILE * level_size(DTYPE), entries = affine_entries(h->shape, precision);
    const int64_t block_steps = h->block_columns / STEP, step_bytes = I::TILE * 4;
    const uint8_t *planes = plane_at(h, 0, tile), *levels = affine_levels_at(h, precision, tile);
    const float *steps_of_rows = affine_steps_at(h, precision, tile);
    const int64_t level_ahead = prefetch == STREAM_AHEAD ? STREAM_AHEAD : h->groups * entries * level_bytes;
    F y[MC][FV];
    for (int m = 0; m < MC; m++)
        for (int f = 0; f < FV; f++) y[m][f] = I::load(chunk.y[m] + f * I::LANES);
    for (int64_t block = first; block < last; block++) {
        const int64_t step = block * block_steps;
        const int steps = STEPS ? STEPS : static_cast<int>(h->steps - step < block_steps ? h->steps - step : block_steps);
        const uint8_t *at = planes + step * step_bytes;
        const uint8_t *level = levels + block / h->blocks_per_group * entries * level_bytes;
        for (int64_t i = 0; i < 128; i += 64) fetch_ahead(level + level_ahead + i);
        const uint8_t *tables[MC];
        for (int m = 0; m < MC; m++) tables[m] = chunk.tables[m] + step * TABLE;
        F z[MC][FV];
        for (int m = 0; m < MC; m++)
            for (int f = 0; f < FV; f++) z[m][f] = I::zero();
        for (int b = 0; b < precision; b++, at += h->plane_stride, level += level_bytes) {
            for (int64_t i = 0; i < steps * step_bytes; i += 64) fetch_ahead(at + prefetch + i);
            F sums[MC][FV];
            I::template lookup<MC, E, STEPS>(at, steps, tables, sums);
            for (int f = 0; f < FV; f++) {
                const F scale = level_in_steps<I, DTYPE>(level, steps_of_rows + b * I::TILE, f);
                for (int m = 0; m < MC; m++) z[m][f] = I::fma(scale, sums[m][f], z[m][f]);
            }
        }
        for (int m = 0; m < MC; m++)
            for (int f = 0; f < FV; f++) y[m][f] = I::fma(z[m][f], I::set1(chunk.scales[m][block]), y[m][f]);
        if (!h->shape.has_offsets) continue;
        for (int f = 0; f < FV; f++) {
            const F offset = level_in_steps<I, DTYPE>(level, steps_of_rows + precision * I::TILE, f);
            for (int m = 0; m < MC; m++) y[m][f] = I::fma(offset, I::set1(chunk.sums[m][block]), y[m][f]);
        }
    }
    for (int m = 0; m < MC; m++)
        for (int f = 0; f < FV; f++) I::store(chunk.y[m] + f * I::LANES, y[m][f]);
}

// Rows of x that go through a tile together at several precisions: a plane's sums are looked up for the rows that read the
// plane, and only their scales differ. The same operations in the same order for each row as in affine_tile.
template <int MC>
struct MixedChunk : Chunk<MC> {
    int precision[MC];  // the highest first; 0 for places without a row
};

template <class I, Entries E, int DTYPE, int STEPS>
void affine_mixed_tile(const Header *h, int64_t tile, int64_t first, int64_t last, const MixedChunk<I::LOOKUP_ROWS> &chunk,
                       int64_t prefetch) {
    using F = typename I::F;
    constexpr int FV = I::TILE / I::LANES, MC = I::LOOKUP_ROWS, TABLE = table_of(E);
    static_assert(MC <= 4, "a case is missing below");
    const int64_t level_bytes = I::TILE * level_size(DTYPE), block_steps = h->block_columns / STEP, step_bytes = I::TILE * 4;
    const uint8_t *planes = plane_at(h, 0, tile);
    for (int64_t block = first; block < last; block++) {
        const int64_t step = block * block_steps;
        const int steps = STEPS ? STEPS : static_cast<int>(h->steps - step < block_steps ? h->steps - step : block_steps);
        const uint8_t *at = planes + step * step_bytes, *tables[MC] = {}, *level[MC] = {};
        const float *steps_of_rows[MC] = {};
        F z[MC][FV];
        for (int m = 0; m < MC; m++) {
            const int p = chunk.precision[m];
            for (int f = 0; f < FV; f++) z[m][f] = I::zero();
            if (!p) continue;
            tables[m] = chunk.tables[m] + step * TABLE;
            level[m] = affine_block_levels(h, p, tile, block);
            steps_of_rows[m] = affine_steps_at(h, p, tile);
        }
        for (int b = 0; b < chunk.precision[0]; b++, at += h->plane_stride) {
            for (int64_t i = 0; i < steps * step_bytes; i += 64) fetch_ahead(at + prefetch + i);
            F sums[MC][FV];
            int readers = 1;
            while (readers < MC && chunk.precision[readers] > b) readers++;
            if (readers == 1)
                I::template lookup<1, E, STEPS>(at, steps, tables, sums);
            else if (readers == 2 || MC == 2)
                I::template lookup<MC < 2 ? 1 : 2, E, STEPS>(at, steps, tables, sums);
            else if (readers == 3 || MC == 3)
                I::template lookup<MC < 3 ? 1 : 3, E, STEPS>(at, steps, tables, sums);
            else
                I::template lookup<MC < 4 ? 1 : 4, E, STEPS>(at, steps, tables, sums);
            for (int m = 0; m < MC; m++) {
                if (m >= readers) break;
                for (int f = 0; f < FV; f++) {
                    const F scale = level_in_steps<I, DTYPE>(level[m] + b * level_bytes, steps_of_rows[m] + b * I::TILE, f);
                    z[m][f] = I::fma(scale, sums[m][f], z[m][f]);
                }
            }
        }
        for (int m = 0; m < MC; m++) {
            const int p = chunk.precision[m];
            if (!p) continue;
            for (int f = 0; f < FV; f++) {
                float *to = chunk.y[m] + f * I::LANES;
                F y = I::fma(z[m][f], I::set1(chunk.scales[m][block]), I::load(to));
                if (h->shape.has_offsets) {
                    const F offset = level_in_steps<I, DTYPE>(level[m] + p * level_bytes, steps_of_rows[m] + p * I::TILE, f);
                    y = I::fma(offset, I::set1(chunk.sums[m][block]), y);
                }
                I::store(to, y);
            }
        }
    }
}

template <class I>
void store_rows(const Call &c, int row, int64_t column, const float *values, int64_t count) {
    const int64_t at = row * c.weight->shape.out_features + column;
    if (c.dtype == AB_F32) {
        memcpy(static_cast<float *>(c.y) + at, values, static_cast<size_t>(count) * 4);
    } else if (c.dtype == AB_BF16) {
        uint16_t *y = static_cast<uint16_t *>(c.y) + at;
        for (int64_t i = 0; i < count; i++) y[i] = float_to_bf16(values[i]);
    } else {
        I::store_f16(values, static_cast<uint16_t *>(c.y) + at, count);
    }
}

template <class I>
void store_tiles(const Call &c, int64_t tile, int64_t tiles, const float *scratch) {
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t column = (tile + t) * I::TILE, n = c.weight->shape.out_features;
        const int64_t count = n - column < I::TILE ? n - column : I::TILE;
        for (int p = 0; p < c.rows; p++)
            store_rows<I>(c, c.order[p], column, scratch + (t * c.rows + p) * I::TILE, count);
    }
}

// A piece of the work: tiles of one group, table blocks first ... last - 1, for all rows of x.
struct Piece {
    int64_t tile, tiles, first, last;
    int64_t prefetch;
};

// Whether a table block is four whole steps everywhere.
inline bool even_blocks(const Header *h) { return h->block_columns == TABLE_COLUMNS && h->steps % 4 == 0; }

template <class I, int MC>
inline void set_row(const Call &c, Chunk<MC> &chunk, int m, int position, int64_t t, float *scratch) {
    const int row = c.order[position];
    chunk.tables[m] = c.tables + row * c.table_stride;
    chunk.scales[m] = c.scales + row * c.scale_stride;
    chunk.sums[m] = c.sums + row * c.scale_stride;
    chunk.y[m] = scratch + (t * c.rows + position) * I::TILE;
}

template <class I, int MC, Entries E, int DTYPE>
void affine_chunk(const Call &c, int precision, int position, const Piece &piece, float *scratch) {
    const Header *h = c.weight;
    for (int64_t t = 0; t < piece.tiles; t++) {
        Chunk<MC> chunk;
        for (int m = 0; m < MC; m++) set_row<I>(c, chunk, m, position + m, t, scratch);
        const int64_t tile = piece.tile + t;
        if (even_blocks(h))
            affine_tile<I, MC, E, DTYPE, 4>(h, precision, tile, piece.first, piece.last, chunk, piece.prefetch);
        else
            affine_tile<I, MC, E, DTYPE, 0>(h, precision, tile, piece.first, piece.last, chunk, piece.prefetch);
    }
}

// `precisions`: of the rows at `position` and behind it, 0 after the last.
template <class I, Entries E, int DTYPE>
void affine_mixed_chunk(const Call &c, const int *precisions, int position, const Piece &piece, float *scratch) {
    const Header *h = c.weight;
    for (int64_t t = 0; t < piece.tiles; t++) {
        MixedChunk<I::LOOKUP_ROWS> chunk = {};
        for (int m = 0; m < I::LOOKUP_ROWS; m++) {
            chunk.precision[m] = precisions[m];
            if (precisions[m]) set_row<I>(c, chunk, m, position + m, t, scratch);
        }
        const int64_t tile = piece.tile + t;
        if (even_blocks(h))
            affine_mixed_tile<I, E, DTYPE, 4>(h, tile, piece.first, piece.last, chunk, piece.prefetch);
        else
            affine_mixed_tile<I, E, DTYPE, 0>(h, tile, piece.first, piece.last, chunk, piece.prefetch);
    }
}

// `precisions`: of all rows, then 0.
template <class I, Entries E, int DTYPE>
void affine_piece(const Call &c, const int *precisions, Piece piece, float *scratch) {
    constexpr int MOST = E == TWO_BYTES && I::WORD_ENTRIES ? 1 : I::LOOKUP_ROWS;
    for (int position = 0; position < c.rows; position += MOST) {
        const int taken = c.rows - position < MOST ? c.rows - position : MOST, p = precisions[position];
        if (MOST > 1 && precisions[position + taken - 1] != p)
            affine_mixed_chunk<I, E, DTYPE>(c, precisions + position, position, piece, scratch);
        else if (taken == 4)
            affine_chunk<I, MOST >= 4 ? 4 : 1, E, DTYPE>(c, p, position, piece, scratch);
        else if (taken == 3)
            affine_chunk<I, MOST >= 3 ? 3 : 1, E, DTYPE>(c, p, position, piece, scratch);
        else if (taken == 2)
            affine_chunk<I, MOST >= 2 ? 2 : 1, E, DTYPE>(c, p, position, piece, scratch);
        else
            affine_chunk<I, 1, E, DTYPE>(c, p, position, piece, scratch);
        piece.prefetch = 0;  // the planes of this piece are in the cache from now on
    }
}

constexpr int64_t PIECE_COLUMNS = 512;  // columns whose tables, for four rows of x, stay in the first-level cache

template <class I, Entries E, int DTYPE>
void affine_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    const Header *h = c.weight;
    const bool streaming = c.rows <= I::LOOKUP_ROWS;
    const int64_t group = streaming ? 1 : TILE_GROUP;
    const int64_t at_once = streaming ? h->blocks : PIECE_COLUMNS / h->block_columns;
    int precisions[AB_MAX_ROWS + I::LOOKUP_ROWS] = {0};
    for (int i = 0; i < c.segment_count; i++)
        for (int m = 0; m < c.segments[i].count; m++) precisions[c.segments[i].first + m] = c.segments[i].precision;
    for (int64_t tile = first; tile < last; tile += group) {
        const int64_t tiles = last - tile < group ? last - tile : group;
        memset(scratch, 0, static_cast<size_t>(tiles * c.rows * I::TILE) * sizeof(float));
        for (int64_t block = 0; block < h->blocks; block += at_once) {
            const int64_t end = block + at_once < h->blocks ? block + at_once : h->blocks;
            affine_piece<I, E, DTYPE>(c, precisions, {tile, tiles, block, end, streaming ? STREAM_AHEAD : h->tile_bytes}, scratch);
        }
        store_tiles<I>(c, tile, tiles, scratch);
    }
}

template <class I, Entries E>
void affine_by_dtype(const Call &c, int64_t first, int64_t last, float *scratch) {
    with_level_dtype(c.weight, [&](auto dtype) { affine_multiply<I, E, dtype()>(c, first, last, scratch); });
}

}  // namespace
