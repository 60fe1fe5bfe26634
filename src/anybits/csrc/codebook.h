// Codebook levels: y = row_scale * sum over parts of s * sum_k centroid[code_k] * x_k with centroids as 13-bit and
// activations as 14-bit integers. A span is 512 columns: 64 bytes of each plane, bit i of byte B standing for
// column 64 * i + B, so that merging the planes' bits in registers yields 8 vectors of 64 codes in order.
#pragma once

#include "affine.h"

namespace {

// How an instruction set keeps activations and centroids here and goes about its work, unless it says otherwise.
struct ShortIntegers {
    using X = int16_t;                          // an activation
    static constexpr int64_t PART = 256;        // columns that share an activation scale and one integer sum
    static constexpr float X_LIMIT = 16383.0f;  // 16 products with centroids of at most 8191 fit into 31 bits
    static constexpr float CENTROID = 1.0f;     // what a centroid of a table stands for, in those of the blob
    static constexpr int BIAS = 0;              // what is added to each
    static constexpr int CODES_ROWS = 16;       // rows of x from which storing codes costs less than looking them up for every four
    static constexpr int OUTPUTS_TOGETHER = 1;  // output rows that share what is read of x
    static constexpr int ROWS_TOGETHER = 1;     // and rows of x whose sums are interleaved
    static constexpr int PARTS_TOGETHER = 1;    // and parts whose centroids stay in registers
    static constexpr bool OWN_DEQUANTIZE = false, OWN_TOTALS = false, OWN_DOTS = false;
    static constexpr bool ROW_WORDS = false, WORD_ENTRIES = false;  // affine: how words and entries of tables lie
    static constexpr int TABLE_FLIP = 0x80;     // affine: tables of unsigned bytes, which are summed by plain additions
};

constexpr int BYTE_PLANES = 6;  // more planes say more than 8 bits of a level keep

// The same with 8 bits of each.
template <class I>
struct ByteIntegers : I {
    using X = int8_t;
    static constexpr float X_LIMIT = 127.0f;
    static constexpr int16_t SHRINK = 508;  // 13-bit centroids become 8-bit ones: times SHRINK / 32768
    static constexpr float CENTROID = 32768.0f / SHRINK;

