// One multiplication as the kernels see it, and what an instruction set offers.
#pragma once

#include "blob.h"

// Rows of x that share a precision: positions first ... first + count - 1 of Call::order.
struct Segment {
    int precision;
    int first, count;
};

// Rows of x that go through matrix instructions together: positions first ... first + count - 1 of Call::order.
struct Group {
    int precision;  // the highest among them
    int first, count;
    int64_t tables, scales;  // where their activations begin, in bytes, and their scales, in floats
};

// What becomes of the activations: what the default needs, tables of sums in 8 bits, 8-bit numbers for a codebook's rows, or 8-bit,
// 14-bit or bf16 ones for levels that are made first.
enum Form { EXACT, SHORT_TABLES, BYTES, BYTE_LEVELS, WORD_LEVELS, BF16 };

// Activations are kept by row of x, whatever precision the row runs at, so that the next layer that reads
// the same x can use them again.
struct Call {
    const Header *weight;
    const void *x;
    int dtype;
    int64_t x_stride;
    int rows;
    const int *order;  // position -> row of x and y, the highest precision first
    const Segment *segments;
    int segment_count;
    void *y;
    bool eight_bits;  // will do for activations
    Form form;        // what Kernels::form makes of that
    uint8_t *tables;  // affine: sums of 4 activations, looked up; codebook: the int16 activations; BYTES and behind: those
    int64_t table_stride;
    float *scales;  // one per table block and row
    float *sums;    // affine: exact sum of a table block
    int64_t scale_stride;
    const Group *groups;  // for Batch, whose tables and scales are by group
    int group_count;
};

// Matrix instructions, whose cost hardly depends on the number of rows of x; bf16 only. Rows are grouped by `GROUP_ROWS`.
struct Batch {
    int least_rows[2];  // rows of x from which they are used, for affine and codebook levels
    // What the activations of a group of `count` rows take.
    int64_t (*table_bytes)(const Header *weight, int count);
    int64_t (*scale_floats)(const Header *weight, int count);
    // As in Kernels, for one position of Call::order.
    void (*activations)(const Call &call, const Group &group, int lane, float *floats);
    void (*multiply)(const Call &call, int64_t first, int64_t last, float *scratch);
};

constexpr int GROUP_ROWS = 8;

struct Kernels {
    int tile_rows;  // rows interleaved in an affine tile
    bool row_words;  // affine: a step holds each row's word; otherwise byte j of all rows, then byte j + 1
    Form (*form)(const Call &call);
    // Fill tables, scales and sums of one row of x. `floats` has room for K rounded up to 512.
    void (*activations)(const Call &call, int row, float *floats);
    // Affine tiles, or codebook tiles of 16 rows, first ... last - 1. `scratch` has scratch_floats().
    void (*multiply)(const Call &call, int64_t first, int64_t last, float *scratch);
    // Rows first ... first + count - 1 (whole tiles but for the last) of `planned` into `out`.
    void (*dequantize)(const Header *weight, int precision, int64_t first, int64_t count, int64_t planned_first,
                       int64_t planned, int dtype, void *out);
    const Batch *batch;  // NULL where there is none
};

// Tiles that share one pass over a piece of the activations' tables when there are many rows of x.
constexpr int TILE_GROUP = 16;

const Kernels *kernels_portable();
const Kernels *kernels_avx2();
const Kernels *kernels_avx512();
const Kernels *kernels_avx512_bf16();
const Kernels *kernels_neon();
const Kernels *kernels_neon_dot();
const Kernels *kernels_amx();
