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
    const int64_t pages = bytes / 4096;
    parallel(threads, [&](int part, int parts) {
        uint64_t sums[16] = {0};
        for (int64_t page = pages * part / parts; page < pages * (part + 1) / parts; page++) {
            const char *at = base + page * 4096;
            for (int line = 0; line < 4096; line += 128) {
                __builtin_prefetch(at + line + 4096);
                __builtin_prefetch(at + line + 4160);
                uint64_t words[16];
                memcpy(words, at + line, 128);
                for (int i = 0; i < 16; i++) sums[i] |= words[i];
            }
        }
        uint64_t all = 0;
        for (uint64_t s : sums) all |= s;
        sink |= all;
    });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    return taken.count();
}
