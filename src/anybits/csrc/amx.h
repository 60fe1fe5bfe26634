// Several rows of bf16 x at once with AMX. Activations are integers of 16 bits as two signed bytes,
// x = 256 * high + low: a tile holds the high bytes of up to eight rows of x and then their low bytes, so that one product
// of tiles serves the group. A product takes as long for one row as for eight.
#pragma once

#include "avx512_bytes.h"

namespace {

using Bytes = __m512i;
using Floats = __m512;

constexpr int TILE_BYTES = 1024, TILE_ROW = 64, TILE_INTS = 256;

// GCC's intrinsics for tiles do not say that they read memory.
inline void written() { asm volatile("" ::: "memory"); }

// The calling thread's shapes of tiles. Those that it had before, torch's maybe, come back at the end.
class TileShapes {
public:
    TileShapes() {
        asm volatile("sttilecfg %0" : "=m"(before_));
        now_.palette = 1;
    }
    ~TileShapes() {
        if (before_.palette)
            asm volatile("ldtilecfg %0" ::"m"(before_));
        else
            _tile_release();
    }
    TileShapes(const TileShapes &) = delete;
    void set(int tile, int rows, int row_bytes) {
        now_.rows[tile] = static_cast<uint8_t>(rows), now_.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    }
    void use() { asm volatile("ldtilecfg %0" ::"m"(now_)); }

private:
    struct alignas(64) Config {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    Config before_ = {}, now_ = {};
};

// 64 floats that are integers of 16 bits, as bytes.
inline void split_bytes(const float *x, float inverse, Bytes *high, Bytes *low) {
    alignas(64) uint8_t h[64], l[64];
    for (int i = 0; i < 4; i++) {
        const Bytes q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), _mm512_set1_ps(inverse)));
        const Bytes up = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        _mm_store_si128(reinterpret_cast<__m128i *>(h + 16 * i), _mm512_cvtepi32_epi8(up));
        _mm_store_si128(reinterpret_cast<__m128i *>(l + 16 * i), _mm512_cvtepi32_epi8(q));
    }
    *high = _mm512_load_si512(h), *low = _mm512_load_si512(l);
}

// ---- affine: the tile of weights holds +1 and -1 for 16 output rows and 64 columns

inline int64_t block_tiles(const Header *h) { return ceil_div(h->block_columns / STEP, 2); }

inline int64_t affine_table_bytes(const Header *h, int count) {
    return h->blocks * block_tiles(h) * 2 * count * TILE_ROW;
}

inline int64_t affine_scale_floats(const Header *h, int count) { return 2 * h->blocks * count; }  // scales, then sums

inline void affine_lane(const Call &c, const Group &group, int lane, float *floats) {
    const Header *h = c.weight;
    const int64_t padded = h->steps * STEP, tiles = block_tiles(h), tile_rows = 2 * group.count;
    load_x<Avx512>(c, c.order[group.first + lane], floats, padded);
    memset(floats + padded, 0, STEP * sizeof(float));  // the second half of the last tile
    uint8_t *out = c.tables + group.tables;
    float *scales = c.scales + group.scales, *sums = scales + h->blocks * group.count;
    alignas(64) uint8_t order[64];  // bit i of byte j of a word is column 8 * j + i; it lies in row i of a tile
    for (int at = 0; at < 64; at++) order[at] = static_cast<uint8_t>((at & 32) + 8 * (at & 3) + (at >> 2 & 7));
    for (int64_t block = 0; block < h->blocks; block++) {
        const int64_t first = block * h->block_columns;
        const int64_t last = first + h->block_columns < padded ? first + h->block_columns : padded;
        float sum;
        const Grid grid = affine_block<Avx512>(c, floats + first, last - first, &sum);
        scales[block * group.count + lane] = grid.scale, sums[block * group.count + lane] = sum;
        for (int64_t t = 0; t < tiles; t++, out += tile_rows * TILE_ROW) {
            const int64_t k = first + 64 * t;
            Bytes high = _mm512_setzero_si512(), low = high;
            if (k < last) split_bytes(floats + k, 1, &high, &low);
            const __mmask64 real = last - k >= 64 ? ~__mmask64{0} : 0xffffffffu;  // the rest is the next block's
            const Bytes o = _mm512_load_si512(order);
            _mm512_storeu_si512(out + lane * TILE_ROW, _mm512_maskz_permutexvar_epi8(real, o, high));
            _mm512_storeu_si512(out + (group.count + lane) * TILE_ROW, _mm512_maskz_permutexvar_epi8(real, o, low));
        }
    }
}

