// 8-bit activations and many rows of x on AVX2: a block of a tile becomes a matrix of levels of a byte in the first cache, once for
// all rows of x, and is multiplied there. Affine levels come as in word_levels.h; a codebook's planes lie row after row already.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits with saturation. Levels are the unsigned factor, at
// most LEVEL_MOST, and the scale of the activations keeps two neighbours' magnitudes below PAIR_LIMIT, so nothing saturates. A lane
// meets eight such sums in a block: without their last three bits these fit into 16 bits as well, and an addition of 32-bit numbers
// is needed once a block. What is cut off is 3.5 on average where a level is odd, as the least and the largest are, and is added.
#pragma once

#include "avx2.h"

namespace {

constexpr float LEVEL_CENTRE = 100.0f, LEVEL_REACH = 99.0f;  // the level in the middle, and what is on either side
constexpr int LEVEL_MOST = 200;  // parts of a level are rounded each
constexpr int PAIR_MOST = 163;
constexpr float PAIR_LIMIT = 162.0f, BYTE_LIMIT = 127.0f;  // of activations before they are rounded
constexpr int CUT_BITS = 3;
constexpr float CUT_MEAN = 3.3f;  // 3.5 but for two neighbours of even levels
constexpr int BYTE_VECTORS = TABLE_COLUMNS / 16;  // vectors of two rows' levels
constexpr int BYTE_LEVEL_PLANES = 6, BYTE_CENTROID_PLANES = 4;
static_assert(LEVEL_MOST * PAIR_MOST < 1 << 15 && BYTE_VECTORS == 1 << CUT_BITS, "sums fit into 16 bits");

inline int64_t byte_blocks(const Header *h) { return h->shape.levels == AB_AFFINE ? h->blocks : h->spans * (SPAN / TABLE_COLUMNS); }

// Activations: [block][row of x][TABLE_COLUMNS], in the order in which levels come; then what is added to a row's sums of a block.
inline int8_t *byte_activations_at(const Call &c, int64_t block, int row) {
    return reinterpret_cast<int8_t *>(c.tables) + (block * c.rows + row) * TABLE_COLUMNS;
}

inline float *byte_additions(const Call &c) {
    return reinterpret_cast<float *>(c.tables + byte_blocks(c.weight) * c.rows * TABLE_COLUMNS);
}

// The largest sum of magnitudes of two columns that one 16-bit sum has: those DISTANCE apart.
template <int DISTANCE>
inline float peak_of_pairs(const float *x) {
    uint32_t peak = 0;
    for (int from = 0; from < TABLE_COLUMNS; from += 2 * DISTANCE)
        for (int i = from; i < from + DISTANCE; i++) {
            const uint32_t size = bits_of_float(__builtin_fabsf(x[i]) + __builtin_fabsf(x[i + DISTANCE]));
            peak = size > peak ? size : peak;
        }
    return float_of_bits(peak);
}

inline void byte_activations(const Call &c, int row, float *floats) {
    const Header *h = c.weight;
    const bool affine = h->shape.levels == AB_AFFINE;
    const int64_t blocks = byte_blocks(h);
    constexpr int64_t PARTS = SPAN / TABLE_COLUMNS;
    load_x<Avx2>(c, row, floats, blocks * TABLE_COLUMNS);
    for (int64_t block = 0; block < blocks; block++) {
        float x[TABLE_COLUMNS], sums[8] = {0}, sum = 0;
        if (affine)
            memcpy(x, floats + block * TABLE_COLUMNS, sizeof x);
        else  // levels come bit by bit of 16 bytes of a plane
            for (int bit = 0; bit < 8; bit++) memcpy(x + 16 * bit, floats + block / PARTS * SPAN + block % PARTS * 16 + 64 * bit, 64);
        for (int64_t i = 0; i < TABLE_COLUMNS; i += 8)
            for (int j = 0; j < 8; j++) sums[j] += x[i + j];
        for (float s : sums) sum += s;
        const float peak = peak_of(x, TABLE_COLUMNS), pair = affine ? peak_of_pairs<8>(x) : peak_of_pairs<1>(x);
        const float wanted = pair * (BYTE_LIMIT / PAIR_LIMIT);
        const Grid grid = grid_of(wanted > peak ? wanted : peak, sum, BYTE_LIMIT, false);
        int8_t q[TABLE_COLUMNS] = {0}, *out = byte_activations_at(c, block, row);
        int total = 0, pairs = 0;
        for (int i = 0; grid.inverse > 0 && i < TABLE_COLUMNS; i++)
            q[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(x[i] * grid.inverse)));
        for (int i = 0; i < TABLE_COLUMNS; i++) total += q[i];
        if (affine)
            for (int bit = 0; bit < 8; bit++)
                for (int byte = 0; byte < 16; byte++) out[16 * bit + byte] = q[8 * byte + bit];
        else
            memcpy(out, q, sizeof q);
        for (int i = 0; i < TABLE_COLUMNS; i += 2) pairs += (out[i] | out[i + 1]) != 0;
        c.scales[row * c.scale_stride + block] = grid.scale * (1 << CUT_BITS);
        c.sums[row * c.scale_stride + block] = sum;
        byte_additions(c)[row * blocks + block] = grid.scale * (CUT_MEAN * static_cast<float>(pairs) - LEVEL_CENTRE * static_cast<float>(total));
    }
}

