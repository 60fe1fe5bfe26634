// y = x * W^T straight from planes, for levels that are sums of signs: AnyBCQ's scales, and short codebooks written
// as such sums (WALSH). One block owns tiles of 16 outputs, its warps share the columns; each plane is read once, for
// all rows of x and all their precisions.
//
// The bound is the integer pipe: memory brings about one plane bit a lane and cycle, and logic instructions run at
// half rate. So a bit is never turned into a number. (word >> s) & 0x01010101 is four weights 0 or 1, the operand of
// an 8-bit tensor-core product that leaves most of its 8 columns free at few rows. A row of x is quantized in each
// unit of 128 columns and cut into SLICES signed digits of WIDTH bits, which fill those columns: 16 bits or more of
// every activation, at no cost. With MASKS = 4 the digits have 5 bits, times 8, 4, 2 or 1, and three of four shifts
// fall away: word & 0x02020202 is twice the bit, met by a digit that is half as large.
// 0/1 become signs by the starting value: with F = 2^MASKS / 4 (1 when MASKS = 1), the products add up to
// 2 F * sum(bit * digit), so starting at -F * sum(digit) gives F * sum(sign * digit), exactly.
//
// Macros: DTYPE of x, LEVELS of scales, OFFSETS 0/1, PLANES (p; the highest stored when MIXED), MIXED 0/1, WALSH 0/1,
// COLUMN_TILES (products of 8 columns side by side), SLICES 2/4, MASKS 1/2/4, SUBGROUPS (groups in a unit: 1, 2, 4),
// ROW_GROUP 0/1 (one group for the whole row), ALIKE 0/1 (MIXED with one row: its precision is that of all columns),
// WARPS and BLOCKS of a multiprocessor, STAGES, SPLIT 0/1, PARTS (weights that share x).

constexpr int WIDTH = 9 - MASKS;              // bits of a digit: 8, 7 or 5
constexpr int FACTOR = MASKS == 4 ? 4 : 1;    // F above
constexpr int TERMS = WALSH ? (1 << PLANES) - 1 : PLANES;
constexpr int LEVEL_BYTES = LEVELS == F32 ? 4 : 2;
constexpr int SLOT_BYTES = TILE * LEVEL_BYTES;  // one level of the 16 outputs: rows 0, 8, 1, 9, ...
constexpr int SLOTS = TERMS + OFFSETS;
constexpr bool EACH = MIXED && !ALIKE;          // every column has levels of its own precision
constexpr bool IN_RING = !EACH && !ROW_GROUP;   // levels travel with the planes
constexpr int STEP_LEVELS = 2 * SUBGROUPS * SLOTS * SLOT_BYTES;
constexpr int STAGE_BYTES = PLANES * STEP_BYTES + (IN_RING ? STEP_LEVELS : 0);
constexpr int PAIRS_PER_ROW = SLICES / 2;
constexpr bool FEW = COLUMN_TILES <= 2;         // few columns: planes and digits of a step fit into registers
constexpr int KEPT = FEW ? COLUMN_TILES : 1;
constexpr int UNIT_UNROLL = FEW && PLANES * COLUMN_TILES <= 12 ? 2 : 1;  // more planes would spill registers
constexpr int TERM_UNROLL = FEW ? TERMS : 1;
constexpr u32 MAGIC_BITS = 0x4b400000;          // 1.5 * 2^23: as float, integers below 2^22 added to these bits
constexpr float MAGIC = 12582912.0f;

struct alignas(16) Pair {  // what a pair of digit columns needs, for each unit and subgroup
    int start_high, start_low;  // where the sums start; MAGIC_BITS is in the low one
    float sum, scale;           // F * sum of the digits; what one of the pair's units is worth
};

// Where the quantized activations of a block's columns lie in shared memory.
struct Activations {
    u8 *base;
    int columns, pairs;
    DEVICE int unit_bytes() const { return columns * UNIT + SUBGROUPS * pairs * static_cast<int>(sizeof(Pair)); }
    // Digits of the four columns of shift s, slots t, in digit column c: bytes in the order of a product's operand.
    DEVICE u32 *digits(int unit, int s, int t, int c) const {
        return reinterpret_cast<u32 *>(base + unit * unit_bytes() + (((s / 4) * 4 + t) * columns + c) * 16) + s % 4;
    }
    DEVICE Pair *pair(int unit, int subgroup, int index) const {
        return reinterpret_cast<Pair *>(base + unit * unit_bytes() + columns * UNIT) + subgroup * pairs + index;
    }
};