    static int shrunk(int16_t centroid) { return (centroid * SHRINK + (1 << 14)) >> 15; }
    static void reorder(const int16_t *q, int8_t *out) {
        for (int i = 0; i < 64; i++) out[i] = static_cast<int8_t>(q[i]);
    }
};

// Activations lie [span][row of x][column], so that those which are read together are neighbours.
template <class I>
inline typename I::X *activations_of(const Call &c, int row) {
    return reinterpret_cast<typename I::X *>(c.tables) + row * SPAN;
}

template <class I>
void codebook_activations(const Call &c, int row, float *floats) {
    const int64_t padded = c.weight->spans * SPAN;
    load_x<I>(c, row, floats, padded);
    float bias = 0;
    for (int64_t part = 0; part < padded / I::PART; part++) {
        const int64_t column = part * I::PART;
        typename I::X *out = activations_of<I>(c, row) + column / SPAN * c.rows * SPAN + column % SPAN;
        const float *x = floats + part * I::PART;
        const float peak = peak_of(x, I::PART);
        const Grid grid = grid_of(peak, peak, I::X_LIMIT, false);
        c.scales[row * c.scale_stride + part] = grid.scale;
        alignas(64) int16_t q[I::PART] = {0};
        for (int i = 0; grid.inverse > 0 && i < I::PART; i++)
            q[i] = static_cast<int16_t>(static_cast<int32_t>(__builtin_rintf(x[i] * grid.inverse)));
        for (int i = 0; i < I::PART; i += 64) I::reorder(q + i, out + i);
        if constexpr (I::BIAS != 0) {
            int sum = 0;
            for (int i = 0; i < I::PART; i++) sum += q[i];
            bias += grid.scale * static_cast<float>(I::BIAS * sum);
        }
    }
    if constexpr (I::BIAS != 0) c.sums[row * c.scale_stride] = bias;
}

// Four vectors of two-bit fields from two planes, or of nibbles from three or four: result f holds the code of
// bit f in the low nibble of each byte and that of bit f + 4 in the high nibble. planes[0] is the most
// significant. For two planes the upper half of a nibble is left over from its neighbours.
template <class I, int P>
inline void merge_nibbles(const typename I::V *planes, typename I::V *u) {
    using V = typename I::V;
    const V m55 = I::bytes(0x55), m33 = I::bytes(0x33);
    const V c0 = planes[P - 1], c1 = planes[P - 2];
    const V even = I::select(m55, c0, I::template left<1>(c1)), odd = I::select(m55, I::template right<1>(c0), c1);
    if constexpr (P == 2) {
        u[0] = even, u[1] = odd, u[2] = I::template right<2>(even), u[3] = I::template right<2>(odd);
    } else {
        V high_even, high_odd;
        if constexpr (P == 3) {
            high_even = I::both(planes[0], m55), high_odd = I::both(I::template right<1>(planes[0]), m55);
        } else {
            const V c2 = planes[P - 3], c3 = planes[P - 4];
            high_even = I::select(m55, c2, I::template left<1>(c3));
            high_odd = I::select(m55, I::template right<1>(c2), c3);
        }
        u[0] = I::select(m33, even, I::template left<2>(high_even));
        u[1] = I::select(m33, odd, I::template left<2>(high_odd));
        u[2] = I::select(m33, I::template right<2>(even), high_even);
        u[3] = I::select(m33, I::template right<2>(odd), high_odd);
    }
}

// codes[i]: the code of bit i in each byte. Bits above the precision are left over when P < 4; a lookup takes
// no more index bits than the precision has.
template <class I, int P>
inline void merge_codes(const typename I::V *planes, typename I::V *codes) {
    using V = typename I::V;
    if constexpr (P == 1) {
        codes[0] = planes[0], codes[1] = I::template right<1>(planes[0]), codes[2] = I::template right<2>(planes[0]);
        codes[3] = I::template right<3>(planes[0]), codes[4] = I::template right<4>(planes[0]);
        codes[5] = I::template right<5>(planes[0]), codes[6] = I::template right<6>(planes[0]);
        codes[7] = I::template right<7>(planes[0]);
    } else if constexpr (P <= 4) {
        merge_nibbles<I, P>(planes, codes);
        for (int f = 0; f < 4; f++) codes[f + 4] = I::template right<4>(codes[f]);
    } else {
        const V m0f = I::bytes(0x0f);
        V low[4], high[4];
        merge_nibbles<I, 4>(planes + P - 4, low);
        if constexpr (P == 5) {
            const V m11 = I::bytes(0x11);
            high[0] = I::both(planes[0], m11), high[1] = I::both(I::template right<1>(planes[0]), m11);
            high[2] = I::both(I::template right<2>(planes[0]), m11);
            high[3] = I::both(I::template right<3>(planes[0]), m11);
        } else {
            merge_nibbles<I, P == 5 ? 2 : P - 4>(planes, high);
            if constexpr (P == 6)
                for (int f = 0; f < 4; f++) high[f] = I::both(high[f], I::bytes(0x33));
        }
        for (int f = 0; f < 4; f++) {
            codes[f] = I::select(m0f, low[f], I::template left<4>(high[f]));
            codes[f + 4] = I::select(m0f, I::template right<4>(low[f]), high[f]);
        }
    }
}

// The codes of a piece of a span, whose planes begin at `plane`.
template <class I, int P>
inline __attribute__((always_inline)) void load_codes(const Header *h, const uint8_t *plane, int piece, int64_t ahead, typename I::V *codes) {
    typename I::V planes[P];
    for (int b = 0; b < P; b++) {
        const uint8_t *at = plane + b * h->plane_stride + piece * I::BYTES;
        if (piece == 0) fetch_ahead(at + ahead);
        planes[b] = I::load_bytes(at);
    }
    merge_codes<I, P>(planes, codes);
}

// Products of M rows of x and R output rows; one at a time where an instruction set has nothing better.
template <class I, int M, int R>
inline __attribute__((always_inline)) void dots_of(const typename I::Words *w, const typename I::X *const *x, typename I::F (*out)[R]) {
    if constexpr (I::OWN_DOTS) {
        I::template dots<M, R>(w, x, out);
    } else {
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R; r++) out[m][r] = I::dot(w[r], x[m]);
    }
}

