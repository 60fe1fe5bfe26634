// y = x * W^T, one thread for each element of y, one weight after the other: slow, and plainly what the formula says.
// ANYBITS_CUDA_KERNEL=simple runs it in place of all others, so that a wrong result can be told from a wrong kernel.
// Macros: DTYPE, MIXED (else the precision is PLANES), CODEBOOK, LEVELS, OFFSETS, SUBGROUPS.
KERNEL(256, 1) multiply(const Args a) {
    const i64 i = block_x() * 256 + thread_index();
    if (i >= a.rows * a.out_features) return;
    const i64 row = i / a.out_features, output = i % a.out_features;
    const int p = MIXED ? load(a.wanted + row) : PLANES;
    const Levels levels(a, p);
    float sum = 0;
    for (i64 column = 0; column < a.in_features; column++) {
        const i64 group = CODEBOOK ? 0 : levels.group(a, column);
        float weight = 0;
        u32 code = 0;
        if (!CODEBOOK && OFFSETS) weight = levels.scale(a, output, group, p);
        for (int plane = 0; plane < p; plane++) {
            const u32 bit = plane_word(a, plane, output, column) >> bit_of(column) & 1;
            code = code * 2 + bit;
            if (!CODEBOOK) weight += bit ? levels.scale(a, output, group, plane) : -levels.scale(a, output, group, plane);
        }
        if (CODEBOOK) weight = levels.centroid(a, output, code);
        sum = multiply_add(weight, read_float<DTYPE>(a.x, row * a.x_stride + column), sum);
    }
    write_float<DTYPE>(a.y, i, sum);
}
