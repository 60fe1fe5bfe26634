// Affine levels for many rows of x. Looking four activations up costs the same for every row of x; from about
// eight rows on it is cheaper to make the weights themselves once, as 14-bit integers, and to multiply them with
// 12-bit activations: w = base + sum of (2 * scale where the bit is set), in the 16-bit halves of each row's word,
// so that bit k stands for the columns k and k + 16, which a pairwise product then adds up.
#pragma once

#include "affine.h"

namespace {

constexpr float BLEND_X_LIMIT = 2047.0f, BLEND_W_LIMIT = 16383.0f;
constexpr int BLEND_FLUSH_STEPS = 2;  // 64 products of 14 and 11 bits and a sign fit into 32 bits

// Activations of one position into its lane of the chunk's tables: [step][16 pairs][width] of two int16.
template <class I>
void blend_activations(const Call &c, const BlendChunk &chunk, int lane, float *floats) {
    const Header *h = c.weight;
    const int64_t padded = h->steps * STEP;
    int32_t *pairs = reinterpret_cast<int32_t *>(c.tables + chunk.tables) + lane;
    float *scales = c.scales + chunk.scales + lane;
    if (lane < chunk.count)
        load_x<I>(c, c.order[chunk.first + lane], floats, padded);
    else
        memset(floats, 0, static_cast<size_t>(padded) * 4);
    for (int64_t block = 0; block < h->blocks; block++) {
        const int64_t first = block * h->block_columns;
        const int64_t last = first + h->block_columns < padded ? first + h->block_columns : padded;
        float peak = 0;
        for (int64_t k = first; k < last; k++) peak = __builtin_fabsf(floats[k]) > peak ? __builtin_fabsf(floats[k]) : peak;
        scales[block * chunk.width] = peak / BLEND_X_LIMIT;
        const float inverse = peak > 0 ? BLEND_X_LIMIT / peak : 0;
        for (int64_t k = first; k < last; k += STEP) {
            int32_t q[STEP];
            for (int i = 0; i < STEP; i++) q[i] = static_cast<int32_t>(__builtin_rintf(floats[k + i] * inverse));
            for (int i = 0; i < 16; i++) q[i] = static_cast<int32_t>((q[i] & 0xffff) | static_cast<uint32_t>(q[i + 16]) << 16);
            int32_t *out = pairs + k / 2 * chunk.width;
            for (int i = 0; i < 16; i++) out[i * chunk.width] = q[i];
        }
    }
}

template <class I, int P>
void blend_tile(const Call &c, const BlendChunk &chunk, int64_t tile, int64_t first, int64_t last, int64_t ahead, float *y) {
    if (chunk.width == 16)
        I::template blend<P, 16>(c, chunk, tile, first, last, ahead, y);
    else if (chunk.width == 8)
        I::template blend<P, 8>(c, chunk, tile, first, last, ahead, y);
    else
        I::template blend<P, 4>(c, chunk, tile, first, last, ahead, y);
}

template <class I>
void blend_multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
    const Header *h = c.weight;
    const int64_t at_once = PIECE_COLUMNS / h->block_columns;
    void (*const tiles_of[])(const Call &, const BlendChunk &, int64_t, int64_t, int64_t, int64_t, float *) = {
        blend_tile<I, 1>, blend_tile<I, 2>, blend_tile<I, 3>, blend_tile<I, 4>,
        blend_tile<I, 5>, blend_tile<I, 6>, blend_tile<I, 7>, blend_tile<I, 8>};
    for (int64_t tile = first; tile < last; tile += TILE_GROUP) {
        const int64_t tiles = last - tile < TILE_GROUP ? last - tile : TILE_GROUP;
        memset(scratch, 0, static_cast<size_t>(tiles * c.rows * I::TILE) * sizeof(float));
        for (int64_t block = 0; block < h->blocks; block += at_once) {
            const int64_t end = block + at_once < h->blocks ? block + at_once : h->blocks;
            for (int i = 0; i < c.chunk_count; i++) {
                const BlendChunk &chunk = c.chunks[i];
                for (int64_t t = 0; t < tiles; t++)
                    tiles_of[chunk.precision - 1](c, chunk, tile + t, block, end, i ? 0 : h->tile_bytes,
                                                  scratch + (t * c.rows + chunk.first) * I::TILE);
            }
        }
        store_tiles<I>(c, tile, tiles, scratch);
    }
}

}  // namespace
