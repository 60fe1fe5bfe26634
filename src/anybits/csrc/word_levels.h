// Affine levels and many rows of x where an instruction multiplies 16-bit numbers no slower than bytes (AVX2, NEON): a block of a
// tile becomes a matrix of 14-bit levels in the first cache, once for all rows of x, and is multiplied there.
//
// A tile has as many rows as a vector has bytes. Plane bytes are transposed, so that a vector holds the 16 bytes of a block of
// one row (NEON) or of rows q and q + 16 (AVX2), and planes merge into codes as they do for codebooks: bit i of byte B stands
// for column 8 * B + i. The up to 16 levels of four planes and a row are a table of one register; planes above have another.
#pragma once

#include "dequantize.h"

namespace {

constexpr int ROW_VECTORS = 16;         // vectors of a plane's block, [row or two] bytes
constexpr int LEVEL_VECTORS = 16;       // vectors of a row's levels: of bits 0, 0, 1, 1, ... bytes 0 to 7 and 8 to 15
constexpr float X_WORD_LIMIT = 8191.0f;  // a 32-bit lane adds 32 products of 14-bit numbers
constexpr float LEVEL_WORD_LIMIT = 8190.0f;  // one less: parts of a level are rounded each
constexpr int TABLE_PLANES = 4;
constexpr int WORD_PIECE_ROWS = 2;      // rows of x that meet four vectors of rows together

// Whether making levels costs less than tables of sums. `rows`: from how many rows of x on, by the highest precision. Levels are
// made for each precision, which tables of 16-bit sums outweigh sooner than those of 8 bits.
inline bool words_pay(const Call &c, const int *rows) {
    const int least = rows[c.segments[0].precision], each = c.eight_bits ? least : 3;
    return c.weight->block_columns == TABLE_COLUMNS && c.rows >= least && c.rows >= each * c.segment_count;
}

// Activations: [block][row of x][TABLE_COLUMNS], in the order in which levels come, zeros behind the last column.
inline int16_t *word_activations_at(const Call &c, int64_t block, int row) {
    return reinterpret_cast<int16_t *>(c.tables) + (block * c.rows + row) * TABLE_COLUMNS;
}

template <class I>
void word_activations(const Call &c, int row, float *floats) {
    const Header *h = c.weight;
    load_x<I>(c, row, floats, h->blocks * TABLE_COLUMNS);
    for (int64_t block = 0; block < h->blocks; block++) {
        const float *x = floats + block * TABLE_COLUMNS;
        float sums[8] = {0}, sum = 0;
        for (int64_t i = 0; i < TABLE_COLUMNS; i += 8)
            for (int j = 0; j < 8; j++) sums[j] += x[i + j];
        for (float s : sums) sum += s;
        const Grid grid = grid_of(peak_of(x, TABLE_COLUMNS), sum, X_WORD_LIMIT, c.dtype == AB_BF16);
        c.scales[row * c.scale_stride + block] = grid.scale;
        c.sums[row * c.scale_stride + block] = sum;
        int16_t q[TABLE_COLUMNS] = {0}, *out = word_activations_at(c, block, row);
        for (int i = 0; grid.inverse > 0 && i < TABLE_COLUMNS; i++)
            q[i] = static_cast<int16_t>(static_cast<int32_t>(__builtin_rintf(x[i] * grid.inverse)));
        for (int bit = 0; bit < 8; bit++)
            for (int byte = 0; byte < 16; byte++) out[16 * bit + byte] = q[8 * byte + bit];
    }
}

// 16 x 16 bytes, within each 16 bytes of the vectors: each round moves one bit of a vector's number into the places, and one back.
template <class I>
inline void transpose_bytes(typename I::V *v) {
    typename I::V other[ROW_VECTORS];
    for (int round = 0; round < 4; round++) {
        typename I::V *from = round % 2 ? other : v, *to = round % 2 ? v : other;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            to[2 * i] = I::zip_low(from[i], from[i + 8]);
            to[2 * i + 1] = I::zip_high(from[i], from[i + 8]);
        }
    }
}

// What one block of one tile is made from: bytes of the entries, those of planes 0 to 3 and of the others, what an integer stands
// for and the offset of each row.
template <class I>
struct alignas(64) WordTables {
    typename I::V low[2][ROW_VECTORS], high[2][ROW_VECTORS];
    float unit[I::TILE], offset[I::TILE];  // rows in the order of I::row_of
};