// Rows of x of one precision among a few, whose centroids are w.
template <class I, int M>
inline __attribute__((always_inline)) void add_row_products(const typename I::Words &w, const typename I::X *const *x, int64_t at,
                                                            const float *const *scales, int64_t scale, typename I::F *sums) {
    const typename I::X *here[M];
    typename I::F products[M][1];
    for (int m = 0; m < M; m++) here[m] = x[m] + at;
    dots_of<I, M, 1>(&w, here, products);
    for (int m = 0; m < M; m++) sums[m] = I::fma(products[m][0], I::set1(scales[m][scale]), sums[m]);
}

// Spans first ... last - 1 of one output row for MC rows of x at precision P, added to sums[m] of LANES floats.
template <class I, int P, int MC>
void codebook_row(const Call &c, const int *rows, int64_t n, int64_t first, int64_t last, int64_t ahead, float *sums_at) {
    using V = typename I::V;
    using F = typename I::F;
    constexpr int PIECES = 64 / I::BYTES, PARTS = SPAN / I::PART, VECTORS = 8 / PARTS;
    const Header *h = c.weight;
    const uint8_t *plane = plane_at(h, 0, n);
    const typename I::template Table<P> table(centroids_at(h, P, n));
    const typename I::X *x[MC];
    const float *scales[MC];
    F sums[MC];
    for (int m = 0; m < MC; m++) {
        x[m] = activations_of<I>(c, rows[m]);
        scales[m] = c.scales + rows[m] * c.scale_stride;
        sums[m] = I::load(sums_at + m * I::LANES);
    }
    for (int64_t span = first; span < last; span++) {
        for (int piece = 0; piece < PIECES; piece++) {
            V codes[8];
            load_codes<I, P>(h, plane + span * 64, piece, ahead, codes);
            for (int part = 0; part < PARTS; part++) {
                typename I::Words w;  // centroids of the part's columns
                table.lookup(codes + VECTORS * part, w);
                const int64_t at = span * c.rows * SPAN + part * I::PART + piece * I::BYTES;
                add_row_products<I, MC>(w, x, at, scales, span * PARTS + part, sums);
            }
        }
    }
    for (int m = 0; m < MC; m++) I::store(sums_at + m * I::LANES, sums[m]);
}

constexpr int FEW_ROWS = 4;  // rows of x that what is looked up serves from registers

// As codebook_row for rows of several precisions, the highest, P, first. A lower one has a table of its own for the same codes: 2^P
// entries, each centroid repeated for all codes that begin with its own. What is looked up serves all rows of a precision.
template <class I, int P, int MC>
void codebook_mixed_row(const Call &c, const int *rows, const int *precisions, int64_t n, int64_t first, int64_t last, int64_t ahead,
                        float *sums_at) {
    using V = typename I::V;
    using Table = typename I::template Table<P>;
    constexpr int PIECES = 64 / I::BYTES, PARTS = SPAN / I::PART, VECTORS = 8 / PARTS;
    const Header *h = c.weight;
    const uint8_t *plane = plane_at(h, 0, n);
    alignas(64) int16_t entries[MC][1 << P < 32 ? 32 : 1 << P];
    bool fresh[MC];
    const typename I::X *x[MC];
    const float *scales[MC];
    typename I::F sums[MC];
    for (int m = 0; m < MC; m++) {
        const int16_t *centroids = centroids_at(h, precisions[m], n);
        fresh[m] = !m || precisions[m] != precisions[m - 1];
        for (int code = 0; fresh[m] && code < 1 << P; code++) entries[m][code] = centroids[code >> (P - precisions[m])];
        x[m] = activations_of<I>(c, rows[m]);
        scales[m] = c.scales + rows[m] * c.scale_stride;
        sums[m] = I::load(sums_at + m * I::LANES);
    }
    for (int64_t span = first; span < last; span++) {
        for (int piece = 0; piece < PIECES; piece++) {
            V codes[8];
            load_codes<I, P>(h, plane + span * 64, piece, ahead, codes);
            for (int part = 0; part < PARTS; part++) {
                const int64_t at = span * c.rows * SPAN + part * I::PART + piece * I::BYTES, scale = span * PARTS + part;
                typename I::Words w;
#pragma GCC unroll 4
                for (int m = 0; m < MC; m++) {
                    if (m == 0 || fresh[m]) Table(entries[m]).lookup(codes + VECTORS * part, w);
                    add_row_products<I, 1>(w, x + m, at, scales + m, scale, sums + m);
                }
            }
        }
    }
    for (int m = 0; m < MC; m++) I::store(sums_at + m * I::LANES, sums[m]);
}

