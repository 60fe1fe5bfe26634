// What the kernels share that go through tiles with a ring of copies in flight: macros WARPS, SPLIT, DTYPE, PARTS.
#pragma once

// What a block needs of the weight whose tile it is at. Pointers are moved back by the tiles of the parts before, so
// that tiles and outputs are counted through all parts; few fields outlive a tile, because registers are scarce.
struct Weight {
    const u8 *planes, *levels;  // levels are where they are
    const float *row_scale;
    u8 *y;
    i64 first_tile;
    int tiles, end_tile, out_features, end_output;
};
DEVICE Weight first_weight(const Args &a) {
    const int tiles = static_cast<int>(a.tiles), outputs = static_cast<int>(a.out_features);
    return Weight{a.planes, a.levels, a.row_scale, a.y, 0, tiles, tiles, outputs, outputs};
}
// Let `weight` be the part that has `tile`; return whether it was another one before. Tiles only go up. No array is
// indexed by a variable, so that arguments stay where they are.
DEVICE bool enter_part(Weight &weight, const Args &a, i64 tile) {
#if PARTS > 1
    if (tile < weight.end_tile) return false;
    constexpr int SIZE = SPLIT || DTYPE == F32 ? 4 : 2;
    i64 first = a.tiles;
#pragma unroll
    for (int i = 0; i < PARTS - 1; i++) {
        const Part &part = a.more[i];
        if (tile >= first && tile < first + part.tiles) {
            weight.planes = part.planes - first * a.steps * STEP_BYTES;
            weight.levels = part.levels, weight.first_tile = first;
            weight.row_scale = part.row_scale - first * TILE;
            weight.y = part.y - first * TILE * SIZE;
            weight.tiles = static_cast<int>(part.tiles);
            weight.end_tile = static_cast<int>(first + part.tiles);
            weight.out_features = static_cast<int>(part.out_features);
            weight.end_output = static_cast<int>(first * TILE + part.out_features);
        }
        first += part.tiles;
    }
    return true;
#else
    return false;
#endif
}
DEVICE i64 count_tiles(const Args &a) { return PARTS > 1 ? a.all_tiles : a.tiles; }
// The 16 bytes of a plane that belong to this lane.
DEVICE const u8 *plane_at(const Args &a, const Weight &weight, int plane, i64 tile, i64 step, int lane) {
    return weight.planes + (((static_cast<i64>(plane) * weight.tiles + tile) * a.steps + step) * LANES + lane) * 16;
}

// The tiles of a block, and in each the steps of a warp, as one sequence: copies run ahead across the end of a tile
// and of a weight.
struct Position {
    i64 tile, step;
    DEVICE bool within(const Args &a) const { return tile < count_tiles(a); }
    DEVICE void next(int warps, i64 first_step, i64 last_step) {
        step += warps;
        if (step >= last_step) {
            step = first_step;
            tile += blocks_x();
        }
    }
};

// Add the warps' parts [WARPS][rows][16] of one tile, always in the same order, and write the sums.
DEVICE void write_tile(const Args &a, const Weight &weight, i64 tile, const float *parts) {
    const int size = TILE * static_cast<int>(a.rows);
    for (int i = thread_index(); i < size; i += WARPS * LANES) {
        const i64 output = tile * TILE + i % TILE, row = i / TILE;
        float v = 0;
        for (int w = 0; w < WARPS; w++) v += parts[w * size + i];
        if (output >= weight.end_output) continue;
        if (CODEBOOK) v *= load(weight.row_scale + output);
        if (SPLIT) write_float<F32>(weight.y, (block_y() * a.rows + row) * weight.out_features + output, v);
        else write_float<DTYPE>(weight.y, row * weight.out_features + output, v);
    }
}
