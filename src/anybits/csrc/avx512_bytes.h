// Activations in 8 bits, where the caller asks for speed: products of bytes, 64 an instruction (docs/kernels.md).
// vpdpbusd multiplies unsigned by signed, so levels carry a bias that leaves with the sum of the activations.
#pragma once

#include "avx512.h"

namespace {

constexpr int BYTE_BIAS = 128;
constexpr int BYTE_PLANES = 6;  // more planes say more than 8 bits of a level keep

// ---- codebooks: the kernels of codebook.h with centroids and activations of 8 bits

// Lane L of a table of 2^P entries, repeated.
struct Repeated {
    alignas(64) uint8_t at[6][64] = {};
    constexpr Repeated() {
        for (int p = 0; p < 6; p++)
            for (int lane = 0; lane < 64; lane++) at[p][lane] = static_cast<uint8_t>(lane & ((1 << p) - 1));
    }
};
constexpr Repeated REPEATED;

struct Avx512Bytes : Avx512 {
    using X = int8_t;
    static constexpr int64_t PART = 256;
    static constexpr float X_LIMIT = 127.0f;
    static constexpr int16_t SHRINK = 254;  // 14-bit centroids become 8-bit ones: times SHRINK / 32768
    static constexpr float CENTROID = 32768.0f / SHRINK;
    static constexpr int BIAS = BYTE_BIAS;

    static void reorder(const int16_t *q, int8_t *out) {
        for (int i = 0; i < 2; i++)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 32 * i), _mm512_cvtepi16_epi8(_mm512_loadu_si512(q + 32 * i)));
    }

    // A table shorter than 64 entries is repeated, so leftover index bits do not matter.
    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 6 ? 1 : 1 << (P - 6);
        V t[COUNT];
        explicit Table(const int16_t *c) {
            if constexpr (P < 6) {
                const V some = _mm512_castsi256_si512(narrowed(P < 5 ? (1u << (1 << P & 31)) - 1 : ~0u, c));
                t[0] = _mm512_permutexvar_epi8(_mm512_load_si512(REPEATED.at[P]), some);
            } else {
                for (int i = 0; i < COUNT; i++)
                    t[i] = _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(~0u, c + 64 * i)), narrowed(~0u, c + 64 * i + 32), 1);
            }
        }
        static __m256i narrowed(__mmask32 which, const int16_t *c) {
            const V small = _mm512_mulhrs_epi16(_mm512_maskz_loadu_epi16(which, c), _mm512_set1_epi16(SHRINK));
            return _mm512_cvtepi16_epi8(_mm512_xor_si512(small, _mm512_set1_epi16(BYTE_BIAS)));
        }
        V find(V code) const {
            if constexpr (P <= 6) {
                return _mm512_permutexvar_epi8(code, t[0]);
            } else {
                const V low = _mm512_permutex2var_epi8(t[0], code, t[1]);
                if constexpr (P == 7) {
                    return low;
                } else {
                    const V high = _mm512_permutex2var_epi8(t[2], code, t[3]);
                    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
                }
            }
        }
        void lookup(const V *codes, Words &out) const {
            for (int i = 0; i < 4; i++) out.w[i] = find(codes[i]);
        }
    };

    static void two_dots(const Words &a, const Words &b, const int8_t *x, F *out) {
        V first = _mm512_setzero_si512(), second = first;
        for (int i = 0; i < 4; i++) {
            V v = _mm512_loadu_si512(x + 64 * i);
            asm("" : "+v"(v));  // or each product loads it again
            first = _mm512_dpbusd_epi32(first, a.w[i], v), second = _mm512_dpbusd_epi32(second, b.w[i], v);
        }
        out[0] = _mm512_cvtepi32_ps(first), out[1] = _mm512_cvtepi32_ps(second);
    }

    static F dot(const Words &w, const int8_t *x) {
        V sum = _mm512_setzero_si512();
        for (int i = 0; i < 4; i++) sum = _mm512_dpbusd_epi32(sum, w.w[i], _mm512_loadu_si512(x + 64 * i));
        return _mm512_cvtepi32_ps(sum);
    }
};

// ---- affine levels, several rows of x: a block of two tiles becomes bytes, [4 columns][16 rows][4], for all rows of x

constexpr int BYTE_ROWS = 8;                        // rows of x that go through a block together
constexpr int64_t BLOCK_BYTES = 16 * TABLE_COLUMNS;  // levels of one block of one tile

