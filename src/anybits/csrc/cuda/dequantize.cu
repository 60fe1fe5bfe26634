// W at one precision, [out_features, in_features] in DTYPE: for so many rows that a dense product is faster. A warp
// takes one step of one tile; a lane turns its words into runs of eight columns. Values are summed in fp32 in the
// order of the specification: offset, plane 0, plane 1, ... Macros: DTYPE, PLANES (p), CODEBOOK, LEVELS, OFFSETS,
// SUBGROUPS. Args: y is W.
constexpr int SIZE = DTYPE == F32 ? 4 : 2;

DEVICE void write_eight(const Args &a, i64 row, i64 column, const float (&w)[8]) {
    const i64 first = row * a.in_features + column;
    u8 *at = a.y + first * SIZE;
    if (DTYPE != F32 && column + 8 <= a.in_features && reinterpret_cast<u64>(at) % 16 == 0) {
        Words4 out;
        for (int i = 0; i < 4; i++) {
            const u32 low = DTYPE == F16 ? float_to_half(w[2 * i]) : float_to_bfloat(w[2 * i]);
            const u32 high = DTYPE == F16 ? float_to_half(w[2 * i + 1]) : float_to_bfloat(w[2 * i + 1]);
            out.v[i] = low | high << 16;
        }
        store(reinterpret_cast<Words4 *>(at), out);
        return;
    }
    for (int i = 0; i < 8; i++)
        if (column + i < a.in_features) write_float<DTYPE>(a.y, first + i, w[i]);
}

KERNEL(256, 1) dequantize(const Args a) {
    const int lane = thread_index() % LANES;
    const i64 item = block_x() * 8 + thread_index() / LANES;
    const i64 tile = item / a.steps, step = item % a.steps;
    if (tile >= a.tiles) return;
    Words4 words[PLANES];
#pragma unroll
    for (int i = 0; i < PLANES; i++) words[i] = load(reinterpret_cast<const Words4 *>(plane_at(a, i, tile, step, lane)));
    const Levels levels(a, PLANES);
#pragma unroll
    for (int which = 0; which < 4; which++) {
        const i64 row = tile * TILE + lane / 4 + which % 2 * 8;
        if (row >= a.out_features) continue;
        for (int q = 0; q < 4; q++) {
            const i64 column = step * STEP + which / 2 * UNIT + q * 32 + lane % 4 * 8;
            if (column >= a.in_features) continue;
            float w[8], scale[PLANES], offset = 0;
            if (!CODEBOOK) {
                const i64 group = levels.group(a, column);
                if (OFFSETS) offset = levels.scale(a, row, group, PLANES);
#pragma unroll
                for (int i = 0; i < PLANES; i++) scale[i] = levels.scale(a, row, group, i);
            }
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int bit = k % 4 * 8 + q * 2 + k / 4;
                u32 code = 0;
                w[k] = offset;
#pragma unroll
                for (int i = 0; i < PLANES; i++) {
                    const u32 b = words[i].v[which] >> bit & 1;
                    code = code * 2 + b;
                    if (!CODEBOOK) w[k] += b ? scale[i] : -scale[i];
                }
                if (CODEBOOK) w[k] = levels.centroid(a, row, code);
            }
            write_eight(a, row, column, w);
        }
    }
}
