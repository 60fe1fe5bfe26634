// Where everything lies in a blob. Offsets are bytes from its start, all 64-byte aligned.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "anybits.h"

struct Header {
    uint64_t magic;
    ab_shape shape;
    int64_t total;
    int64_t planes_at, plane_stride;
    int64_t levels_at[AB_MAX_PLANES + 1];
    int64_t row_scales_at[AB_MAX_PLANES + 1];  // codebook, and the steps of affine levels in 8 bits
    int64_t tile_rows;
    int64_t tiles;          // affine: row tiles; codebook: rows
    int64_t tile_bytes;     // one tile (affine) or row (codebook) of one plane
    int64_t steps;          // affine: ceil(K/32)
    int64_t spans;          // codebook: ceil(K/512)
    int64_t groups;         // affine: G
    int64_t block_columns;  // affine: columns of one table block; divides group_columns, the last may be ragged
    int64_t blocks;         // affine: table blocks of a row
    int64_t blocks_per_group;
};

// Functions of these headers are compiled once per instruction set, so they must never be shared between
// object files: all of them live in anonymous namespaces.
namespace {

constexpr uint64_t MAGIC = 0x0130737469627961;  // "aybits0" and the version of the layout in the top byte
constexpr int64_t STEP = 32;                    // columns of one step of the affine kernel: a word
constexpr int64_t SPAN = 512;                   // columns of one span of the codebook kernel: 64 bytes of a plane
constexpr int64_t TABLE_COLUMNS = 128;          // columns that share the scale of an activation table, at most
constexpr int64_t CODEBOOK_TILE = 16;           // output rows that the codebook kernel stores together

inline const Header *header_of(const void *blob) { return static_cast<const Header *>(blob); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t level_size(int32_t dtype) { return dtype == AB_F32 ? 4 : dtype == AB_I8 ? 1 : 2; }

inline bool stored(const Header *h, int precision) {
    return precision >= 1 && precision <= h->shape.planes && (h->shape.precisions >> precision & 1);
}

// Affine levels of one precision: [tile][group][p scales, then the offset if there is one][tile_rows].
inline int64_t affine_entries(const ab_shape &s, int precision) { return precision + (s.has_offsets ? 1 : 0); }

inline const uint8_t *plane_at(const Header *h, int plane, int64_t tile) {
    return reinterpret_cast<const uint8_t *>(h) + h->planes_at + plane * h->plane_stride + tile * h->tile_bytes;
}

inline const uint8_t *affine_levels_at(const Header *h, int precision, int64_t tile) {
    const int64_t size = h->tile_rows * level_size(h->shape.level_dtype);
    return reinterpret_cast<const uint8_t *>(h) + h->levels_at[precision] +
           tile * h->groups * affine_entries(h->shape, precision) * size;
}

// Those of the group that a table block belongs to.
inline const uint8_t *affine_block_levels(const Header *h, int precision, int64_t tile, int64_t block) {
    const int64_t entries = affine_entries(h->shape, precision) * h->tile_rows * level_size(h->shape.level_dtype);
    return affine_levels_at(h, precision, tile) + block / h->blocks_per_group * entries;
}

// What levels in 8 bits are multiplied by: [tile][p scales, then the offset if there is one][tile_rows]; for others a place that
// nothing is read from, but that callers may count on from.
inline const float *affine_steps_at(const Header *h, int precision, int64_t tile) {
    if (h->shape.level_dtype != AB_I8) return reinterpret_cast<const float *>(h);
    const char *base = reinterpret_cast<const char *>(h) + h->row_scales_at[precision];
    return reinterpret_cast<const float *>(base) + tile * affine_entries(h->shape, precision) * h->tile_rows;
}

inline const int16_t *centroids_at(const Header *h, int precision, int64_t row) {
    const char *base = reinterpret_cast<const char *>(h) + h->levels_at[precision];
    return reinterpret_cast<const int16_t *>(base) + (row << precision);
}

inline const float *row_scales(const Header *h, int precision) {
    const char *base = reinterpret_cast<const char *>(h) + h->row_scales_at[precision];
    return reinterpret_cast<const float *>(base);
}

}  // namespace
