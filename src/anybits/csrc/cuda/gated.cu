// y = silu(gate) * up, element by element; silu(gate) is rounded before it is multiplied, as transformers does.
// Macros: DTYPE.
struct Args {
    const u8 *gate, *up;
    u8 *y;
    i64 total;
};

KERNEL(256, 1) silu_mul(const Args a) {
    const i64 i = block_x() * 256 + thread_index();
    if (i >= a.total) return;
    const float v = read_float<DTYPE>(a.gate, i);
    const float silu = rounded<DTYPE>(v / (1.0f + exponential(-v)));
    write_float<DTYPE>(a.y, i, silu * read_float<DTYPE>(a.up, i));
}