// Quantize 128 columns of one row: lane l takes columns 4l ... 4l + 3, which are shift s, slot t.
DEVICE void quantize_unit(const Args &a, const Activations &to, i64 row, i64 column, int unit, int lane) {
    constexpr float LIMIT = static_cast<float>(((1 << (WIDTH - 1)) - 1) << (WIDTH * (SLICES - 1)));
    float x[4];
    read_four<DTYPE>(a, row, column + 4 * lane, x);
    float peak = 0;
    for (int i = 0; i < 4; i++) {
        const float size = x[i] < 0 ? -x[i] : x[i];
        peak = size <= 3.4028235e38f ? (size > peak ? size : peak) : bits_to_float(0x7f800000);  // NaN as infinite
    }
    for (int d = 16; d; d >>= 1) {
        const float other = shuffle_xor(peak, d);
        peak = other > peak ? other : peak;
    }
    const bool finite = peak <= 3.4028235e38f;
    const bool tiny = peak < 1e-30f;
    const float inverse = finite && !tiny ? LIMIT / peak : 0.0f;
    const float scale = finite ? (tiny ? 0.0f : peak / LIMIT) : bits_to_float(0x7fc00000);
    const int t = lane / 2 % 4, s = lane / 8 * 2 + lane % 2;
    u32 words[SLICES];
    int sums[SLICES];
    for (int k = 0; k < SLICES; k++) words[k] = 0, sums[k] = 0;
    for (int i = 0; i < 4; i++) {
        int q = nearest(finite ? x[i] * inverse : 0.0f);
        for (int k = SLICES - 1; k >= 0; k--) {  // the last digit first; the first takes what remains
            const int half = 1 << (WIDTH - 1);
            const int digit = k ? ((q + half) & (2 * half - 1)) - half : q;
            q = (q - digit) >> WIDTH;
            sums[k] += digit;
            words[k] |= (static_cast<u32>(digit << (MASKS - 1 - s % MASKS)) & 0xff) << 8 * i;
        }
    }
    for (int k = 0; k < SLICES; k++) {
        *to.digits(unit, s, t, static_cast<int>(row) * SLICES + k) = words[k];
        for (int d = 16 / SUBGROUPS; d; d >>= 1) sums[k] += shuffle_xor(sums[k], d);
    }
    if (lane % (LANES / SUBGROUPS)) return;
    float worth = scale / FACTOR;
    for (int k = PAIRS_PER_ROW - 1; k >= 0; k--, worth *= 1 << (2 * WIDTH)) {
        const int high = FACTOR * sums[2 * k], low = FACTOR * sums[2 * k + 1];
        const float sum = static_cast<float>(high) * (1 << WIDTH) + static_cast<float>(low);
        *to.pair(unit, lane / (LANES / SUBGROUPS), static_cast<int>(row) * PAIRS_PER_ROW + k) =
            Pair{-high, static_cast<int>(MAGIC_BITS) - low, sum, worth};
    }
}

// Four weights of shift s, as bytes.
DEVICE u32 four_weights(u32 word, int s) {
    if (MASKS == 1) return (s ? word >> (s - 1) : word << 1) & 0x02020202u;
    return (word >> (s / MASKS * MASKS)) & (0x01010101u << s % MASKS);
}

// A level of output rows r and r + 8, which lie side by side.
DEVICE void two_levels(Words2 v, float (&out)[2]) {
    for (int h = 0; h < 2; h++) {
        const u16 half = static_cast<u16>(v.v[0] >> 16 * h);
        out[h] = LEVELS == F32 ? bits_to_float(v.v[h]) : LEVELS == F16 ? half_to_float(half) : bfloat_to_float(half);
    }
}
DEVICE void shared_levels(const u8 *at, float (&out)[2]) {
    if (LEVELS == F32) two_levels(*reinterpret_cast<const Words2 *>(at), out);
    else two_levels({{*reinterpret_cast<const u32 *>(at), 0}}, out);
}
DEVICE void global_levels(const u8 *at, float (&out)[2]) {
    if (LEVELS == F32) two_levels(load(reinterpret_cast<const Words2 *>(at)), out);
    else two_levels({{load(reinterpret_cast<const u32 *>(at)), 0}}, out);
}

