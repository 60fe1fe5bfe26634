// What the kernels share that go through tiles with a ring of copies in flight: macros WARPS, SPLIT, DTYPE.
#pragma once

// The tiles of a block, and in each the steps of a warp, as one sequence: copies run ahead across the end of a tile.
struct Position {
    i64 tile, step;
    DEVICE bool within(const Args &a) const { return tile < a.tiles; }
    DEVICE void next(int warps, i64 first_step, i64 last_step) {
        step += warps;
        if (step >= last_step) {
            step = first_step;
            tile += blocks_x();
        }
    }
};

// Add the warps' parts [WARPS][rows][16] of one tile, always in the same order, and write the sums.
DEVICE void write_tile(const Args &a, i64 tile, const float *parts) {
    const int size = TILE * static_cast<int>(a.rows);
    for (int i = thread_index(); i < size; i += WARPS * LANES) {
        const i64 output = tile * TILE + i % TILE, row = i / TILE;
        float v = 0;
        for (int w = 0; w < WARPS; w++) v += parts[w * size + i];
        if (output >= a.out_features) continue;
        if (CODEBOOK) v *= load(a.row_scale + output);
        if (SPLIT) write_float<F32>(a.y, (block_y() * a.rows + row) * a.out_features + output, v);
        else write_float<DTYPE>(a.y, row * a.out_features + output, v);
    }
}
