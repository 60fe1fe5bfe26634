// Making a blob: layout, planes and levels.
#include "blob.h"

#include <math.h>
#include <string.h>

#include "call.h"
#include "convert.h"
#include "dispatch.h"
#include "threads.h"

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t MAX_FEATURES = int64_t{1} << 31;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, LINE) * LINE; }

int check_shape(const ab_shape &s) {
    if (!ab_tile_rows(s.isa)) return AB_BAD_ISA;
    if (s.levels != AB_AFFINE && s.levels != AB_CODEBOOK) return AB_BAD_SHAPE;
    if (s.level_dtype < AB_F32 || s.level_dtype > (s.levels == AB_AFFINE ? AB_I8 : AB_F16)) return AB_BAD_DTYPE;
    if (s.out_features < 1 || s.out_features > MAX_FEATURES) return AB_BAD_SHAPE;
    if (s.in_features < 1 || s.in_features > MAX_FEATURES) return AB_BAD_SHAPE;
    if (s.planes < 1 || s.planes > AB_MAX_PLANES) return AB_BAD_SHAPE;
    if (s.precisions == 0 || s.precisions & 1 || s.precisions >> (s.planes + 1)) return AB_BAD_PRECISION;
    if (s.levels == AB_CODEBOOK) return AB_OK;
    const bool whole = s.group_columns == s.in_features;
    if (s.group_columns < 1 || s.group_columns > s.in_features) return AB_BAD_SHAPE;
    return whole || s.group_columns % STEP == 0 ? AB_OK : AB_BAD_SHAPE;
}

// The widest table block that divides a group: one scale of the activations never covers two groups.
int64_t block_columns(const ab_shape &s) {
    if (s.group_columns % STEP) return TABLE_COLUMNS;
    for (int64_t columns = TABLE_COLUMNS; columns > STEP; columns -= STEP)
        if (s.group_columns % columns == 0) return columns;
    return STEP;
}

void lay_out(const ab_shape &s, Header *h) {
    memset(h, 0, sizeof *h);
    h->magic = MAGIC, h->shape = s;
    h->tile_rows = s.levels == AB_AFFINE ? ab_tile_rows(s.isa) : 1;
    h->tiles = ceil_div(s.out_features, h->tile_rows);
    h->steps = ceil_div(s.in_features, STEP), h->spans = ceil_div(s.in_features, SPAN);
    h->tile_bytes = s.levels == AB_AFFINE ? h->steps * h->tile_rows * 4 : h->spans * 64;
    if (s.levels == AB_AFFINE) {
        h->groups = ceil_div(s.in_features, s.group_columns);
        h->block_columns = block_columns(s);
        h->blocks = ceil_div(s.in_features, h->block_columns);
        h->blocks_per_group = h->groups == 1 ? h->blocks : s.group_columns / h->block_columns;
    }
    h->planes_at = aligned(sizeof *h);
    // An odd number of lines more than the plane: equal places of two planes must not share a cache set.
    h->plane_stride = aligned(h->tiles * h->tile_bytes) + 17 * LINE;
    int64_t at = h->planes_at + s.planes * h->plane_stride;
    for (int p = 1; p <= s.planes; p++) {
        if (!(s.precisions >> p & 1)) continue;
        h->levels_at[p] = at;
        if (s.levels == AB_AFFINE) {
            const int64_t a_group = h->tiles * affine_entries(s, p) * h->tile_rows;
            at += aligned(h->groups * a_group * level_size(s.level_dtype));
            if (s.level_dtype == AB_I8) h->row_scales_at[p] = at, at += aligned(a_group * 4);
        } else {
            at += aligned((s.out_features << p) * 2);
            h->row_scales_at[p] = at;
            at += aligned(s.out_features * 4);
        }
    }
    h->total = at;
}