DEVICE i64 group_of(const Args &a, i64 unit, int subgroup) {
    if (ROW_GROUP) return 0;
    const i64 group = SUBGROUPS > 1 ? unit * SUBGROUPS + subgroup : unit / a.group_units;
    return group < a.groups ? group : a.groups - 1;  // past the last column x is 0, whatever the scale
}

// One precision's levels: [tiles][groups][terms, then the offset][16 outputs].
struct Table {
    const u8 *base;
    int terms;
    DEVICE void find(const Args &a, const Weight &weight, int p) {
        terms = WALSH ? (1 << p) - 1 : p;
        base = weight.levels + load(reinterpret_cast<const i64 *>(weight.levels) + p) -
               weight.first_tile * a.groups * (terms + OFFSETS) * SLOT_BYTES;
    }
    DEVICE const u8 *at(const Args &a, i64 tile, i64 group, int slot) const {
        return base + ((tile * a.groups + group) * (terms + OFFSETS) + slot) * SLOT_BYTES;
    }
};

DEVICE void copy_step(const Args &a, const Weight &weight, const Table &table, const Position &at, int planes, u8 *slot,
                      int lane) {
#pragma unroll
    for (int i = 0; i < PLANES; i++)
        if (i < planes) copy_async(slot + i * STEP_BYTES + lane * 16, plane_at(a, weight, i, at.tile, at.step, lane));
    if (!IN_RING) return;
    constexpr int CHUNKS = SLOTS * SLOT_BYTES / 16;  // of one group; fewer when the precision is below the highest
    for (int c = lane; c < 2 * SUBGROUPS * CHUNKS; c += LANES) {
        const int which = c / CHUNKS;
        if (MIXED && c % CHUNKS >= (table.terms + OFFSETS) * SLOT_BYTES / 16) continue;
        const i64 group = group_of(a, 2 * at.step + which / SUBGROUPS, which % SUBGROUPS);
        copy_async(slot + PLANES * STEP_BYTES + c * 16, table.at(a, at.tile, group, 0) + c % CHUNKS * 16);
    }
}

struct Lane {  // what a lane keeps for the whole kernel
    int lane, r, t;
    int digit_column[COLUMN_TILES];  // of the products' second operand
    int pair[COLUMN_TILES];          // of their result; past the last pair a lane computes the last one again
    Table table[EACH ? COLUMN_TILES : 1];
    DEVICE void find_tables(const Args &a, const Weight &weight, int planes) {
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++)
            if (EACH) table[EACH ? j : 0].find(a, weight, load(a.wanted + pair[j] / PAIRS_PER_ROW));
        if (!EACH) table[0].find(a, weight, planes);
    }
};

