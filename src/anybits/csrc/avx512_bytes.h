// Activations in 8 bits, where the caller asks for speed: products of bytes, 64 an instruction (docs/kernels.md).
// vpdpbusd multiplies unsigned by signed, so levels carry a bias that leaves with the sum of the activations.
#pragma once

#include "levels.h"

namespace {

constexpr int BYTE_BIAS = 128;

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

struct Avx512Bytes : ByteIntegers<Avx512> {
    static constexpr int PARTS_TOGETHER = 2, ROWS_TOGETHER = 1;
    static constexpr int BIAS = BYTE_BIAS;

    static void reorder(const int16_t *q, int8_t *out) {
        for (int i = 0; i < 2; i++)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 32 * i), _mm512_cvtepi16_epi8(_mm512_loadu_si512(q + 32 * i)));
    }

    struct Words { V w[4]; };

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

    static V add_products(V sum, V centroids, V x) { return _mm512_dpbusd_epi32(sum, centroids, x); }
    template <int M, int R>
    static inline __attribute__((always_inline)) void dots(const Words *w, const int8_t *const *x, F (*out)[R]) {
        Avx512::dots<M, R, Avx512Bytes>(w, x, out);
    }
};

// ---- several rows of x: levels.h with bytes

// Activations of one row: [block][row of x][column], a step's columns in LEVEL_ORDER, and for each block minus BYTE_BIAS
// times their sum.
struct ByteActivations {
    struct Piece { static constexpr int BLOCKS = 1; };
    int8_t *x;
    int32_t *biases;
    LevelPieces<Piece> blocks;
    int64_t rows;
    explicit ByteActivations(const Call &c) : x(reinterpret_cast<int8_t *>(c.tables)), blocks(c.weight), rows(c.rows) {
        biases = reinterpret_cast<int32_t *>(c.tables + blocks.count * rows * blocks.columns);
    }
    int8_t *at(int64_t block, int row) const { return x + (block * rows + row) * blocks.columns; }
    int32_t *bias(int64_t block, int row) const { return biases + block * rows + row; }
};

