// What a kernel that is bound by memory can at best reach: reading, with as many threads as the kernel uses.
#include <string.h>

#include <atomic>
#include <chrono>

#include "anybits.h"
#include "threads.h"

extern "C" double ab_read_seconds(const void *memory, int64_t bytes, int threads) {
    const auto start = std::chrono::steady_clock::now();
    std::atomic<uint64_t> sink{0};
    const char *base = static_cast<const char *>(memory);
    // Several streams at once, as the planes of a weight are: one stream does not fill a core's share of the memory.
    constexpr int STREAMS = 4;
    const int64_t stretch = bytes / STREAMS / 4096 * 4096, pages = stretch / 4096;
    parallel(threads, [&](int part, int parts) {
        uint64_t sums[8] = {0};
        for (int64_t at = pages * part / parts * 4096; at < pages * (part + 1) / parts * 4096; at += 64)
            for (int stream = 0; stream < STREAMS; stream++) {
                const char *line = base + stream * stretch + at;
                __builtin_prefetch(line + 2048);
                uint64_t words[8];
                memcpy(words, line, 64);
                for (int i = 0; i < 8; i++) sums[i] |= words[i];
            }
        uint64_t all = 0;
        for (uint64_t s : sums) all |= s;
        sink |= all;
    });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    return taken.count();
}
