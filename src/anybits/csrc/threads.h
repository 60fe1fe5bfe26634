// torch's own OpenMP team, found at run time. Linking a runtime of our own would start a second pool, and two
// spinning pools beside each other cost milliseconds at every change between them.
#pragma once

#include <stdint.h>

#include <atomic>

bool threads_use(const char *library);

// Run body(context, part, parts) for every part on up to `threads` threads; returns when all are done.
void threads_run(int threads, void (*body)(void *context, int part, int parts), void *context);

// Wait, inside of a body that has several parts, until all parts are here.
void threads_wait();

// Numbers 0 ... count - 1, which threads take in pieces: large ones first, so that all end at about the same time.
struct Queue {
    std::atomic<int64_t> taken{0};

    // Takes at least `least`, or what is left; false when nothing is.
    bool take(int64_t count, int64_t least, int parts, int64_t *first, int64_t *last) {
        int64_t at = taken.load(std::memory_order_relaxed), piece;
        do {
            if (at >= count) return false;
            piece = (count - at) / (2 * parts);
            if (piece < least) piece = least;
            if (piece > count - at) piece = count - at;
        } while (!taken.compare_exchange_weak(at, at + piece, std::memory_order_relaxed));
        *first = at, *last = at + piece;
        return true;
    }
};

template <class F>
void parallel(int threads, F &&body) {
    if (threads <= 1) return body(0, 1);
    threads_run(threads, [](void *f, int part, int parts) { (*static_cast<F *>(f))(part, parts); }, &body);
}
