// What all kernels share: the arguments, where things lie, dtypes, the ring of copies in flight, the final sum.
//
// A weight is cut into tiles of 16 rows and steps of 256 columns; a step is two units of 128 columns. Of each plane,
// a lane holds four words: lane 4r + t the words t of rows r and r + 8, of both units. Bit 8i + s of word t of a unit
// is column 32(s / 2) + 8t + 4(s % 2) + i, so that (word >> s) & 0x01010101 is four neighbouring columns, one operand
// register of a tensor-core product, and the 32 columns of shifts 2q and 2q + 1 are one whole product.
#pragma once

#ifndef PARTS
#define PARTS 1  // weights that one launch multiplies x by; they differ in their rows alone
#endif

struct Part {  // what a further weight has of its own, named as in Args
    const u8 *planes, *levels;
    const float *row_scale;
    u8 *y;
    i64 out_features, tiles;
};

struct Args {           // all 8 bytes wide: the host packs them as such
    const u8 *x;        // [rows, in_features], x_stride elements from row to row
    const u8 *planes;   // [P][tiles][steps][32 lanes][4 words]
    const u8 *levels;   // signs.cu and codebook.cu say how
    const int *wanted;  // [rows] precision of each row, read when MIXED
    const float *row_scale;  // [16 * tiles], codebooks only
    u8 *y;              // [rows, out_features] in x's dtype, or float [splits, rows, out_features] when SPLIT
    i64 x_stride, rows, out_features, in_features;
    i64 tiles, steps;           // of the whole weight
    i64 split_steps;            // steps of one block's part of the columns
    i64 groups, group_units;    // groups of a row; units of 128 columns in a group, when it has one or more
    i64 stored;                 // bit p is set when precision p is stored
    i64 all_tiles;              // of all parts
#if PARTS > 1
    Part more[PARTS - 1];
#endif
};

constexpr int TILE = 16, STEP = 256, UNIT = 128, LANES = 32;
constexpr int STEP_BYTES = TILE * STEP / 8;  // of one plane: 512, 16 a lane

// x[row][column ... column + 3] as floats, 0 past the last column.
template <int TYPE> DEVICE void read_four(const Args &a, i64 row, i64 column, float (&out)[4]) {
    const i64 first = row * a.x_stride + column;
    constexpr int SIZE = TYPE == F32 ? 4 : 2;
    const u8 *at = a.x + first * SIZE;
    if (column + 4 <= a.in_features && reinterpret_cast<u64>(at) % (4 * SIZE) == 0) {
        if (TYPE == F32) {
            const Words4 w = load(reinterpret_cast<const Words4 *>(at));
            for (int i = 0; i < 4; i++) out[i] = bits_to_float(w.v[i]);
        } else {
            const Words2 w = load(reinterpret_cast<const Words2 *>(at));
            for (int i = 0; i < 4; i++) {
                const u16 h = static_cast<u16>(w.v[i / 2] >> 16 * (i % 2));
                out[i] = TYPE == F16 ? half_to_float(h) : bfloat_to_float(h);
            }
        }
        return;
    }
    for (int i = 0; i < 4; i++) out[i] = column + i < a.in_features ? read_float<TYPE>(a.x, first + i) : 0.0f;
}

// The 16 bytes of plane `plane` that belong to this lane.
DEVICE const u8 *plane_at(const Args &a, int plane, i64 tile, i64 step, int lane) {
    return a.planes + (((plane * a.tiles + tile) * a.steps + step) * LANES + lane) * 16;
}

// The highest precision among the rows of x, which all threads of a warp find alike.
DEVICE int highest_wanted(const Args &a, int lane) {
    int top = 0;
    for (i64 row = lane; row < a.rows; row += LANES) {
        const int p = load(a.wanted + row);
        top = p > top ? p : top;
    }
    for (int d = 16; d; d >>= 1) {
        const int other = shuffle_xor(top, d);
        top = other > top ? other : top;
    }
    return top;
}
