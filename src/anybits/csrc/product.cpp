// What a product needs beside its weight, and how its work is divided.
#include "product.h"

#include <string.h>

namespace {

int64_t scratch_floats(const Call &c, const Kernels &k) {
    return c.weight->shape.levels == AB_AFFINE ? int64_t{TILE_GROUP} * c.rows * k.tile_rows : c.rows * CODEBOOK_TILE * 16;
}

// Groups of rows for Batch. Codebooks are looked up once for each precision, so none of their groups mixes two.
int cut_groups(const Call &c, const Batch *batch, Group *groups, int64_t *tables, int64_t *scales) {
    const bool mix = c.weight->shape.levels == AB_AFFINE;
    int count = 0;
    *tables = *scales = 0;
    for (int i = 0; i < (mix ? 1 : c.segment_count); i++) {
        const int first = c.segments[i].first, end = mix ? c.rows : first + c.segments[i].count;
        for (int at = first; at < end; at += GROUP_ROWS, count++) {
            int precision = 0;
            for (int s = c.segment_count - 1; s >= 0; s--)
                if (c.segments[s].first <= at) {
                    precision = c.segments[s].precision;
                    break;
                }
            groups[count] = {precision, at, end - at < GROUP_ROWS ? end - at : GROUP_ROWS, *tables, *scales};
            *tables += batch->table_bytes(c.weight, groups[count].count);
            *scales += batch->scale_floats(c.weight, groups[count].count);
        }
    }
    return count;
}

void fill_groups(const Call &c, const Kernels *kernels, int part, int parts, float *floats) {
    int turn = 0;
    for (int i = 0; i < c.group_count; i++)
        for (int lane = 0; lane < c.groups[i].count; lane++)
            if (turn++ % parts == part) kernels->batch->activations(c, c.groups[i], lane, floats);
}

}  // namespace

void Product::plan(const Kernels *kernels_of_weight, Group *groups) {
    kernels = kernels_of_weight;
    Call &c = call;
    const Header *h = c.weight;
    const bool affine = h->shape.levels == AB_AFFINE;
    c.form = kernels->form(c);
    // Rows whose tables are read in turn lie a quarter of 4 KiB apart: nearer to a multiple of it, loads wait for each other.
    c.table_stride = ceil_div(affine ? h->steps * (c.form == EXACT ? 256 : 128) : h->spans * SPAN * 2, 4096) * 4096 + 1024;
    c.scale_stride = affine ? h->blocks : h->spans * 4;
    int64_t table_bytes = c.rows * c.table_stride, scale_floats = c.rows * c.scale_stride;
    const Batch *batch = c.dtype == AB_BF16 && c.form == EXACT ? kernels->batch : nullptr;
    if (batch && c.rows >= batch->least_rows[h->shape.levels])
        c.group_count = cut_groups(c, batch, groups, &table_bytes, &scale_floats), c.groups = groups;
    const int64_t floats = h->spans * SPAN + STEP, of_tiles = scratch_floats(c, *kernels);
    tables = lines(table_bytes), scales = lines(scale_floats * 4);
    scratch = lines(4 * (of_tiles > floats ? of_tiles : floats)) + 64;
}

void Product::place(char *memory) {
    call.tables = reinterpret_cast<uint8_t *>(memory);
    call.scales = reinterpret_cast<float *>(memory + tables);
    call.sums = reinterpret_cast<float *>(memory + tables + scales);
}

bool Product::same_activations(const Product &other) const {
    const Header *a = call.weight, *b = other.call.weight;
    return call.x == other.call.x && kernels == other.kernels && a->shape.isa == b->shape.isa &&
           a->shape.levels == b->shape.levels && a->shape.in_features == b->shape.in_features &&
           a->block_columns == b->block_columns && call.form == other.call.form && call.rows == other.call.rows &&
           call.group_count == other.call.group_count && tables == other.tables && scales == other.scales;
}

int Product::fillers(int threads) const { return call.group_count || threads < call.rows ? threads : call.rows; }

void Product::fill(int part, int parts, char *memory) const {
    float *const floats = reinterpret_cast<float *>(memory);
    if (call.group_count) return fill_groups(call, kernels, part, parts, floats);
    const int rows = call.rows;
    for (int r = rows * part / parts; r < rows * (part + 1) / parts; r++) kernels->activations(call, r, floats);
}

int64_t Product::tiles() const {
    const Header *h = call.weight;
    return h->shape.levels == AB_AFFINE ? h->tiles : ceil_div(h->tiles, CODEBOOK_TILE);
}

void Product::multiply(int64_t first, int64_t last, char *memory) const {
    if (first == last) return;
    auto *const run = call.group_count ? kernels->batch->multiply : kernels->multiply;
    run(call, first, last, reinterpret_cast<float *>(memory));
}

int64_t Product::row_of(int64_t tile) const {
    const int64_t row = tile * (call.weight->shape.levels == AB_AFFINE ? kernels->tile_rows : CODEBOOK_TILE);
    return row < call.weight->shape.out_features ? row : call.weight->shape.out_features;
}