// Levels of a block: 2 * VECTORS rows, two in a vector, VECTORS apart; what one stands for, and the value of LEVEL_CENTRE.
template <int VECTORS>
struct alignas(64) ByteLevels {
    __m256i at[VECTORS / 4][BYTE_VECTORS][4];
    float unit[2 * VECTORS], centre[2 * VECTORS];  // rows in the order of place_of

    static constexpr int row_of(int place) { return place / 8 * 4 + place % 4 + (place & 4 ? VECTORS : 0); }
};

// The sums of four vectors' two rows: first the four lower halves', then the upper ones'.
inline __m256 four_sums(const __m256i *s) {
    const __m256i one = _mm256_set1_epi16(1);
    const auto wide = [&](int i) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(s[i], one)); };
    return Avx2::add_neighbours(Avx2::add_neighbours(wide(0), wide(1)), Avx2::add_neighbours(wide(2), wide(3)));
}

// One block for M rows of x from position `from` on; y is [position][2 * VECTORS].
template <int M, int VECTORS>
void byte_products(const Call &c, int64_t block, int from, const ByteLevels<VECTORS> &levels, float *y) {
    const int8_t *x[M];
    __m256 scale[M], sum[M], addition[M];
    for (int m = 0; m < M; m++) {
        const int row = c.order[from + m];
        x[m] = byte_activations_at(c, block, row);
        scale[m] = _mm256_set1_ps(c.scales[row * c.scale_stride + block]), sum[m] = _mm256_set1_ps(c.sums[row * c.scale_stride + block]);
        addition[m] = _mm256_set1_ps(byte_additions(c)[row * byte_blocks(c.weight) + block]);
    }
    for (int g = 0; g < VECTORS / 4; g++) {
        __m256i sums[M][4];
#pragma GCC unroll 8
        for (int v = 0; v < BYTE_VECTORS; v++) {
            __m256i factors[M];
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) factors[m] = Avx2::table_at(reinterpret_cast<const uint8_t *>(x[m] + 16 * v));
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++)
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    const __m256i pairs = _mm256_srai_epi16(_mm256_maddubs_epi16(levels.at[g][v][t], factors[m]), CUT_BITS);
                    sums[m][t] = v ? _mm256_add_epi16(sums[m][t], pairs) : pairs;
                    asm("" : "+x"(sums[m][t]));  // or additions change places until sums are kept in memory
                }
        }
        const __m256 unit = _mm256_loadu_ps(levels.unit + 8 * g), centre = _mm256_loadu_ps(levels.centre + 8 * g);
        for (int m = 0; m < M; m++) {
            float *at = y + (from + m) * 2 * VECTORS + 8 * g;
            const __m256 before = _mm256_fmadd_ps(centre, sum[m], _mm256_loadu_ps(at));
            _mm256_storeu_ps(at, _mm256_fmadd_ps(unit, _mm256_fmadd_ps(four_sums(sums[m]), scale[m], addition[m]), before));
        }
    }
}

