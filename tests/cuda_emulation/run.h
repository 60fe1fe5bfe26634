// The entry point of an emulated kernel: NULL or "" when all went well, else one sentence.
extern "C" const char *emulate(const void *args, i64 grid_x, i64 grid_y, int threads, i64 shared_bytes,
                               const u64 *buffers, int count, u32 seed) {
    Args a;
    memcpy(&a, args, sizeof a);
    emulation::entry = [a] { KERNEL_NAME(a); };
    return emulation::run(grid_x, grid_y, threads, shared_bytes, buffers, count, seed);
}
