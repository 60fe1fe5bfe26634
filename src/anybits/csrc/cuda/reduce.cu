// y = the sum of SPLIT parts, in the order of the columns. Macros: DTYPE. Args: x holds the parts, steps their number.
KERNEL(256, 1) reduce(const Args a) {
    const i64 total = a.rows * a.out_features;
    const i64 i = block_x() * 256 + thread_index();
    if (i >= total) return;
    float v = 0;
    for (i64 part = 0; part < a.steps; part++) v += read_float<F32>(a.x, part * total + i);
    write_float<DTYPE>(a.y, i, v);
}
