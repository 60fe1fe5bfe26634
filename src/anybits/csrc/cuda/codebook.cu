// y = x * W^T for codebooks of any precision: planes become indices, indices become fp16 centroids in registers, and
// those are the first operand of fp16 tensor-core products with fp32 sums. One decode serves all rows of x. Activations
// are fp16 in shared memory: fp16 ones as they are; bf16 ones times a power of two for each unit of 128 columns, which
// loses nothing above 2^-24 of the unit's largest; fp32 ones as two fp16 numbers side by side.
//
// Mixed precisions: each precision that some row wants is decoded from the same planes, and meets a second operand in
// which the other rows are 0.
//
// Macros: DTYPE of x, PLANES (p; the highest stored when MIXED), MIXED 0/1, COLUMN_TILES, SLICES (2 when x is fp32,
// else 1), WARPS, BLOCKS, STAGES, SPLIT 0/1, PARTS (weights that share x).

constexpr int STAGE_BYTES = PLANES * STEP_BYTES;
constexpr int THREADS = WARPS * LANES;
constexpr int MOST_TABLE = MIXED ? 32 * ((2 << PLANES) - 2) : 32 << PLANES;  // bytes of one tile's codebooks
constexpr int TABLE_CHUNKS = (MOST_TABLE / 16 + THREADS - 1) / THREADS;
constexpr float LOW_SCALE = 2048.0f;  // 2^11: what an fp16 number leaves of an fp32 one is smaller by this

struct Activations {
    u8 *base;
    int columns;
    DEVICE int unit_bytes() const { return columns * UNIT * 2 + (columns * 4 + 15) / 16 * 16; }
    // The four halves of shift s, slot t, column c.
    DEVICE Words2 *halves(int unit, int s, int t, int c) const {
        return reinterpret_cast<Words2 *>(base + unit * unit_bytes()) + (s * 4 + t) * columns + c;
    }
    DEVICE float *scale(int unit, int c) const {
        return reinterpret_cast<float *>(base + unit * unit_bytes() + columns * UNIT * 2) + c;
    }
};

// 128 columns of one row: lane l takes columns 4l ... 4l + 3, which are shift s, slot t.
DEVICE void convert_unit(const Args &a, const Activations &to, i64 row, i64 column, int unit, int lane) {
    float x[4];
    read_four<DTYPE>(a, row, column + 4 * lane, x);
    float up = 1, down = 1;
    if (DTYPE != F16) {
        float peak = 0;
        for (int i = 0; i < 4; i++) {
            const float size = x[i] < 0 ? -x[i] : x[i];
            peak = size <= 3.4028235e38f ? (size > peak ? size : peak) : bits_to_float(0x7f800000);
        }
        for (int d = 16; d; d >>= 1) {
            const float other = shuffle_xor(peak, d);
            peak = other > peak ? other : peak;
        }
        // 2^14 over the peak's power of two; a peak too small for that to be a normal number counts as 2^-107.
        const int exponent = static_cast<int>(float_to_bits(peak) >> 23);
        const bool finite = exponent < 255;
        up = bits_to_float(static_cast<u32>(268 - (exponent < 20 ? 20 : finite ? exponent : 127)) << 23);
        down = finite ? 1.0f / up : bits_to_float(0x7fc00000);
    }
    const int t = lane / 2 % 4, s = lane / 8 * 2 + lane % 2;
    for (int k = 0; k < SLICES; k++) {
        Words2 out{{0, 0}};
        for (int i = 0; i < 4; i++) {
            const u16 h = float_to_half(x[i] * up);
            out.v[i / 2] |= static_cast<u32>(h) << 16 * (i % 2);
            x[i] = (x[i] * up - half_to_float(h)) * (LOW_SCALE / up);
        }
        const int c = static_cast<int>(row) * SLICES + k;
        *to.halves(unit, s, t, c) = out;
        if (lane == 0) *to.scale(unit, c) = k ? down / LOW_SCALE : down;
    }
}