// Signed sums of COUNT planes' scales; plane b decides on bit COUNT - 1 - b of an entry. Fewer than 16 are repeated.
template <class I, int COUNT>
inline void fill_entries(const float (*scales)[I::TILE], typename I::V *low, typename I::V *high) {
    constexpr int ENTRIES = 1 << COUNT, FV = I::TILE / I::LANES;
    alignas(64) float values[ENTRIES][I::TILE];
    for (int r = 0; r < I::TILE; r++) {
        float all = 0;
        for (int b = 0; b < COUNT; b++) all -= scales[b][r];
        values[0][r] = all;
    }
    for (int bit = 0; bit < COUNT; bit++)
        for (int e = 1 << bit; e < 2 << bit; e++)
            for (int r = 0; r < I::TILE; r++) values[e][r] = values[e - (1 << bit)][r] + 2 * scales[COUNT - 1 - bit][r];
    for (int e = 0; e < ROW_VECTORS; e++) {
        if (e >= ENTRIES) {
            low[e] = low[e - ENTRIES], high[e] = high[e - ENTRIES];
            continue;
        }
        typename I::F v[FV];
        for (int f = 0; f < FV; f++) v[f] = I::load(values[e] + f * I::LANES);
        I::narrow(v, low + e, high + e);
    }
    transpose_bytes<I>(low);
    transpose_bytes<I>(high);
}

// The scales of one block of one tile, [plane][row] and then the offsets, as multiples of units[row] of which they add up to `limit`.
template <class I, int P, int DTYPE>
inline void block_scales(const Header *h, int64_t tile, int64_t block, float limit, float (*scales)[I::TILE], float *units) {
    constexpr int TILE = I::TILE, FV = TILE / I::LANES;
    const int64_t level_bytes = TILE * level_size(DTYPE);
    const uint8_t *level = affine_block_levels(h, P, tile, block);
    const float *steps = affine_steps_at(h, P, tile);
    for (int64_t i = 0; i < (P + 1) * level_bytes; i += 64) fetch_ahead(level + STREAM_AHEAD + i);
    for (int b = 0; b < P + (h->shape.has_offsets ? 1 : 0); b++)
        for (int f = 0; f < FV; f++)
            I::store(scales[b] + f * I::LANES, level_in_steps<I, DTYPE>(level + b * level_bytes, steps + b * TILE, f));
    for (int r = 0; r < TILE; r++) {
        float peak = 0;
        for (int b = 0; b < P; b++) peak += __builtin_fabsf(scales[b][r]);
        const float inverse = peak > 0 ? limit / peak : 0;
        for (int b = 0; b < P; b++) scales[b][r] *= inverse;
        units[r] = peak * (1.0f / limit);
    }
}

template <class I, int P, int DTYPE>
void fill_words(const Header *h, int64_t tile, int64_t block, WordTables<I> *out) {
    constexpr int TILE = I::TILE, FIRST = P < TABLE_PLANES ? P : TABLE_PLANES;
    alignas(64) float scales[P + 1][TILE], units[TILE];
    block_scales<I, P, DTYPE>(h, tile, block, LEVEL_WORD_LIMIT, scales, units);
    for (int i = 0; i < TILE; i++) {
        out->unit[i] = units[I::row_of(i)];
        out->offset[i] = h->shape.has_offsets ? scales[P][I::row_of(i)] : 0;
    }
    fill_entries<I, FIRST>(scales, out->low[0], out->high[0]);
    if constexpr (P > FIRST) fill_entries<I, P - FIRST>(scales + FIRST, out->low[1], out->high[1]);
}

// The plane bytes of a block: vectors of rows, with zeros behind the last step.
template <class I, int P>
inline void block_planes(const Header *h, int64_t tile, int64_t block, typename I::V (*rows)[ROW_VECTORS]) {
    constexpr int BLOCK_STEPS = TABLE_COLUMNS / STEP;
    const int64_t first = block * BLOCK_STEPS, steps = h->steps - first < BLOCK_STEPS ? h->steps - first : BLOCK_STEPS;
    for (int b = 0; b < P; b++) {
        const uint8_t *plane = plane_at(h, b, tile) + first * I::TILE * 4;
        for (int v = 0; v < ROW_VECTORS; v++) rows[b][v] = v < 4 * steps ? I::load_bytes(plane + v * I::BYTES) : I::bytes(0);
        for (int64_t i = 0; i < 4 * ROW_VECTORS * I::BYTES / 4; i += 64) fetch_ahead(plane + STREAM_AHEAD + i);
        transpose_bytes<I>(rows[b]);
    }
}