constexpr int64_t PIECE_SPANS = 4;  // spans whose codes are made at a time, at most
constexpr int64_t PIECE_ROWS = 16;  // rows of x one of whose spans, or fewer with more spans, stay in the first-level cache

// Spans first ... last - 1 of one output row as codes at precision P, 64 columns after 64 of a piece; bits above P are left over.
template <class I, int P>
void store_codes(const Header *h, int64_t n, int64_t first, int64_t last, int64_t ahead, uint8_t *out) {
    const uint8_t *plane = plane_at(h, 0, n);
    for (int64_t span = first; span < last; span++) {
        for (int piece = 0; piece < 64 / I::BYTES; piece++, out += 8 * I::BYTES) {
            typename I::V planes[P], codes[8];
            for (int b = 0; b < P; b++) {
                const uint8_t *at = plane + b * h->plane_stride + span * 64 + piece * I::BYTES;
                if (piece == 0) __builtin_prefetch(at + ahead), fetch_ahead(at + CODEBOOK_TILE * h->tile_bytes);
                planes[b] = I::load_bytes(at);
            }
            merge_codes<I, P>(planes, codes);
            for (int i = 0; i < 8; i++) I::store_bytes(out + i * I::BYTES, codes[i]);
        }
    }
}

// Where rows of x lie, by position.
template <class X>
struct Sources {
    const X *x[AB_MAX_ROWS];
    const float *scales[AB_MAX_ROWS];
};

// Parts of R output rows, whose centroids are w, for rows of x m ... m + M - 1.
template <class I, int M, int R>
inline __attribute__((always_inline)) void add_products(const Sources<typename I::X> &from, int m, int64_t place, int64_t scale,
                                                        const typename I::Words (*w)[R], float *sums_at, int64_t next) {
    typename I::F sums[M][R];
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) sums[i][r] = I::load(sums_at + r * next + (m + i) * I::LANES);
    for (int part = 0; part < I::PARTS_TOGETHER; part++) {
        const typename I::X *x[M];
        typename I::F products[M][R];
        for (int i = 0; i < M; i++) x[i] = from.x[m + i] + place + part * I::PART;
        dots_of<I, M, R>(w[part], x, products);
        for (int i = 0; i < M; i++)
            for (int r = 0; r < R; r++) sums[i][r] = I::fma(products[i][r], I::set1(from.scales[m + i][scale + part]), sums[i][r]);
    }
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) I::store(sums_at + r * next + (m + i) * I::LANES, sums[i][r]);
}

// One segment at precision P with the codes of R output rows at precision P + shift, [R][SPAN * (last - first)]: a code is the
// first bits of a longer one. What is looked up stays in registers for all rows of x, and what is read of x serves R output rows.
template <class I, int P, int R>
void codebook_products(const Call &c, const Sources<typename I::X> &from, const Segment &s, int64_t n, int64_t first, int64_t last, int shift,
                       const uint8_t *codes, float *sums_at) {
    using Table = typename I::template Table<P>;
    constexpr int TOGETHER = I::PARTS_TOGETHER, PARTS = SPAN / I::PART, VECTORS = 8 / PARTS;
    const Table tables[] = {Table(centroids_at(c.weight, P, n)), Table(centroids_at(c.weight, P, n + R - 1))};
    const int64_t next = c.rows * I::LANES, bytes = (last - first) * SPAN;
    const int begin = s.first, end = s.first + s.count;
    for (int64_t span = first; span < last; span++)
        for (int piece = 0; piece < 64 / I::BYTES; piece++)
            for (int part = 0; part < PARTS; part += TOGETHER, codes += VECTORS * TOGETHER * I::BYTES) {
                typename I::Words w[TOGETHER][R];
                for (int i = 0; i < TOGETHER; i++)
                    for (int r = 0; r < R; r++) {
                        typename I::V here[VECTORS];
                        for (int v = 0; v < VECTORS; v++) {
                            here[v] = I::load_bytes(codes + r * bytes + (VECTORS * i + v) * I::BYTES);
                            if (shift) here[v] = I::down(here[v], shift);
                        }
                        tables[r].lookup(here, w[i][r]);
                    }
                const int64_t place = span * c.rows * SPAN + part * I::PART + piece * I::BYTES, scale = span * PARTS + part;
                int m = begin;
                for (; m + I::ROWS_TOGETHER <= end; m += I::ROWS_TOGETHER)
                    add_products<I, I::ROWS_TOGETHER, R>(from, m, place, scale, w, sums_at, next);
                for (; m < end; m++) add_products<I, 1, R>(from, m, place, scale, w, sums_at, next);
            }
}