// Indices of the four weights of shift s, as bytes.
DEVICE u32 four_codes(const u32 (&word)[PLANES], int s, int p) {
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < PLANES; i++) {
        if (MIXED) {
            if (i < p) codes = codes * 2 + (word[i] >> s & 0x01010101u);
        } else {
            const int to = PLANES - 1 - i;  // the bit's place in the index
            codes |= (s >= to ? word[i] >> (s - to) : word[i] << (to - s)) & (0x01010101u << to);
        }
    }
    return codes;
}

// Their centroids in two registers.
DEVICE Words2 four_centroids(const u16 *table, u32 codes) {
    Words2 out;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 low = table[codes >> 16 * i & 255], high = table[codes >> (16 * i + 8) & 255];
        out.v[i] = low | high << 16;
    }
    return out;
}

// The codebooks of one tile on their way from memory, in registers until the tile before is done.
struct TableCopy {
    Words4 chunk[TABLE_CHUNKS];
    int bytes, stride, first;
    DEVICE void size(const Args &a, int top) {
        const int stored = static_cast<int>(a.stored);
        first = MIXED ? 0 : 32 * (stored & ((1 << PLANES) - 1));
        bytes = MIXED ? 32 * (stored & ((2 << top) - 1)) : 32 << PLANES;
        stride = 32 * stored;
    }
    DEVICE void fetch(const Args &a, Weight &weight, i64 tile) {
        if (tile >= count_tiles(a)) return;
        enter_part(weight, a, tile);
        tile -= weight.first_tile;
#pragma unroll
        for (int i = 0; i < TABLE_CHUNKS; i++) {
            const int at = (i * THREADS + thread_index()) * 16;
            if (at < bytes) chunk[i] = load(reinterpret_cast<const Words4 *>(weight.levels + tile * stride + first + at));
        }
    }
    DEVICE void put(u8 *table) const {
#pragma unroll
        for (int i = 0; i < TABLE_CHUNKS; i++) {
            const int at = (i * THREADS + thread_index()) * 16;
            if (at < bytes) *reinterpret_cast<Words4 *>(table + at) = chunk[i];
        }
    }
};

struct Lane {
    int lane, r, t;
    int column[COLUMN_TILES];  // of the second operand; past the last column a lane takes the last one again
    int wanted[COLUMN_TILES];  // the precision of that column's row
};

DEVICE void add_unit(const Args &a, const Activations &x, const Lane &me, int unit, int u, int p, const u8 *slot,
                     const u8 *table, float (&c)[COLUMN_TILES][4]) {
    u32 word[2][PLANES];
#pragma unroll
    for (int i = 0; i < PLANES; i++)
        if (!MIXED || i < p) {
            const Words2 w = *reinterpret_cast<const Words2 *>(slot + i * STEP_BYTES + me.lane * 16 + u * 8);
            word[0][i] = w.v[0], word[1][i] = w.v[1];
        }
    const u16 *centroids = reinterpret_cast<const u16 *>(table);
    if (MIXED) centroids += 16 * (static_cast<int>(a.stored) & ((1 << p) - 1));
    centroids += me.r << p;
#pragma unroll
    for (int s = 0; s < 8; s++) {
        const Words2 top = four_centroids(centroids, four_codes(word[0], s, p));
        const Words2 bottom = four_centroids(centroids + (8 << p), four_codes(word[1], s, p));
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++) {
            Words2 b = *x.halves(unit, s, me.t, me.column[j]);
            if (MIXED && me.wanted[j] != p) b.v[0] = b.v[1] = 0;
            multiply_halves(c[j], top.v[0], bottom.v[0], top.v[1], bottom.v[1], b.v[0], b.v[1]);
        }
    }
}

DEVICE void finish_tile(const Args &a, const Weight &weight, const Lane &me, int warp, i64 tile, float *parts,
                        float (&sum)[COLUMN_TILES][4]) {
    const int rows = static_cast<int>(a.rows);
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
        for (int i = 0; i < 4; i += SLICES) {
            const int row = (8 * j + 2 * me.t + i % 2) / SLICES;
            const float v = SLICES == 2 ? sum[j][i] + sum[j][i + SLICES - 1] : sum[j][i];
            if (row < rows) parts[(warp * rows + row) * TILE + me.r + i / 2 * 8] = v;
        }
    block_barrier();
    write_tile(a, weight, tile, parts);
}