// Activations of one row: [block][row of x][column], a step's columns in the order in which its levels come (bit i of each
// byte of a word, then bit i + 1), and for each block minus BYTE_BIAS times their sum.
struct ByteActivations {
    int8_t *x;
    int32_t *biases;
    int64_t block_columns, rows;
    explicit ByteActivations(const Call &c)
        : x(reinterpret_cast<int8_t *>(c.tables)), block_columns(c.weight->block_columns), rows(c.rows) {
        biases = reinterpret_cast<int32_t *>(c.tables + c.weight->blocks * rows * block_columns);
    }
    int8_t *at(int64_t block, int row) const { return x + (block * rows + row) * block_columns; }
    int32_t *bias(int64_t block, int row) const { return biases + block * rows + row; }
};

inline void byte_activations(const Call &c, int row, float *floats) {
    const Header *h = c.weight;
    const int64_t padded = h->steps * STEP;
    const ByteActivations to(c);
    load_x<Avx512>(c, row, floats, padded);
    alignas(32) static constexpr uint8_t ORDER[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                                      4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i *>(ORDER));
    for (int64_t block = 0; block < h->blocks; block++) {
        const int64_t first = block * h->block_columns;
        const int64_t last = first + h->block_columns < padded ? first + h->block_columns : padded;
        __m512 sums = _mm512_setzero_ps();
        for (int64_t k = first; k < last; k += 16) sums = _mm512_add_ps(sums, _mm512_loadu_ps(floats + k));
        const float sum = _mm512_reduce_add_ps(sums);
        const Grid grid = grid_of(peak_of(floats + first, last - first), sum, 127.0f, false);
        c.scales[row * c.scale_stride + block] = grid.scale;
        c.sums[row * c.scale_stride + block] = sum;
        const __mmask16 finite = grid.inverse > 0 ? 0xffff : 0;
        __m512i total = _mm512_setzero_si512();
        int8_t *out = to.at(block, row);
        for (int64_t k = first; k < last; k += STEP, out += STEP) {
            __m128i halves[2];
            for (int i = 0; i < 2; i++) {
                const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(floats + k + 16 * i), _mm512_set1_ps(grid.inverse));
                const __m512i q = _mm512_maskz_cvtps_epi32(finite, scaled);
                total = _mm512_add_epi32(total, q);
                halves[i] = _mm512_cvtepi32_epi8(q);
            }
            const __m256i natural = _mm256_set_m128i(halves[1], halves[0]);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_permutexvar_epi8(order, natural));
        }
        *to.bias(block, row) = -BYTE_BIAS * _mm512_reduce_add_epi32(total);
    }
}

// Moves bit `from` of each byte to bit `to`, and clears the others.
inline __m512i move_bit(__m512i v, int from, int to) {
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(static_cast<int64_t>(uint64_t{1} << (from + 8 * (7 - to)))), 0);
}

// What becomes of one block of one tile: tables of levels (the first four planes', then those of what is left), what a byte
// stands for, and the offsets.
struct alignas(64) BlockTables {
    __m512i levels[5];
    __m512 unit, offset;
};