// One tile of an affine plane: the words of its rows, interleaved step by step.
void pack_tile(const Header *h, const int32_t *words, int64_t tile, bool row_words, uint8_t *out) {
    const int64_t rows = h->tile_rows, width = h->steps, first = tile * rows;
    for (int64_t step = 0; step < width; step++, out += rows * 4) {
        for (int64_t r = 0; r < rows; r++) {
            const bool real = first + r < h->shape.out_features;
            const uint32_t word = real ? static_cast<uint32_t>(words[(first + r) * width + step]) : 0;
            if (row_words)
                memcpy(out + 4 * r, &word, 4);
            else
                for (int j = 0; j < 4; j++) out[j * rows + r] = static_cast<uint8_t>(word >> (8 * j));
        }
    }
}

// Byte i of `rows` is row i of an 8 x 8 bit matrix; byte j of the result is its column j.
uint64_t transpose_bits(uint64_t rows) {
    uint64_t t = (rows ^ rows >> 7) & 0x00aa00aa00aa00aau;
    rows ^= t ^ t << 7;
    t = (rows ^ rows >> 14) & 0x0000cccc0000ccccu;
    rows ^= t ^ t << 14;
    t = (rows ^ rows >> 28) & 0x00000000f0f0f0f0u;
    return rows ^ t ^ t << 28;
}

// One row of a codebook plane: in each span of 512 columns, column 64 * i + B becomes bit i of byte B.
void pack_row(const Header *h, const int32_t *words, int64_t row, uint8_t *out) {
    const int64_t width = h->steps;
    const int32_t *from = words + row * width;
    for (int64_t span = 0; span < h->spans; span++, out += 64) {
        alignas(8) uint8_t in[64] = {0};
        const int64_t left = width - span * 16, count = left < 16 ? left : 16;
        memcpy(in, from + span * 16, static_cast<size_t>(count) * 4);
        for (int t = 0; t < 8; t++) {
            uint64_t rows = 0;
            for (int i = 0; i < 8; i++) rows |= static_cast<uint64_t>(in[8 * i + t]) << (8 * i);
            const uint64_t columns = transpose_bits(rows);
            memcpy(out + 8 * t, &columns, 8);
        }
    }
}

template <class T>
void pack_affine_levels(const Header *h, int precision, const T *scales, const T *offsets, int64_t tile, T *out) {
    const int64_t n = h->shape.out_features, groups = h->groups, rows = h->tile_rows;
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t e = 0; e < affine_entries(h->shape, precision); e++, out += rows) {
            const T *from = e < precision ? scales + e * n * groups : offsets;
            for (int64_t r = 0; r < rows; r++) {
                const int64_t row = tile * rows + r;
                out[r] = row < n ? from[row * groups + g] : T{0};
            }
        }
    }
}

// Centroids as 13-bit integers and a scale: the row's largest magnitude becomes 8191.
void pack_centroids(const float *from, int64_t count, int16_t *out, float *scale) {
    float peak = 0;
    for (int64_t i = 0; i < count; i++) peak = fabsf(from[i]) > peak ? fabsf(from[i]) : peak;
    const float inverse = peak > 0 ? 8191.0f / peak : 0;
    *scale = peak / 8191.0f;
    for (int64_t i = 0; i < count; i++) out[i] = static_cast<int16_t>(rintf(from[i] * inverse));
}

}  // namespace

int blob_check(const void *blob, int64_t blob_bytes) {
    if (!blob || blob_bytes < static_cast<int64_t>(sizeof(Header))) return AB_BAD_BLOB;
    const Header *h = header_of(blob);
    if (h->magic != MAGIC || h->total > blob_bytes || check_shape(h->shape) != AB_OK) return AB_BAD_BLOB;
    // The layout follows from the shape, so a header that was tampered with cannot lead out of the blob.
    Header expected;
    lay_out(h->shape, &expected);
    return memcmp(h, &expected, sizeof expected) == 0 ? AB_OK : AB_BAD_BLOB;
}

extern "C" int64_t ab_blob_bytes(const ab_shape *shape) {
    const int status = check_shape(*shape);
    if (status != AB_OK) return -status;
    Header h;
    lay_out(*shape, &h);
    return h.total;
}

extern "C" int ab_blob_begin(void *blob, int64_t blob_bytes, const ab_shape *shape) {
    const int status = check_shape(*shape);
    if (status != AB_OK) return status;
    Header h;
    lay_out(*shape, &h);
    if (!blob || blob_bytes < h.total) return AB_BAD_BLOB;
    memcpy(blob, &h, sizeof h);
    return AB_OK;
}