template <int VECTORS>
void byte_rows(const Call &c, const Segment &s, int64_t block, const ByteLevels<VECTORS> &levels, float *y) {
    int done = 0;
    for (; done + 2 <= s.count; done += 2) byte_products<2, VECTORS>(c, block, s.first + done, levels, y);
    for (; done < s.count; done++) byte_products<1, VECTORS>(c, block, s.first + done, levels, y);
}

// ---- affine levels

using AffineBytes = ByteLevels<ROW_VECTORS>;

// Signed sums of COUNT planes' scales, the least of which becomes `first`; plane b decides on bit COUNT - 1 - b of an entry. Fewer than 16 are repeated.
template <int COUNT>
inline void fill_byte_entries(const float (*scales)[Avx2::TILE], float first, __m256i *out) {
    constexpr int ENTRIES = 1 << COUNT;
    for (int half = 0; half < 2; half++) {
        __m256 v[ENTRIES][2];
        for (int f = 0; f < 2; f++) {
            __m256 least = _mm256_set1_ps(first);
            for (int b = 0; b < COUNT; b++) {
                const __m256 scale = _mm256_loadu_ps(scales[b] + 16 * half + 8 * f);
                least = _mm256_add_ps(least, _mm256_sub_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), scale), scale));
            }
            v[0][f] = least;
            for (int bit = 0; bit < COUNT; bit++) {
                const __m256 scale = _mm256_loadu_ps(scales[COUNT - 1 - bit] + 16 * half + 8 * f), twice = _mm256_add_ps(scale, scale);
                for (int e = 1 << bit; e < 2 << bit; e++) v[e][f] = _mm256_add_ps(v[e - (1 << bit)][f], twice);
            }
        }
        for (int e = 0; e < ENTRIES; e++) {
            const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v[e][0]), _mm256_cvtps_epi32(v[e][1]));
            const __m256i order = _mm256_permute4x64_epi64(words, 0xD8);
            const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1));
            out[e] = half ? _mm256_inserti128_si256(out[e], bytes, 1) : _mm256_castsi128_si256(bytes);
        }
    }
    for (int e = ENTRIES; e < ROW_VECTORS; e++) out[e] = out[e - ENTRIES];
    transpose_bytes<Avx2>(out);
}

template <int P, int DTYPE>
void affine_bytes(const Header *h, int64_t tile, int64_t block, AffineBytes *to) {
    constexpr int TILE = Avx2::TILE, FIRST = P < TABLE_PLANES ? P : TABLE_PLANES, REST = P - FIRST;
    alignas(64) float scales[P + 1][TILE], units[TILE];
    __m256i tables[ROW_VECTORS], others[ROW_VECTORS], rows[P][ROW_VECTORS];
    block_scales<Avx2, P, DTYPE>(h, tile, block, LEVEL_REACH, scales, units);
    for (int i = 0; i < TILE; i++) {
        to->unit[i] = units[to->row_of(i)];
        to->centre[i] = h->shape.has_offsets ? scales[P][to->row_of(i)] : 0;
    }
    fill_byte_entries<FIRST>(scales, LEVEL_CENTRE - LEVEL_REACH, tables);
    if constexpr (REST > 0) fill_byte_entries<REST>(scales + FIRST, 0, others);
    block_planes<Avx2, P>(h, tile, block, rows);
    for (int q = 0; q < ROW_VECTORS; q++) {
        __m256i planes[P], codes[8], rest[8];
        for (int b = 0; b < P; b++) planes[b] = rows[b][q];
        merge_codes<Avx2, FIRST>(planes, codes);
        if constexpr (REST > 0) merge_codes<Avx2, REST>(planes + FIRST, rest);
#pragma GCC unroll 8
        for (int v = 0; v < BYTE_VECTORS; v++) {
            __m256i level = Avx2::find(tables[q], codes[v]);
            if constexpr (REST > 0) level = _mm256_add_epi8(level, Avx2::find(others[q], rest[v]));
            to->at[q / 4][v][q % 4] = level;
        }
    }
}