// Where a vector of row vector q stands: [four row vectors][vector][of the four].
constexpr int level_vector(int q, int vector) { return (q / 4 * LEVEL_VECTORS + vector) * 4 + q % 4; }

// Levels of a block. Columns past the last step have the level of code 0 and meet activations of 0.
template <class I, int P>
void expand_words(const Header *h, int64_t tile, int64_t block, const WordTables<I> &tables, typename I::V *out) {
    using V = typename I::V;
    constexpr int FIRST = P < TABLE_PLANES ? P : TABLE_PLANES, REST = P - FIRST;
    V rows[P][ROW_VECTORS];
    block_planes<I, P>(h, tile, block, rows);
    for (int q = 0; q < ROW_VECTORS; q++) {
        V planes[P], codes[8], others[8];
        for (int b = 0; b < P; b++) planes[b] = rows[b][q];
        merge_codes<I, FIRST>(planes, codes);
        if constexpr (REST > 0) merge_codes<I, REST>(planes + FIRST, others);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const V low = I::find(tables.low[0][q], codes[i]), high = I::find(tables.high[0][q], codes[i]);
            V words[2] = {I::zip_low(low, high), I::zip_high(low, high)};
            if constexpr (REST > 0) {
                const V l = I::find(tables.low[1][q], others[i]), h2 = I::find(tables.high[1][q], others[i]);
                words[0] = I::add_words(words[0], I::zip_low(l, h2)), words[1] = I::add_words(words[1], I::zip_high(l, h2));
            }
            out[level_vector(q, 2 * i)] = words[0], out[level_vector(q, 2 * i + 1)] = words[1];
        }
    }
}

// One block for M rows of x from position `from` on; y is [position][TILE], rows in the order of I::row_of.
template <class I, int M>
void word_products(const Call &c, int64_t block, int from, const typename I::V *levels, const WordTables<I> &tables, float *y) {
    const int16_t *x[M];
    typename I::F scale[M], sum[M];
    for (int m = 0; m < M; m++) {
        const int row = c.order[from + m];
        x[m] = word_activations_at(c, block, row);
        scale[m] = I::set1(c.scales[row * c.scale_stride + block]), sum[m] = I::set1(c.sums[row * c.scale_stride + block]);
    }
    for (int g = 0; g < ROW_VECTORS / 4; g++, levels += 4 * LEVEL_VECTORS) {
        typename I::Sum sums[M][4];
        for (int m = 0; m < M; m++)
            for (int t = 0; t < 4; t++) sums[m][t] = I::no_sum();
#pragma GCC unroll 1  // more, and additions change places until sums are kept in memory
        for (int v = 0; v < LEVEL_VECTORS; v++)
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const typename I::V factor = I::eight_words(x[m] + 8 * v);
#pragma GCC unroll 4
                for (int t = 0; t < 4; t++) sums[m][t] = I::add_word_products(sums[m][t], levels[4 * v + t], factor);
            }
        const typename I::F unit = I::load(tables.unit + g * I::LANES), offset = I::load(tables.offset + g * I::LANES);
        for (int m = 0; m < M; m++) {
            float *at = y + (from + m) * I::TILE + g * I::LANES;
            const typename I::F before = I::fma(offset, sum[m], I::load(at));
            I::store(at, I::fma(I::four_totals(sums[m]), I::fma(unit, scale[m], I::zero()), before));
        }
    }
}

// What lies behind the results in the scratch of a thread, which has room for TILE_GROUP tiles: 8 rows' are enough.
template <class I>
struct WordBlock {
    typename I::V levels[ROW_VECTORS * LEVEL_VECTORS];
    WordTables<I> tables;
};
constexpr int LEAST_WORD_ROWS = 8;