template <class I, int R>
void codebook_segments(const Call &c, const Sources<typename I::X> &from, int64_t n, int64_t first, int64_t last, float *sums) {
    void (*const store[])(const Header *, int64_t, int64_t, int64_t, int64_t, uint8_t *) = {
        store_codes<I, 1>, store_codes<I, 2>, store_codes<I, 3>, store_codes<I, 4>,
        store_codes<I, 5>, store_codes<I, 6>, store_codes<I, 7>, store_codes<I, 8>};
    void (*const products[])(const Call &, const Sources<typename I::X> &, const Segment &, int64_t, int64_t, int64_t, int,
                             const uint8_t *, float *) = {
        codebook_products<I, 1, R>, codebook_products<I, 2, R>, codebook_products<I, 3, R>, codebook_products<I, 4, R>,
        codebook_products<I, 5, R>, codebook_products<I, 6, R>, codebook_products<I, 7, R>, codebook_products<I, 8, R>};
    alignas(64) uint8_t codes[R * PIECE_SPANS * SPAN];
    const int highest = c.segments[0].precision;
    for (int r = 0; r < R; r++)
        store[highest - 1](c.weight, n + r, first, last, R * c.weight->tile_bytes, codes + r * (last - first) * SPAN);
    for (int i = 0; i < c.segment_count; i++) {
        const Segment &s = c.segments[i];
        products[s.precision - 1](c, from, s, n, first, last, highest - s.precision, codes, sums);
    }
}

// All rows of x over a tile of output rows; `sums` holds LANES partial sums for each output row and position.
template <class I>
void codebook_rows(const Call &c, int64_t n, int64_t count, float *sums) {
    const Header *h = c.weight;
    const int64_t wanted = PIECE_ROWS / c.rows, at_once = wanted < 1 ? 1 : wanted < PIECE_SPANS ? wanted : PIECE_SPANS;
    constexpr int R = I::OUTPUTS_TOGETHER;
    Sources<typename I::X> from;
    for (int p = 0; p < c.rows; p++) {
        from.x[p] = activations_of<I>(c, c.order[p]);
        from.scales[p] = c.scales + c.order[p] * c.scale_stride;
    }
    for (int64_t span = 0; span < h->spans; span += at_once) {
        const int64_t end = span + at_once < h->spans ? span + at_once : h->spans;
        for (int64_t r = 0; r < count;) {
            float *at = sums + r * c.rows * I::LANES;
            if (r + R <= count)
                codebook_segments<I, R>(c, from, n + r, span, end, at), r += R;
            else
                codebook_segments<I, 1>(c, from, n + r, span, end, at), r += 1;
        }
    }
}

constexpr int64_t FIRST_LEVEL = 32 << 10;  // bytes of activations up to which planes are read in one go

// Up to four rows of x at a time: what is looked up stays in registers, and is looked up again for the next four. Planes are read
// in one go unless x is too long for the first-level cache.
template <class I, int P>
void codebook_few_rows(const Call &c, const int *precisions, int position, int taken, int64_t n, int64_t count, int64_t first,
                       int64_t last, int64_t ahead, float *sums) {
    void (*const row[])(const Call &, const int *, int64_t, int64_t, int64_t, int64_t, float *) = {
        codebook_row<I, P, 1>, codebook_row<I, P, 2>, codebook_row<I, P, 3>, codebook_row<I, P, FEW_ROWS>};
    void (*const mixed_row[])(const Call &, const int *, const int *, int64_t, int64_t, int64_t, int64_t, float *) = {
        nullptr, codebook_mixed_row<I, P, 2>, codebook_mixed_row<I, P, 3>, codebook_mixed_row<I, P, FEW_ROWS>};
    const int *rows = c.order + position;
    const bool mixed = precisions[taken - 1] != P;
    for (int64_t r = 0; r < count; r++) {
        float *at = sums + (r * c.rows + position) * I::LANES;
        if (mixed)
            mixed_row[taken - 1](c, rows, precisions, n + r, first, last, ahead, at);
        else
            row[taken - 1](c, rows, n + r, first, last, ahead, at);
    }
}