template <int DTYPE>
void affine_bytes_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*const levels_of[BYTE_LEVEL_PLANES + 1])(const Header *, int64_t, int64_t, AffineBytes *) = {
        nullptr, affine_bytes<1, DTYPE>, affine_bytes<2, DTYPE>, affine_bytes<3, DTYPE>,
        affine_bytes<4, DTYPE>, affine_bytes<5, DTYPE>, affine_bytes<6, DTYPE>};
    AffineBytes levels;
    for (int64_t tile = first; tile < last; tile++) {
        memset(scratch, 0, static_cast<size_t>(c.rows * Avx2::TILE) * sizeof(float));
        for (int64_t block = 0; block < c.weight->blocks; block++)
            for (int i = 0; i < c.segment_count; i++) {
                levels_of[c.segments[i].precision](c.weight, tile, block, &levels);
                byte_rows(c, c.segments[i], block, levels, scratch);
            }
        store_places<Avx2>(c, tile, scratch);
    }
}

// ---- codebooks

using CentroidBytes = ByteLevels<CODEBOOK_TILE / 2>;

// What the centroids of a tile's rows become: bytes of two rows, CODEBOOK_TILE / 2 apart.
struct CentroidTables {
    __m256i at[CODEBOOK_TILE / 2];
    float unit[CODEBOOK_TILE], centre[CODEBOOK_TILE];
};

inline void fill_centroid_bytes(const Header *h, int precision, int64_t row, int64_t count, CentroidTables *to) {
    alignas(32) uint8_t bytes[CODEBOOK_TILE / 2][2][16];
    float units[CODEBOOK_TILE], centres[CODEBOOK_TILE];
    for (int64_t r = 0; r < CODEBOOK_TILE; r++) {
        const int64_t n = row + (r < count ? r : count - 1);
        const int16_t *centroids = centroids_at(h, precision, n);
        int least = centroids[0], most = centroids[0];
        for (int i = 1; i < 1 << precision; i++) {
            least = centroids[i] < least ? centroids[i] : least;
            most = centroids[i] > most ? centroids[i] : most;
        }
        const float range = static_cast<float>(most - least), inverse = most > least ? 2 * LEVEL_REACH / range : 0;
        for (int i = 0; i < 16; i++) {
            const float above = static_cast<float>(centroids[i & ((1 << precision) - 1)] - least) * inverse;
            bytes[r % 8][r / 8][i] = static_cast<uint8_t>(above + (LEVEL_CENTRE - LEVEL_REACH + 0.5f));
        }
        const float scale = row_scales(h, precision)[n];
        units[r] = scale * range * (0.5f / LEVEL_REACH);
        centres[r] = scale * 0.5f * static_cast<float>(most + least);
    }
    for (int q = 0; q < CODEBOOK_TILE / 2; q++) to->at[q] = _mm256_load_si256(reinterpret_cast<const __m256i *>(bytes[q]));
    for (int i = 0; i < CODEBOOK_TILE; i++) {
        to->unit[i] = units[CentroidBytes::row_of(i)];
        to->centre[i] = centres[CentroidBytes::row_of(i)];
    }
}

