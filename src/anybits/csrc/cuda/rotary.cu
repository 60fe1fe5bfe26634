// New positions of a static cache: queries and keys are rotated, keys and values put into their slots. Halves rotate
// against each other; x * cos and rotate_half(x) * sin are rounded, then their sum, as transformers does. Macros: DTYPE.
struct Args {
    const u8 *query, *key, *value;  // [batch, rows, heads * dim], [batch, rows, kv_heads * dim or value_dim]
    const u8 *cos, *sin;            // [batch or 1, rows, dim], angle_stride elements from one sequence to the next
    const i64 *slots;               // [rows]
    u8 *rotated, *keys, *values;    // query's shape; [batch, kv_heads, size, dim or value_dim]
    i64 batch, rows, heads, kv_heads, dim, value_dim, size, angle_stride;
};

// Rotate elements d and d + dim / 2 of the head at `from` and write them at `to`.
DEVICE void rotate(const Args &a, const u8 *x, i64 from, u8 *y, i64 to, i64 angles, i64 d) {
    const i64 half = a.dim / 2;
    const float low = read_float<DTYPE>(x, from + d), high = read_float<DTYPE>(x, from + d + half);
    for (int side = 0; side < 2; side++) {
        const i64 at = d + side * half;
        const float straight = rounded<DTYPE>((side ? high : low) * read_float<DTYPE>(a.cos, angles + at));
        const float turned = rounded<DTYPE>((side ? low : -high) * read_float<DTYPE>(a.sin, angles + at));
        write_float<DTYPE>(y, to + at, straight + turned);
    }
}

KERNEL(256, 1) rotate_into(const Args a) {
    const i64 half = a.dim / 2, queries = a.heads * half, pairs = queries + a.kv_heads * half;
    const i64 items = pairs + a.kv_heads * a.value_dim;
    const i64 index = block_x() * 256 + thread_index();
    const i64 row = index / items, sequence = row / a.rows;
    i64 item = index % items;
    if (sequence >= a.batch) return;
    const i64 slot = load(a.slots + row % a.rows), angles = sequence * a.angle_stride + row % a.rows * a.dim;
    if (item < queries) {
        const i64 at = (row * a.heads + item / half) * a.dim;
        rotate(a, a.query, at, a.rotated, at, angles, item % half);
    } else if (item < pairs) {
        item -= queries;
        const i64 head = item / half, to = ((sequence * a.kv_heads + head) * a.size + slot) * a.dim;
        rotate(a, a.key, (row * a.kv_heads + head) * a.dim, a.keys, to, angles, item % half);
    } else {
        item -= pairs;
        const i64 head = item / a.value_dim, d = item % a.value_dim;
        const float v = read_float<DTYPE>(a.value, (row * a.kv_heads + head) * a.value_dim + d);
        write_float<DTYPE>(a.values, ((sequence * a.kv_heads + head) * a.size + slot) * a.value_dim + d, v);
    }
}