template <class I, int P, int DTYPE>
void word_segment(const Call &c, const Segment &s, int64_t tile, int64_t block, WordBlock<I> &to, float *y) {
    fill_words<I, P, DTYPE>(c.weight, tile, block, &to.tables);
    expand_words<I, P>(c.weight, tile, block, to.tables, to.levels);
    int done = 0;
    for (; done + WORD_PIECE_ROWS <= s.count; done += WORD_PIECE_ROWS)
        word_products<I, WORD_PIECE_ROWS>(c, block, s.first + done, to.levels, to.tables, y);
    for (; done < s.count; done++) word_products<I, 1>(c, block, s.first + done, to.levels, to.tables, y);
}

// A tile's results, rows in the order of I::row_of.
template <class I>
inline void store_places(const Call &c, int64_t tile, float *y) {
    for (int p = 0; p < c.rows; p++) {
        float rows[I::TILE];
        for (int i = 0; i < I::TILE; i++) rows[I::row_of(i)] = y[p * I::TILE + i];
        memcpy(y + p * I::TILE, rows, sizeof rows);
    }
    store_tiles<I>(c, tile, 1, y);
}

template <class I, int DTYPE>
void word_multiply_as(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*const segment[])(const Call &, const Segment &, int64_t, int64_t, WordBlock<I> &, float *) = {
        nullptr, word_segment<I, 1, DTYPE>, word_segment<I, 2, DTYPE>, word_segment<I, 3, DTYPE>, word_segment<I, 4, DTYPE>,
        word_segment<I, 5, DTYPE>, word_segment<I, 6, DTYPE>, word_segment<I, 7, DTYPE>, word_segment<I, 8, DTYPE>};
    static_assert(sizeof(WordBlock<I>) <= (TILE_GROUP - 1) * LEAST_WORD_ROWS * I::TILE * sizeof(float), "it must fit");
    WordBlock<I> &block_levels = *reinterpret_cast<WordBlock<I> *>(scratch + c.rows * I::TILE);
    for (int64_t tile = first; tile < last; tile++) {
        memset(scratch, 0, static_cast<size_t>(c.rows * I::TILE) * sizeof(float));
        for (int64_t block = 0; block < c.weight->blocks; block++)
            for (int i = 0; i < c.segment_count; i++)
                segment[c.segments[i].precision](c, c.segments[i], tile, block, block_levels, scratch);
        store_places<I>(c, tile, scratch);
    }
}

template <class I>
void word_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    with_level_dtype(c.weight, [&](auto dtype) { word_multiply_as<I, dtype()>(c, first, last, scratch); });
}

// Rows of x from which levels cost less than tables of sums, by the highest precision, with activations in 16 and in 8 bits; 513 for
// never. In 16 bits they would from five on: up to 15 a row's result does not depend on its batch. Measured on AVX2; NEON's are the
// same by counts of instructions, no Arm machine was at hand.
constexpr int WORDS_ROWS[2][AB_MAX_PLANES + 1] = {{0, 513, 16, 16, 16, 16, 16, 16, 16}, {0, 513, 513, 48, 20, 12, 8, 8, 8}};

// What an instruction set does with these levels, and with byte centroids for at most Bytes::MOST_ROWS rows of 8-bit activations.
template <class I, class Bytes>
struct WordInstance {
    using Exact = Instance<I>;
    static Form form(const Call &c) {
        if (c.weight->shape.levels == AB_AFFINE) return words_pay(c, WORDS_ROWS[c.eight_bits]) ? WORD_LEVELS : Exact::form(c);
        return c.eight_bits && c.rows <= Bytes::MOST_ROWS && c.segments[0].precision <= BYTE_PLANES ? BYTES : EXACT;
    }
    static void activations(const Call &c, int row, float *floats) {
        if (c.form == WORD_LEVELS) return word_activations<I>(c, row, floats);
        if (c.form == BYTES) return codebook_activations<Bytes>(c, row, floats);
        Exact::activations(c, row, floats);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.form == WORD_LEVELS) return word_multiply<I>(c, first, last, scratch);
        if (c.form == BYTES) return codebook_multiply<Bytes>(c, first, last, scratch);
        Exact::multiply(c, first, last, scratch);
    }
    static constexpr Kernels kernels = {I::TILE, I::ROW_WORDS, form, activations, multiply, dequantize_rows<I>, nullptr};
};

}  // namespace