// One step, 16 rows' words, as eight rows of a tile: row i holds +1 where bit i of a byte is set, else -1. A matrix
// copies the inverted bit to bits 1 ... 7 and sets bit 0. The matrices are held in registers by force: reloaded
// between stores they took as long again.
struct Signs {
    Bytes matrix[8];

    Signs() {
        for (int i = 0; i < 8; i++) {
            matrix[i] = _mm512_set1_epi64(static_cast<int64_t>(0x0001010101010101u << i));
            asm volatile("" : "+v"(matrix[i]));
        }
    }
    inline __attribute__((always_inline)) void expand(Bytes words, uint8_t *out) const {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            _mm512_store_si512(out + TILE_ROW * i, _mm512_gf2p8affine_epi64_epi8(words, matrix[i], 0xff));
    }
};

// Sums of a group's rows (high, then low bytes) with each plane of one block. `next`: bytes to the block's second tile.
// Tiles 0 and 1 hold weights; a full group and the last one differ in shape and so in the tiles that they use.
#define AB_GROUP_SUMS(NAME, X0, X1, SUMS)                                                                        \
    inline void NAME(const uint8_t *x, int64_t next, const uint8_t *signs, int64_t tiles, int planes, int32_t *sums) { \
        _tile_loadd(X0, x, TILE_ROW);                                                                             \
        if (tiles > 1) _tile_loadd(X1, x + next, TILE_ROW);                                                       \
        for (int b = 0; b < planes; b++, signs += 2 * TILE_BYTES, sums += TILE_INTS) {                            \
            _tile_zero(SUMS);                                                                                     \
            _tile_loadd(0, signs, TILE_ROW);                                                                      \
            _tile_dpbssd(SUMS, X0, 0);                                                                            \
            if (tiles > 1) {                                                                                      \
                _tile_loadd(1, signs + TILE_BYTES, TILE_ROW);                                                     \
                _tile_dpbssd(SUMS, X1, 1);                                                                        \
            }                                                                                                     \
            _tile_stored(SUMS, sums, TILE_ROW);                                                                   \
        }                                                                                                         \
    }
AB_GROUP_SUMS(full_group_sums, 2, 3, 4)
AB_GROUP_SUMS(last_group_sums, 5, 6, 7)
#undef AB_GROUP_SUMS

// A block's sums meet the scales of precision P, for lanes from ... to - 1 of a group: the same operations in the same
// order as affine_tile has.
template <int P>
void combine_sums(const Header *h, const uint8_t *levels, const float *steps, const Group &group, const int32_t *sums,
                  int from, int to, const float *scales, const float *x_sums, float *y) {
    Floats level[P], offset = Avx512::zero();
    for (int b = 0; b < P; b++) level[b] = Avx512::any_level(h, levels, steps, b);
    if (h->shape.has_offsets) offset = Avx512::any_level(h, levels, steps, P);
    for (int m = from; m < to; m++) {
        Floats z = Avx512::zero();
        for (int b = 0; b < P; b++) {
            const int32_t *at = sums + b * TILE_INTS + m * 16;
            const Bytes high = _mm512_slli_epi32(_mm512_load_si512(at), 8);
            const Bytes sum = _mm512_add_epi32(high, _mm512_load_si512(at + group.count * 16));
            z = Avx512::fma(level[b], _mm512_cvtepi32_ps(sum), z);
        }
        float *out = y + m * 16;
        Floats total = Avx512::fma(z, Avx512::set1(scales[m]), Avx512::load(out));
        if (h->shape.has_offsets) total = Avx512::fma(offset, Avx512::set1(x_sums[m]), total);
        Avx512::store(out, total);
    }
}

struct alignas(64) AffineBuffers {
    uint8_t signs[AB_MAX_PLANES][2][TILE_BYTES];
    int32_t sums[AB_MAX_PLANES][TILE_INTS];
};