// The levels of up to four planes of 16 rows as bytes. An index has two planes' bits in its bits 0 and 1, the row in bits
// 2 to 5, and two more planes' bits in bits 6 and 7.
template <int P>
inline void fill_levels(const __m512 *scales, int bias, __m512i *out) {
    constexpr int PAIR = P < 2 ? P : 2;
    for (int g = 0; g < (P <= 2 ? 1 : 1 << (P - 2)); g++) {
        __m512 outer = _mm512_set1_ps(static_cast<float>(bias));
        for (int b = 2; b < P; b++) outer = g >> (b - 2) & 1 ? _mm512_add_ps(outer, scales[b]) : _mm512_sub_ps(outer, scales[b]);
        __m512i bytes = _mm512_setzero_si512();
        for (int e = 3; e >= 0; e--) {
            __m512 value = outer;
            for (int b = 0; b < PAIR; b++) value = e >> b & 1 ? _mm512_add_ps(value, scales[b]) : _mm512_sub_ps(value, scales[b]);
            bytes = _mm512_slli_epi32(bytes, 8);  // bytes << 8 | (value & 255)
            bytes = _mm512_ternarylogic_epi32(bytes, _mm512_cvtps_epi32(value), _mm512_set1_epi32(255), 0xF8);
        }
        out[g] = bytes;
    }
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

constexpr int rest_of(int planes) { return planes > 4 ? planes - 4 : 0; }

template <int P, int DTYPE>
void fill_tables(const Header *h, int64_t tile, int64_t block, BlockTables *out) {
    constexpr int REST = rest_of(P);
    const int64_t entries = affine_entries(h->shape, P), level_bytes = 16 * level_size(DTYPE);
    const uint8_t *level = affine_levels_at(h, P, tile) + block / h->blocks_per_group * entries * level_bytes;
    const float *steps = affine_steps_at(h, P, tile);
    __m512 scales[P], peak = _mm512_setzero_ps();
    for (int b = 0; b < P; b++) {
        scales[b] = level_in_steps<Avx512, DTYPE>(level + b * level_bytes, steps + b * 16, 0);
        peak = _mm512_add_ps(peak, _mm512_abs_ps(scales[b]));
    }
    const __mmask16 some = _mm512_cmp_ps_mask(peak, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(126.0f), peak);
    for (int b = 0; b < P; b++) scales[b] = _mm512_mul_ps(scales[b], inverse);
    fill_levels<P - REST>(scales, BYTE_BIAS, out->levels);
    if constexpr (REST) fill_levels<REST>(scales + 4, 0, out->levels + 4);
    out->unit = _mm512_mul_ps(peak, _mm512_set1_ps(1.0f / 126.0f));
    out->offset = _mm512_setzero_ps();
    if (h->shape.has_offsets) out->offset = level_in_steps<Avx512, DTYPE>(level + P * level_bytes, steps + P * 16, 0);
}

// Columns of a block as bytes at precision P.
template <int P>
void expand_levels(const Header *h, int64_t tile, int64_t block, int64_t ahead, const BlockTables &tables, uint8_t *out) {
    constexpr int REST = rest_of(P);
    const int64_t block_steps = h->block_columns / STEP, first = block * block_steps;
    const int64_t steps = h->steps - first < block_steps ? h->steps - first : block_steps;
    __m512i levels[5];
    for (int i = 0; i < 5; i++) levels[i] = tables.levels[i];
    const uint8_t *plane = plane_at(h, 0, tile) + first * 64;
    for (int64_t step = 0; step < steps; step++, plane += 64) {
        __m512i words[P];
        for (int b = 0; b < P; b++) {
            fetch_ahead(plane + b * h->plane_stride + ahead);
            words[b] = _mm512_loadu_si512(plane + b * h->plane_stride);
        }
#pragma GCC unroll 8
        for (int bit = 0; bit < 8; bit++, out += 64) {
            __m512i v = find_levels<P - REST>(levels, level_places<P - REST>(words, bit));
            if constexpr (REST) v = _mm512_add_epi8(v, find_levels<REST>(levels + 4, level_places<REST>(words + 4, bit)));
            _mm512_store_si512(out, v);
        }
    }
}

// One block for rows of x `from` ... `from + M - 1` of a segment and T tiles; y is [tile][position][16].
template <int M, int T>
inline __attribute__((always_inline)) void byte_products(const Call &c, const ByteActivations &a, int64_t block, int from,
                                                         int64_t quads, const uint8_t *levels, const BlockTables *tables,
                                                         float *y) {
    const int8_t *x[M];
    __m512i sums[M][T];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const int row = c.order[from + m];
        x[m] = a.at(block, row);
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) sums[m][t] = _mm512_set1_epi32(*a.bias(block, row));
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < quads; i++) {
        __m512i w[T];
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) w[t] = _mm512_load_si512(levels + t * BLOCK_BYTES + 64 * i);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            int32_t four;
            memcpy(&four, x[m] + 4 * i, 4);
            const __m512i v = _mm512_set1_epi32(four);
    #pragma GCC unroll 2
        for (int t = 0; t < T; t++) sums[m][t] = _mm512_dpbusd_epi32(sums[m][t], w[t], v);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const int row = c.order[from + m];
        const __m512 scale = _mm512_set1_ps(c.scales[row * c.scale_stride + block]);
        const __m512 sum = _mm512_set1_ps(c.sums[row * c.scale_stride + block]);
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) {
            float *at = y + (t * c.rows + from + m) * 16;
            const __m512 before = _mm512_fmadd_ps(tables[t].offset, sum, _mm512_loadu_ps(at));
            _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m][t]), _mm512_mul_ps(tables[t].unit, scale), before));
        }
    }
}

template <int T>
void byte_rows(const Call &c, const ByteActivations &a, int64_t block, const Segment &s, int64_t quads, const uint8_t *levels,
               const BlockTables *tables, float *y) {
    for (int done = 0, taken; done < s.count; done += taken) {
        const int left = s.count - done, from = s.first + done;
        taken = left < BYTE_ROWS ? left : BYTE_ROWS;
        switch (taken) {
            case 8: byte_products<8, T>(c, a, block, from, quads, levels, tables, y); break;
            case 7: byte_products<7, T>(c, a, block, from, quads, levels, tables, y); break;
            case 6: byte_products<6, T>(c, a, block, from, quads, levels, tables, y); break;
            case 5: byte_products<5, T>(c, a, block, from, quads, levels, tables, y); break;
            case 4: byte_products<4, T>(c, a, block, from, quads, levels, tables, y); break;
            case 3: byte_products<3, T>(c, a, block, from, quads, levels, tables, y); break;
            case 2: byte_products<2, T>(c, a, block, from, quads, levels, tables, y); break;
            default: byte_products<1, T>(c, a, block, from, quads, levels, tables, y);
        }
    }
}

