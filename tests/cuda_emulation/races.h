// Races in shared memory, found whatever the order in which threads ran: every access of the kernel is compared with
// the last ones to the same bytes, and what no barrier stands between is an error. The compiler calls the hooks below
// for each access (-fsanitize=thread without its library). As on a GPU, only barriers order accesses: a block's those
// of all threads, a warp's those of its lanes; shuffles and products order nothing. An asynchronous copy is a write
// that lasts from its start until its thread has waited for it; other threads then need a barrier as well.
#pragma once

#define NOT_TRACED __attribute__((no_sanitize("thread")))

namespace emulation {

struct Cell {  // what happened last to a byte of shared memory
    u64 written, read;             // block barriers that had been passed
    u32 write_step, read_step;     // and warp barriers
    short writer, reader;          // threads; MANY lanes of a warp
    short reading_warp;            // MANY warps
    bool copying;
};
constexpr short MANY = -2;
static u64 block_step = 1;         // block barriers passed, counted through all blocks of all launches
static u64 first_step;             // of this block
static std::vector<u32> warp_step; // of each warp
static size_t shared_size;
static Cell cells[SHARED + FENCE];
static bool running;

NOT_TRACED static bool ordered(u64 step, u32 substep, int thread) {
    return step < block_step || thread == current ||
           (thread / WARP == current / WARP && substep < warp_step[current / WARP]);
}
NOT_TRACED static void race(const char *what, int other, u64 at) {
    static char said[128];
    if (failure[0]) return;
    snprintf(said, sizeof said, "race: %s, and thread %d was there with no barrier between, at byte", what, other);
    fail(said, at);
}
NOT_TRACED static void touch(const void *pointer, size_t size, bool writing, bool copying = false) {
    const u64 at = reinterpret_cast<u64>(pointer) - reinterpret_cast<u64>(shared);
    if (!running || at >= SHARED + FENCE) return;
    if (at + size > shared_size) return fail("access behind the end of shared memory", at);
    if ((size & (size - 1)) == 0 && at % size) return fail("misaligned access to shared memory", at);
    const int warp = current / WARP;
    for (Cell *c = cells + at; c < cells + at + size; c++) {
        const bool fresh = c->written < first_step;
        if (!fresh && c->copying) return race("memory used before its copy was waited for", c->writer, at);
        if (!fresh && !ordered(c->written, c->write_step, c->writer))
            return race(writing ? "two threads write" : "a read of what another thread writes", c->writer, at);
        if (!writing) {
            if (fresh) return fail("read of shared memory that nothing was written to", at);
            if (c->read != block_step) c->read = block_step, c->reading_warp = warp, c->read_step = 0, c->reader = current;
            if (c->reading_warp != warp) c->reading_warp = MANY;
            else if (warp_step[warp] > c->read_step) c->read_step = warp_step[warp], c->reader = current;
            else if (c->reader != current) c->reader = MANY;
            continue;
        }
        if (c->read == block_step && (c->reading_warp != warp || (c->read_step == warp_step[warp] && c->reader != current)))
            return race("a write over what another thread reads", c->reader, at);
        c->written = block_step, c->write_step = warp_step[warp], c->writer = current, c->copying = copying;
    }
}
NOT_TRACED static void landed(const void *pointer, size_t size) {
    const u64 at = reinterpret_cast<u64>(pointer) - reinterpret_cast<u64>(shared);
    for (Cell *c = cells + at; c < cells + at + size; c++)
        c->written = block_step, c->write_step = warp_step[current / WARP], c->copying = false;
}
NOT_TRACED static void begin_block(size_t bytes) {
    first_step = ++block_step, shared_size = bytes, running = true;
    warp_step.assign(warps.size(), 1);
}

static void end_block() { running = false; }
static void passed_block() { block_step++; }
static void passed_warp() { warp_step[current / WARP]++; }

}  // namespace emulation

#define HOOK extern "C" NOT_TRACED __attribute__((visibility("hidden"))) void
#define SIZED(bytes)                                                                  \
    HOOK __tsan_read##bytes(void *at) { emulation::touch(at, bytes, false); }         \
    HOOK __tsan_write##bytes(void *at) { emulation::touch(at, bytes, true); }         \
    HOOK __tsan_unaligned_read##bytes(void *at) { emulation::touch(at, bytes, false); } \
    HOOK __tsan_unaligned_write##bytes(void *at) { emulation::touch(at, bytes, true); }
SIZED(1) SIZED(2) SIZED(4) SIZED(8) SIZED(16)
HOOK __tsan_read_range(void *at, unsigned long size) { emulation::touch(at, size, false); }
HOOK __tsan_write_range(void *at, unsigned long size) { emulation::touch(at, size, true); }
HOOK __ubsan_handle_type_mismatch_v1(void *, void *at) { emulation::fail("pointer off its type's alignment", (u64)at); }
HOOK __tsan_vptr_update(void *, void *) {}
HOOK __tsan_vptr_read(void *) {}
HOOK __tsan_func_entry(void *) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_init() {}