inline void combine_group(const Call &c, const Group &group, int64_t tile, int64_t block, const int32_t *sums, float *y) {
    void (*const by_precision[])(const Header *, const uint8_t *, const float *, const Group &, const int32_t *, int, int,
                                 const float *, const float *, float *) = {
        combine_sums<1>, combine_sums<2>, combine_sums<3>, combine_sums<4>,
        combine_sums<5>, combine_sums<6>, combine_sums<7>, combine_sums<8>};
    const Header *h = c.weight;
    const float *scales = c.scales + group.scales + block * group.count, *x_sums = scales + h->blocks * group.count;
    for (int i = 0; i < c.segment_count; i++) {
        const Segment &s = c.segments[i];
        const int from = s.first > group.first ? s.first - group.first : 0, end = s.first + s.count - group.first;
        const int to = end < group.count ? end : group.count;
        if (from >= to) continue;
        const uint8_t *levels = affine_block_levels(h, s.precision, tile, block);
        by_precision[s.precision - 1](h, levels, affine_steps_at(h, s.precision, tile), group, sums, from, to, scales, x_sums, y + group.first * 16);
    }
}

// One block of one tile for all groups; y holds the tile's results by position.
inline __attribute__((always_inline)) void affine_tile_block(const Call &c, const Signs &with, int64_t tile, int64_t block,
                                                             int64_t ahead, AffineBuffers *buffers, float *y) {
    const Header *h = c.weight;
    const int64_t block_steps = h->block_columns / STEP, first = block * block_steps, tiles = block_tiles(h);
    const int64_t steps = h->steps - first < block_steps ? h->steps - first : block_steps;
    const uint8_t *plane = plane_at(h, 0, tile) + first * 64;
    for (int b = 0; b < c.groups[0].precision; b++, plane += h->plane_stride)
        for (int64_t s = 0; s < steps; s++) {
            __builtin_prefetch(plane + s * 64 + ahead);
            with.expand(_mm512_loadu_si512(plane + s * 64), buffers->signs[b][0] + s * (TILE_BYTES / 2));
        }
    written();
    for (int i = 0; i < c.group_count; i++) {
        const Group &group = c.groups[i];
        const int64_t tile_bytes = 2 * group.count * TILE_ROW;
        const uint8_t *x = c.tables + group.tables + block * tiles * tile_bytes;
        auto *const group_sums = group.count == GROUP_ROWS ? full_group_sums : last_group_sums;
        group_sums(x, tile_bytes, buffers->signs[0][0], tiles, group.precision, buffers->sums[0]);
        combine_group(c, group, tile, block, buffers->sums[0], y);
    }
}

constexpr int64_t SIGNS_AHEAD = 2048;  // bytes of each plane that are fetched ahead, into the first-level cache

inline void affine_batch(const Call &c, int64_t first, int64_t last, float *scratch) {
    const Header *h = c.weight;
    alignas(64) AffineBuffers buffers;
    const Signs with;
    TileShapes shapes;
    const int left = c.groups[c.group_count - 1].count;
    for (int tile = 0; tile < 5; tile++) shapes.set(tile, 16, TILE_ROW);
    for (int tile = 5; tile < 8; tile++) shapes.set(tile, 2 * left, TILE_ROW);
    shapes.use();
    const bool streaming = c.rows <= 4;  // their activations stay in the first-level cache
    const int64_t group = streaming ? 1 : TILE_GROUP, wanted = PIECE_COLUMNS / h->block_columns * 16 / c.rows;
    const int64_t at_once = streaming ? h->blocks : wanted < 1 ? 1 : wanted;
    for (int64_t tile = first; tile < last; tile += group) {
        const int64_t tiles = last - tile < group ? last - tile : group;
        memset(scratch, 0, static_cast<size_t>(tiles * c.rows * 16) * sizeof(float));
        for (int64_t block = 0; block < h->blocks; block += at_once) {
            const int64_t end = block + at_once < h->blocks ? block + at_once : h->blocks;
            for (int64_t t = 0; t < tiles; t++)
                for (int64_t b = block; b < end; b++)
                    affine_tile_block(c, with, tile + t, b, streaming ? SIGNS_AHEAD : h->tile_bytes, &buffers,
                                      scratch + t * c.rows * 16);
        }
        store_tiles<Avx512>(c, tile, tiles, scratch);
    }
}

}  // namespace