// 128 columns of a tile: bytes 16 * part to 16 * part + 15 of a span.
template <int P>
void centroid_bytes(const Header *h, const CentroidTables &tables, int64_t row, int64_t count, int64_t span, int part, CentroidBytes *to) {
    // The next span, or the first of the next rows.
    const int64_t ahead = span + 1 < h->spans ? 64 : CODEBOOK_TILE * h->tile_bytes - span * 64;
    memcpy(to->unit, tables.unit, sizeof to->unit), memcpy(to->centre, tables.centre, sizeof to->centre);
    for (int q = 0; q < CODEBOOK_TILE / 2; q++) {
        __m256i planes[P], codes[8];
        const int64_t low = q < count ? q : count - 1, high = q + 8 < count ? q + 8 : count - 1;
        for (int b = 0; b < P; b++) {
            const uint8_t *at = plane_at(h, b, row) + span * 64 + part * 16;
            const uint8_t *rows[2] = {at + low * h->tile_bytes, at + high * h->tile_bytes};
            if (part == 0) fetch_ahead(rows[0] + ahead), fetch_ahead(rows[1] + ahead);
            planes[b] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i *>(rows[1]), reinterpret_cast<const __m128i *>(rows[0]));
        }
        merge_codes<Avx2, P>(planes, codes);
#pragma GCC unroll 8
        for (int v = 0; v < BYTE_VECTORS; v++) to->at[q / 4][v][q % 4] = Avx2::find(tables.at[q], codes[v]);
    }
}

inline void codebook_bytes_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*const levels_of[BYTE_CENTROID_PLANES + 1])(const Header *, const CentroidTables &, int64_t, int64_t, int64_t, int, CentroidBytes *) = {
        nullptr, centroid_bytes<1>, centroid_bytes<2>, centroid_bytes<3>, centroid_bytes<4>};
    const Header *h = c.weight;
    constexpr int PARTS = SPAN / TABLE_COLUMNS;
    CentroidTables tables[BYTE_CENTROID_PLANES];
    CentroidBytes levels;
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t row = tile * CODEBOOK_TILE, left = h->shape.out_features - row, count = left < CODEBOOK_TILE ? left : CODEBOOK_TILE;
        memset(scratch, 0, static_cast<size_t>(c.rows * CODEBOOK_TILE) * sizeof(float));
        for (int i = 0; i < c.segment_count; i++) fill_centroid_bytes(h, c.segments[i].precision, row, count, tables + i);
        for (int64_t span = 0; span < h->spans; span++)
            for (int part = 0; part < PARTS; part++)
                for (int i = 0; i < c.segment_count; i++) {
                    levels_of[c.segments[i].precision](h, tables[i], row, count, span, part, &levels);
                    byte_rows(c, c.segments[i], span * PARTS + part, levels, scratch);
                }
        for (int p = 0; p < c.rows; p++) {
            float values[CODEBOOK_TILE];
            for (int i = 0; i < CODEBOOK_TILE; i++) values[CentroidBytes::row_of(i)] = scratch[p * CODEBOOK_TILE + i];
            store_rows<Avx2>(c, c.order[p], row, values, count);
        }
    }
}

// ---- both

// Rows of x from which levels cost less than tables of sums or byte centroids, by the highest precision. Up to seven a row's result
// does not depend on its batch.
constexpr int BYTE_LEVEL_ROWS = 8;

inline bool byte_levels_pay(const Call &c) {
    const Header *h = c.weight;
    const bool affine = h->shape.levels == AB_AFFINE;
    if (!c.eight_bits || c.segments[0].precision > (affine ? BYTE_LEVEL_PLANES : BYTE_CENTROID_PLANES)) return false;
    return c.rows >= BYTE_LEVEL_ROWS * c.segment_count && (!affine || h->block_columns == TABLE_COLUMNS);
}

inline void byte_levels_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    if (c.weight->shape.levels == AB_CODEBOOK) return codebook_bytes_multiply(c, first, last, scratch);
    with_level_dtype(c.weight, [&](auto dtype) { affine_bytes_multiply<dtype()>(c, first, last, scratch); });
}

}  // namespace