constexpr int64_t BLOCKS_AT_ONCE = 8;  // blocks whose tables are made together: one after the other, each would wait for its division

template <int P, int DTYPE>
void byte_segment(const Call &c, const Segment &s, int64_t tile, int tiles, int64_t first, int64_t last, float *y) {
    const Header *h = c.weight;
    const ByteActivations a(c);
    BlockTables tables[BLOCKS_AT_ONCE][2];
    alignas(64) uint8_t levels[2 * BLOCK_BYTES];
    for (int64_t block = first; block < last; block++)
        for (int t = 0; t < tiles; t++) fill_tables<P, DTYPE>(h, tile + t, block, &tables[block - first][t]);
    for (int64_t block = first; block < last; block++) {
        const int64_t left = h->steps * STEP - block * h->block_columns;
        const int64_t quads = (left < h->block_columns ? left : h->block_columns) / 4;
        const BlockTables *here = tables[block - first];
        for (int t = 0; t < tiles; t++) expand_levels<P>(h, tile + t, block, 2 * h->tile_bytes, here[t], levels + t * BLOCK_BYTES);
        if (tiles == 2)
            byte_rows<2>(c, a, block, s, quads, levels, here, y);
        else
            byte_rows<1>(c, a, block, s, quads, levels, here, y);
    }
}

// Segment after segment for some blocks of a pair of tiles; `segment` by precision.
inline void multiply_pairs(const Call &c, int64_t first, int64_t last, float *scratch,
                           void (*const *segment)(const Call &, const Segment &, int64_t, int, int64_t, int64_t, float *)) {
    const int64_t blocks = c.weight->blocks;
    for (int64_t tile = first; tile < last; tile += 2) {
        const int tiles = last - tile < 2 ? 1 : 2;
        memset(scratch, 0, static_cast<size_t>(tiles * c.rows * 16) * sizeof(float));
        for (int64_t block = 0; block < blocks; block += BLOCKS_AT_ONCE) {
            const int64_t end = block + BLOCKS_AT_ONCE < blocks ? block + BLOCKS_AT_ONCE : blocks;
            for (int i = 0; i < c.segment_count; i++)
                segment[c.segments[i].precision - 1](c, c.segments[i], tile, tiles, block, end, scratch);
        }
        store_tiles<Avx512>(c, tile, tiles, scratch);
    }
}

template <int DTYPE>
void byte_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    void (*const segment[])(const Call &, const Segment &, int64_t, int, int64_t, int64_t, float *) = {
        byte_segment<1, DTYPE>, byte_segment<2, DTYPE>, byte_segment<3, DTYPE>,
        byte_segment<4, DTYPE>, byte_segment<5, DTYPE>, byte_segment<6, DTYPE>};
    multiply_pairs(c, first, last, scratch, segment);
}

// Rows of x from which bytes of levels cost less than tables of sums, by the highest precision; levels are made for each one.
constexpr int BYTE_LEVELS_ROWS[] = {0, 64, 32, 14, 12, 10, 8};

struct Avx512Instance {
    using Exact = Instance<Avx512>;
    static Form form(const Call &c) {
        const int highest = c.segments[0].precision;
        const bool bytes = highest <= BYTE_PLANES && (c.weight->shape.levels == AB_CODEBOOK || c.rows >= BYTE_LEVELS_ROWS[highest] * c.segment_count);
        return c.eight_bits && bytes ? BYTES : Exact::form(c);
    }
    static void activations(const Call &c, int row, float *floats) {
        if (c.form != BYTES) return Exact::activations(c, row, floats);
        if (c.weight->shape.levels == AB_CODEBOOK) return codebook_activations<Avx512Bytes>(c, row, floats);
        byte_activations(c, row, floats);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.form != BYTES) return Exact::multiply(c, first, last, scratch);
        if (c.weight->shape.levels == AB_CODEBOOK) return codebook_multiply<Avx512Bytes>(c, first, last, scratch);
        switch (c.weight->shape.level_dtype) {
            case AB_F16: return byte_multiply<AB_F16>(c, first, last, scratch);
            case AB_BF16: return byte_multiply<AB_BF16>(c, first, last, scratch);
            case AB_I8: return byte_multiply<AB_I8>(c, first, last, scratch);
            default: return byte_multiply<AB_F32>(c, first, last, scratch);
        }
    }
    static constexpr Kernels kernels = {Avx512::TILE, Avx512::ROW_WORDS, form, activations, multiply, dequantize_rows<Avx512>, nullptr};
};

}  // namespace
