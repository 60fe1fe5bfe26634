// One weight at a time, read the plain way: what simple.cu and dequantize.cu are made of. Macros: CODEBOOK 0/1,
// LEVELS (dtype of scales), OFFSETS 0/1.
#pragma once

DEVICE u32 plane_word(const Args &a, int plane, i64 row, i64 column) {
    const i64 tile = row / TILE, step = column / STEP;
    const int lane = static_cast<int>(row % 8 * 4 + column % 32 / 8);
    const u8 *at = plane_at(a, plane, tile, step, lane) + (column % STEP / UNIT * 2 + row % TILE / 8) * 4;
    return load(reinterpret_cast<const u32 *>(at));
}
// Where a column's bit lies in the word.
DEVICE int bit_of(i64 column) {
    const int c = static_cast<int>(column % UNIT);
    return c % 4 * 8 + c / 32 * 2 + c % 8 / 4;
}

// The levels of precision p, found once.
struct Levels {
    const u8 *base;
    int p;
    DEVICE Levels(const Args &a, int precision) : p(precision) {
        if (CODEBOOK) base = a.levels + 32 * (a.stored & ((1 << p) - 1));
        else base = a.levels + load(reinterpret_cast<const i64 *>(a.levels) + p);
    }
    DEVICE float centroid(const Args &a, i64 row, u32 code) const {
        const u16 *table = reinterpret_cast<const u16 *>(base + row / TILE * 32 * a.stored);
        return half_to_float(load(table + ((row % TILE << p) + code))) * load(a.row_scale + row);
    }
    // Scale `slot` of a group, or its offset when slot is p.
    DEVICE float scale(const Args &a, i64 row, i64 group, int slot) const {
        const i64 at = ((row / TILE * a.groups + group) * (p + OFFSETS) + slot) * TILE + row % 8 * 2 + row % TILE / 8;
        return read_float<LEVELS>(base, at);
    }
    DEVICE i64 group(const Args &a, i64 column) const {
        return SUBGROUPS > 1 ? column / (UNIT / SUBGROUPS) : column / UNIT / a.group_units % a.groups;
    }
};