KERNEL(THREADS, BLOCKS) multiply(const Args a) {
    DYNAMIC_SHARED(shared);
    const int warp = thread_index() / LANES;
    Lane me;
    me.lane = thread_index() % LANES, me.r = me.lane / 4, me.t = me.lane % 4;
    const int planes = MIXED ? highest_wanted(a, me.lane) : PLANES;
    TableCopy next;
    next.size(a, planes);
    u8 *ring = shared + warp * STAGES * STAGE_BYTES;
    u8 *tables = shared + WARPS * STAGES * STAGE_BYTES;
    const Activations x{tables + 2 * next.bytes, static_cast<int>(a.rows) * SLICES};
    float *parts = reinterpret_cast<float *>(x.base + 2 * a.split_steps * x.unit_bytes());
    const i64 begin = block_y() * a.split_steps;
    const i64 end = begin + a.split_steps < a.steps ? begin + a.split_steps : a.steps;
    int used = 0;
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++) {
        const int column = 8 * j + me.r;
        me.column[j] = column < x.columns ? column : x.columns - 1;
        me.wanted[j] = MIXED ? load(a.wanted + me.column[j] / SLICES) : PLANES;
    }
    for (i64 row = 0; MIXED && row < a.rows; row++) used |= 1 << load(a.wanted + row);

    const i64 all_tiles = count_tiles(a);
    Position ahead{begin + warp < end ? block_x() : all_tiles, begin + warp};
    Weight copied = first_weight(a), looked_up = copied, weight = copied;  // planes, codebooks, and what is multiplied
    const auto copy_next = [&](int slot) {
        if (ahead.within(a)) {
            enter_part(copied, a, ahead.tile);
#pragma unroll
            for (int i = 0; i < PLANES; i++)
                if (i < planes)
                    copy_async(ring + slot * STAGE_BYTES + i * STEP_BYTES + me.lane * 16,
                               plane_at(a, copied, i, ahead.tile, ahead.step, me.lane));
            ahead.next(WARPS, begin + warp, end);
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_next(i);
    next.fetch(a, looked_up, block_x());
    for (i64 step = begin + warp; step < end; step += WARPS)
        for (int u = 0; u < 2; u++)
            for (i64 row = 0; row < a.rows; row++)
                convert_unit(a, x, row, step * STEP + u * UNIT, static_cast<int>(2 * (step - begin)) + u, me.lane);
    if (block_x() < all_tiles) next.put(tables);
    block_barrier();

    int slot = 0, parity = 0;
    for (i64 tile = block_x(); tile < all_tiles; tile += blocks_x(), parity ^= 1) {
        enter_part(weight, a, tile);
        next.fetch(a, looked_up, tile + blocks_x());
        float sum[COLUMN_TILES][4] = {};
        for (i64 step = begin + warp; step < end; step += WARPS) {
            copy_wait<STAGES - 2>();
            warp_barrier();  // the other lanes' copies have landed, and they are done with the slot before this one
            copy_next(slot ? slot - 1 : STAGES - 1);
            const int first = static_cast<int>(2 * (step - begin));
#pragma unroll 1
            for (int u = 0; u < 2; u++) {
                const u8 *here = ring + slot * STAGE_BYTES, *table = tables + parity * next.bytes;
                float c[COLUMN_TILES][4] = {};
                if (MIXED)
                    for (int p = 1; p <= planes; p++) {
                        if (used >> p & 1) add_unit(a, x, me, first + u, u, p, here, table, c);
                    }
                else
                    add_unit(a, x, me, first + u, u, PLANES, here, table, c);
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; j++)
                    for (int i = 0; i < 4; i++) {
                        const int column = 8 * j + 2 * me.t + i % 2;
                        const float worth = *x.scale(first + u, column < x.columns ? column : x.columns - 1);
                        sum[j][i] = multiply_add(worth, c[j][i], sum[j][i]);
                    }
            }
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
        if (tile + blocks_x() < all_tiles) next.put(tables + (parity ^ 1) * next.bytes);
        finish_tile(a, weight, me, warp, tile, parts + parity * WARPS * a.rows * TILE, sum);
    }
}
