// y = weight * x / sqrt(mean(x^2) + eps) for rows of x, one block each; the fraction is rounded before it is multiplied,
// as transformers does. Macros: DTYPE of all, THREADS. The sum is taken in fp32, always in the same order.
struct Args {
    const u8 *x, *weight;  // [rows, columns], [columns]
    u8 *y;
    i64 columns;
    double eps;
};

KERNEL(THREADS, 1) rms_norm(const Args a) {
    DYNAMIC_SHARED(shared);
    float *sums = reinterpret_cast<float *>(shared);
    const i64 first = block_x() * a.columns;
    float sum = 0;
    for (i64 i = thread_index(); i < a.columns; i += THREADS) {
        const float v = read_float<DTYPE>(a.x, first + i);
        sum = multiply_add(v, v, sum);
    }
    for (int d = 16; d; d >>= 1) sum += shuffle_xor(sum, d);
    if (thread_index() % 32 == 0) sums[thread_index() / 32] = sum;
    block_barrier();
    sum = 0;
    for (int w = 0; w < THREADS / 32; w++) sum += sums[w];
    const float scale = inverse_root(sum / static_cast<float>(a.columns) + static_cast<float>(a.eps));
    for (i64 i = thread_index(); i < a.columns; i += THREADS) {
        const float v = rounded<DTYPE>(read_float<DTYPE>(a.x, first + i) * scale);
        write_float<DTYPE>(a.y, first + i, v * read_float<DTYPE>(a.weight, i));
    }
}