inline void byte_activations(const Call &c, int row, float *floats) {
    const Header *h = c.weight;
    const ByteActivations to(c);
    const bool codebook = h->shape.levels == AB_CODEBOOK;
    const int64_t padded = codebook ? h->spans * SPAN : h->steps * STEP;
    load_x<Avx512>(c, row, floats, padded);
    for (int64_t span = 0; codebook && span < h->spans; span++) {
        float natural[SPAN];
        memcpy(natural, floats + span * SPAN, sizeof natural);
        order_span(natural, floats + span * SPAN);
    }
    const __m256i order = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codebook ? NATURAL_ORDER : LEVEL_ORDER));
    for (int64_t block = 0; block < to.blocks.count; block++) {
        const int64_t first = block * to.blocks.columns;
        const int64_t last = first + to.blocks.columns < padded ? first + to.blocks.columns : padded;
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

constexpr int rest_of(int planes) { return planes > 4 ? planes - 4 : 0; }

struct ByteLevels {
    using Tables = BlockTables;
    static constexpr int ROWS = 8, TILES = 2, BLOCKS = ByteActivations::Piece::BLOCKS, PLANES = BYTE_PLANES, COLUMNS = 4;

    using CentroidSegment = void (*)(const Call &, const Segment &, int64_t, int, float *);
    static CentroidSegment long_codes(int) { return nullptr; }
    static constexpr auto *store_tiles = ::store_tiles<Avx512>;

    template <int P, int DTYPE>
    static void fill(const Header *h, int64_t tile, int64_t block, Tables *out) {
        constexpr int REST = rest_of(P);
        const int64_t level_bytes = 16 * level_size(DTYPE);
        const uint8_t *level = affine_block_levels(h, P, tile, block);
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

    template <int P>
    static void fill_centroids(const Header *h, int64_t n, int64_t count, Tables *out) {
        alignas(64) uint8_t bytes[4][64] = {{0}};
        alignas(64) float units[16] = {0};
        for (int64_t r = 0; r < count; r++) {
            const int16_t *centroids = centroids_at(h, P, n + r);
            for (int group = 0; group < (P <= 2 ? 1 : 1 << (P - 2)); group++)
                for (int entry = 0; entry < 4; entry++) {
                    const int small = Avx512Bytes::shrunk(centroids[code_of<P>(group, entry)]);
                    bytes[group][4 * r + entry] = static_cast<uint8_t>(small + BYTE_BIAS);
                }
            units[r] = row_scales(h, P)[n + r] * Avx512Bytes::CENTROID;
        }
        for (int group = 0; group < 4; group++) out->levels[group] = _mm512_load_si512(bytes[group]);
        out->unit = _mm512_load_ps(units), out->offset = _mm512_setzero_ps();
    }

    template <int P>
    static inline __attribute__((always_inline)) void store(const Tables &tables, const __m512i *words, int bit, uint8_t *out) {
        constexpr int REST = rest_of(P);
        __m512i v = find_levels<P - REST>(tables.levels, level_places<P - REST>(words, bit));
        if constexpr (REST) v = _mm512_add_epi8(v, find_levels<REST>(tables.levels + 4, level_places<REST>(words + 4, bit)));
        _mm512_store_si512(out, v);
    }

    // For rows of x `from` ... `from + M - 1` of a segment and T tiles; y is [tile][position][16].
    template <int M, int T>
    static inline __attribute__((always_inline)) void products(const Call &c, int64_t block, int from, int64_t count,
                                                               const uint8_t *levels, const Tables *tables, float *y) {
        const ByteActivations a(c);
        const int8_t *x[M];
        __m512i sums[M][T];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const int row = c.order[from + m];
            x[m] = a.at(block, row);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sums[m][t] = _mm512_set1_epi32(*a.bias(block, row));
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; i++) {
            __m512i w[T];
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) w[t] = _mm512_load_si512(levels + t * LEVEL_PIECE<ByteLevels> + 64 * i);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, x[m] + 4 * i, 4);
                const __m512i v = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) sums[m][t] = _mm512_dpbusd_epi32(sums[m][t], w[t], v);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const int row = c.order[from + m];
            const __m512 scale = _mm512_set1_ps(c.scales[row * c.scale_stride + block]);
            const __m512 sum = _mm512_set1_ps(c.sums[row * c.scale_stride + block]);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                float *at = y + (t * c.rows + from + m) * 16;
                const __m512 before = _mm512_fmadd_ps(tables[t].offset, sum, _mm512_loadu_ps(at));
                _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m][t]), _mm512_mul_ps(tables[t].unit, scale), before));
            }
        }
    }
};

// For levels_pay.
constexpr int BYTE_LEVELS_ROWS[] = {0, 64, 32, 14, 12, 10, 8}, BYTE_CENTROIDS_ROWS[] = {0, 9, 9, 12, 16};

struct Avx512Instance {
    using Exact = Instance<Avx512>;
    static Form form(const Call &c) {
        const bool codebook = c.weight->shape.levels == AB_CODEBOOK;
        if (!c.eight_bits) return EXACT;
        if (codebook ? levels_pay(c, BYTE_CENTROIDS_ROWS, CENTROID_PLANES) : levels_pay(c, BYTE_LEVELS_ROWS, BYTE_PLANES)) return BYTE_LEVELS;
        return codebook && c.segments[0].precision <= BYTE_PLANES ? BYTES : Exact::form(c);
    }
    static void activations(const Call &c, int row, float *floats) {
        switch (c.form) {
            case BYTES: return codebook_activations<Avx512Bytes>(c, row, floats);
            case BYTE_LEVELS: return byte_activations(c, row, floats);
            default: Exact::activations(c, row, floats);
        }
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        switch (c.form) {
            case BYTES: return codebook_multiply<Avx512Bytes>(c, first, last, scratch);
            case BYTE_LEVELS: return multiply_levels<ByteLevels>(c, first, last, scratch);
            default: Exact::multiply(c, first, last, scratch);
        }
    }
    static constexpr Kernels kernels = {Avx512::TILE, Avx512::ROW_WORDS, form, activations, multiply, dequantize_rows<Avx512>, nullptr};
};

}  // namespace