// inner += one term's scale times the signed sums of one subgroup, for all columns.
DEVICE void add_term(const Activations &x, const Lane &me, int unit, int subgroup, const u32 (&word)[2],
                     const u32 (&digits)[KEPT][8], const Pair (&pair)[COLUMN_TILES],
                     const float (&alpha)[EACH ? COLUMN_TILES : 1][2], float (&inner)[COLUMN_TILES][2]) {
    constexpr int PRODUCTS = 4 / SUBGROUPS;
    int c[COLUMN_TILES][4];
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
        c[j][0] = c[j][2] = pair[j].start_high, c[j][1] = c[j][3] = pair[j].start_low;
#pragma unroll
    for (int k = 0; k < PRODUCTS; k++) {
        const int s = 2 * (subgroup * PRODUCTS + k);
        const u32 a0 = four_weights(word[0], s), a1 = four_weights(word[1], s);
        const u32 a2 = four_weights(word[0], s + 1), a3 = four_weights(word[1], s + 1);
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++) {
            if (FEW) {
                multiply_bytes(c[j], a0, a1, a2, a3, digits[FEW ? j : 0][s], digits[FEW ? j : 0][s + 1], c[j]);
            } else {
                const Words2 b = *reinterpret_cast<const Words2 *>(x.digits(unit, s, me.t, me.digit_column[j]));
                multiply_bytes(c[j], a0, a1, a2, a3, b.v[0], b.v[1], c[j]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
        for (int h = 0; h < 2; h++) {
            const u32 v = (static_cast<u32>(c[j][2 * h]) << WIDTH) + static_cast<u32>(c[j][2 * h + 1]);
            inner[j][h] = multiply_add(alpha[EACH ? j : 0][h], bits_to_float(v) - MAGIC, inner[j][h]);
        }
}

// One unit of a step, whose planes lie in `slot`.
DEVICE void add_unit(const Args &a, const Activations &x, const Lane &me, const Position &at, int local_unit, int u,
                     int terms, const u8 *slot, float (&sum)[COLUMN_TILES][2]) {
    const u8 *levels = slot + PLANES * STEP_BYTES;
    Words2 planes[FEW || WALSH ? PLANES : 1];
    const auto plane = [&](int i) {
        return *reinterpret_cast<const Words2 *>(slot + i * STEP_BYTES + me.lane * 16 + u * 8);
    };
    if (FEW || WALSH)
#pragma unroll
        for (int i = 0; i < PLANES; i++)
            if (!MIXED || i < terms) planes[i] = plane(i);
    u32 digits[KEPT][8];
    if (FEW)
#pragma unroll
        for (int j = 0; j < KEPT; j++)
            for (int half = 0; half < 2; half++) {
                const u32 *from = x.digits(local_unit, 4 * half, me.t, me.digit_column[j]);
                const Words4 w = *reinterpret_cast<const Words4 *>(from);
                for (int i = 0; i < 4; i++) digits[j][4 * half + i] = w.v[i];
            }
#pragma unroll
    for (int g = 0; g < SUBGROUPS; g++) {
        const i64 group = group_of(a, 2 * at.step + u, g);
        const u8 *ring = levels + (u * SUBGROUPS + g) * SLOTS * SLOT_BYTES;
        const auto level = [&](int j, int slot, float (&out)[2]) {
            const Table &table = me.table[j];
            const int mine = slot < TERMS ? slot : table.terms;
            const u8 *global = table.at(a, at.tile, group, mine) + me.r * 2 * LEVEL_BYTES;
            if (IN_RING) shared_levels(ring + (MIXED ? mine : slot) * SLOT_BYTES + me.r * 2 * LEVEL_BYTES, out);
            else if (!MIXED || slot == TERMS || slot < table.terms) global_levels(global, out);
            else out[0] = out[1] = 0;
        };
        float inner[COLUMN_TILES][2], alpha[EACH ? COLUMN_TILES : 1][2];
        Pair pair[COLUMN_TILES];
        if (OFFSETS)
#pragma unroll
            for (int j = 0; j < (EACH ? COLUMN_TILES : 1); j++) level(j, TERMS, alpha[j]);
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++) {
            pair[j] = *x.pair(local_unit, g, me.pair[j]);
            for (int h = 0; h < 2; h++) inner[j][h] = OFFSETS ? alpha[EACH ? j : 0][h] * pair[j].sum : 0.0f;
        }
#pragma unroll TERM_UNROLL
        for (int i = 0; i < TERMS; i++) {
            if (MIXED && i >= terms) continue;
#pragma unroll
            for (int j = 0; j < (EACH ? COLUMN_TILES : 1); j++) level(j, i, alpha[j]);
            u32 word[2];
            if (WALSH) {
                word[0] = word[1] = 0;
#pragma unroll
                for (int k = 0; k < PLANES; k++)
                    for (int h = 0; h < 2; h++)
                        if ((i + 1) >> k & 1) word[h] ^= planes[WALSH ? k : 0].v[h];
            } else {
                const Words2 w = FEW ? planes[FEW && !WALSH ? i : 0] : plane(i);
                word[0] = w.v[0], word[1] = w.v[1];
            }
            add_term(x, me, local_unit, g, word, digits, pair, alpha, inner);
        }
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++)
            for (int h = 0; h < 2; h++) sum[j][h] = multiply_add(pair[j].scale, inner[j][h], sum[j][h]);
    }
}

// Add what the warps found for one tile, always in the same order, and write it.
DEVICE void finish_tile(const Args &a, const Weight &weight, const Lane &me, int warp, i64 tile, float *sums,
                        float (&sum)[COLUMN_TILES][2]) {
    const int rows = static_cast<int>(a.rows);
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
        for (int h = 0; h < 2; h++) {
            float v = sum[j][h];
            if (SLICES == 4) v += shuffle_xor(v, 1);
            const int row = (4 * j + me.t) / PAIRS_PER_ROW;
            if (row < rows && (4 * j + me.t) % PAIRS_PER_ROW == 0) sums[(warp * rows + row) * TILE + me.r + 8 * h] = v;
        }
    block_barrier();
    write_tile(a, weight, tile, sums);
}

KERNEL(WARPS * LANES, BLOCKS) multiply(const Args a) {
    DYNAMIC_SHARED(shared);
    const int warp = thread_index() / LANES;
    Lane me;
    me.lane = thread_index() % LANES, me.r = me.lane / 4, me.t = me.lane % 4;
    u8 *ring = shared + warp * STAGES * STAGE_BYTES;
    const Activations x{shared + WARPS * STAGES * STAGE_BYTES, static_cast<int>(a.rows) * SLICES,
                        static_cast<int>(a.rows) * PAIRS_PER_ROW};
    float *sums = reinterpret_cast<float *>(x.base + 2 * a.split_steps * x.unit_bytes());
    const i64 begin = block_y() * a.split_steps;
    const i64 end = begin + a.split_steps < a.steps ? begin + a.split_steps : a.steps;
    const int planes = MIXED ? highest_wanted(a, me.lane) : PLANES;
    const int terms = WALSH ? (1 << planes) - 1 : planes;
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++) {
        const int column = 8 * j + me.r, pair = 4 * j + me.t;
        me.digit_column[j] = column < x.columns ? column : x.columns - 1;
        me.pair[j] = pair < x.pairs ? pair : x.pairs - 1;
    }
    Weight copied = first_weight(a), weight = copied;  // of the tile that is copied, and that is multiplied
    me.find_tables(a, weight, planes);

    const i64 all_tiles = count_tiles(a);
    Position ahead{begin + warp < end ? block_x() : all_tiles, begin + warp};
    Table copied_table = me.table[0];
    const auto copy_next = [&](int slot) {
        if (ahead.within(a)) {
            if (enter_part(copied, a, ahead.tile) && IN_RING) copied_table.find(a, copied, planes);
            copy_step(a, copied, copied_table, ahead, planes, ring + slot * STAGE_BYTES, me.lane);
            ahead.next(WARPS, begin + warp, end);
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_next(i);
    for (i64 step = begin + warp; step < end; step += WARPS)
        for (int u = 0; u < 2; u++)
            for (i64 row = 0; row < a.rows; row++) {
                const int unit = static_cast<int>(2 * (step - begin)) + u;
                quantize_unit(a, x, row, step * STEP + u * UNIT, unit, me.lane);
            }

    int slot = 0, parity = 0;
    for (i64 tile = block_x(); tile < all_tiles; tile += blocks_x(), parity ^= 1) {
        if (enter_part(weight, a, tile) && !IN_RING) me.find_tables(a, weight, planes);
        float sum[COLUMN_TILES][2] = {};
        for (i64 step = begin + warp; step < end; step += WARPS) {
            copy_wait<STAGES - 2>();
            warp_barrier();  // the other lanes' copies have landed, and they are done with the slot before this one
            copy_next(slot ? slot - 1 : STAGES - 1);
            const u8 *here = ring + slot * STAGE_BYTES;
            const Position at{tile, step};
            const int unit = static_cast<int>(2 * (step - begin));
#pragma unroll UNIT_UNROLL
            for (int u = 0; u < 2; u++) add_unit(a, x, me, at, unit + u, u, terms, here, sum);
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
        finish_tile(a, weight, me, warp, tile, sums + parity * WARPS * a.rows * TILE, sum);
    }
}