template <class I>
void codebook_by_fours(const Call &c, int64_t n, int64_t count, float *sums) {
    void (*const few_rows[])(const Call &, const int *, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, float *) = {
        codebook_few_rows<I, 1>, codebook_few_rows<I, 2>, codebook_few_rows<I, 3>, codebook_few_rows<I, 4>,
        codebook_few_rows<I, 5>, codebook_few_rows<I, 6>, codebook_few_rows<I, 7>, codebook_few_rows<I, 8>};
    int precisions[AB_MAX_ROWS];
    for (int i = 0; i < c.segment_count; i++)
        for (int m = 0; m < c.segments[i].count; m++) precisions[c.segments[i].first + m] = c.segments[i].precision;
    const int64_t spans = c.weight->spans, x_bytes = c.rows * spans * SPAN * static_cast<int64_t>(sizeof(typename I::X));
    const int64_t at_once = x_bytes <= FIRST_LEVEL ? spans : PIECE_SPANS;
    const int64_t ahead = at_once == spans ? STREAM_AHEAD : CODEBOOK_TILE * c.weight->tile_bytes;
    for (int64_t span = 0; span < spans; span += at_once) {
        const int64_t end = span + at_once < spans ? span + at_once : spans;
        for (int position = 0, taken; position < c.rows; position += taken) {
            taken = c.rows - position < FEW_ROWS ? c.rows - position : FEW_ROWS;
            few_rows[precisions[position] - 1](c, precisions + position, position, taken, n, count, span, end, ahead, sums);
        }
    }
}

// Whether storing codes costs less than looking them up again for every four rows of x: measured on Zen 4, docs/kernels.md.
template <class I>
inline bool shares_codes(const Call &c) {
    if (c.segment_count > 1) return c.rows >= 24;
    return c.rows >= (c.form == BYTES ? 8 : I::CODES_ROWS) || (c.rows > 4 && c.segments[0].precision >= 5);
}

// The totals of the partial sums of `count` output rows, `stride` floats apart.
template <class I>
inline void tile_totals(const float *sums, int64_t stride, int64_t count, float *out) {
    if constexpr (I::OWN_TOTALS)
        if (count == CODEBOOK_TILE) return I::totals(sums, stride, out);
    for (int64_t r = 0; r < count; r++) out[r] = I::total(I::load(sums + r * stride));
}

// Tiles are 16 output rows here: enough to write results in whole cache lines.
template <class I>
void codebook_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    const int64_t n = c.weight->shape.out_features;
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t row = tile * CODEBOOK_TILE, count = n - row < CODEBOOK_TILE ? n - row : CODEBOOK_TILE;
        memset(scratch, 0, static_cast<size_t>(count * c.rows * I::LANES) * sizeof(float));
        if (shares_codes<I>(c))
            codebook_rows<I>(c, row, count, scratch);
        else
            codebook_by_fours<I>(c, row, count, scratch);
        for (int i = 0; i < c.segment_count; i++) {
            const Segment &s = c.segments[i];
            for (int p = s.first; p < s.first + s.count; p++) {
                float values[CODEBOOK_TILE];
                tile_totals<I>(scratch + p * I::LANES, c.rows * I::LANES, count, values);
                const float bias = I::BIAS != 0 ? c.sums[c.order[p] * c.scale_stride] : 0;
                for (int64_t r = 0; r < count; r++)
                    values[r] = (values[r] - bias) * (row_scales(c.weight, s.precision)[row + r] * I::CENTROID);
                store_rows<I>(c, c.order[p], row, values, count);
            }
        }
    }
}

}  // namespace