extern "C" int ab_blob_plane(void *blob, int64_t blob_bytes, int plane, const int32_t *words, int threads) {
    const int status = blob_check(blob, blob_bytes);
    if (status != AB_OK) return status;
    const Header *h = header_of(blob);
    if (plane < 0 || plane >= h->shape.planes || !words) return AB_BAD_SHAPE;
    uint8_t *out = static_cast<uint8_t *>(blob) + h->planes_at + plane * h->plane_stride;
    const bool affine = h->shape.levels == AB_AFFINE;
    const bool row_words = affine && kernels_of(h->shape.isa)->row_words;
    parallel(threads, [&](int part, int parts) {
        for (int64_t t = h->tiles * part / parts; t < h->tiles * (part + 1) / parts; t++) {
            if (affine)
                pack_tile(h, words, t, row_words, out + t * h->tile_bytes);
            else
                pack_row(h, words, t, out + t * h->tile_bytes);
        }
    });
    return AB_OK;
}

extern "C" int ab_blob_levels(void *blob, int64_t blob_bytes, int precision, const void *scales, const void *offsets) {
    const int status = blob_check(blob, blob_bytes);
    if (status != AB_OK) return status;
    const Header *h = header_of(blob);
    if (!stored(h, precision)) return AB_BAD_PRECISION;
    if (!scales || (h->shape.has_offsets != 0) != (offsets != nullptr)) return AB_BAD_SHAPE;
    char *out = static_cast<char *>(blob) + h->levels_at[precision];
    if (h->shape.levels == AB_CODEBOOK) {
        float *row_scale = reinterpret_cast<float *>(static_cast<char *>(blob) + h->row_scales_at[precision]);
        const int64_t count = int64_t{1} << precision;
        for (int64_t n = 0; n < h->shape.out_features; n++)
            pack_centroids(static_cast<const float *>(scales) + n * count, count,
                           reinterpret_cast<int16_t *>(out) + n * count, row_scale + n);
        return AB_OK;
    }
    const int64_t tile_entries = h->groups * affine_entries(h->shape, precision) * h->tile_rows;
    for (int64_t t = 0; t < h->tiles; t++) {
        if (h->shape.level_dtype == AB_F32)
            pack_affine_levels(h, precision, static_cast<const float *>(scales), static_cast<const float *>(offsets), t,
                               reinterpret_cast<float *>(out) + t * tile_entries);
        else if (h->shape.level_dtype == AB_I8)
            pack_affine_levels(h, precision, static_cast<const int8_t *>(scales), static_cast<const int8_t *>(offsets), t,
                               reinterpret_cast<int8_t *>(out) + t * tile_entries);
        else
            pack_affine_levels(h, precision, static_cast<const uint16_t *>(scales), static_cast<const uint16_t *>(offsets),
                               t, reinterpret_cast<uint16_t *>(out) + t * tile_entries);
    }
    return AB_OK;
}

extern "C" int ab_blob_steps(void *blob, int64_t blob_bytes, int precision, const float *scale_steps,
                             const float *offset_steps) {
    const int status = blob_check(blob, blob_bytes);
    if (status != AB_OK) return status;
    const Header *h = header_of(blob);
    if (!stored(h, precision)) return AB_BAD_PRECISION;
    if (h->shape.level_dtype != AB_I8) return AB_BAD_DTYPE;
    if (!scale_steps || (h->shape.has_offsets != 0) != (offset_steps != nullptr)) return AB_BAD_SHAPE;
    const int64_t n = h->shape.out_features, rows = h->tile_rows;
    float *out = reinterpret_cast<float *>(static_cast<char *>(blob) + h->row_scales_at[precision]);
    for (int64_t first = 0; first < h->tiles * rows; first += rows)
        for (int64_t e = 0; e < affine_entries(h->shape, precision); e++, out += rows) {
            const float *from = e < precision ? scale_steps + e * n : offset_steps;
            for (int64_t r = 0; r < rows; r++) out[r] = first + r < n ? from[first + r] : 0;
        }
    return AB_OK;
}
