// torch's own OpenMP team, found at run time. Linking a runtime of our own would start a second pool, and two
// spinning pools beside each other cost milliseconds at every change between them.
#pragma once

#include <stdint.h>

bool threads_use(const char *library);

// Run body(context, part, parts) for every part on up to `threads` threads; returns when all are done.
void threads_run(int threads, void (*body)(void *context, int part, int parts), void *context);

// Wait, inside of a body that has several parts, until all parts are here.
void threads_wait();

template <class F>
void parallel(int threads, F &&body) {
    if (threads <= 1) return body(0, 1);
    threads_run(threads, [](void *f, int part, int parts) { (*static_cast<F *>(f))(part, parts); }, &body);
}
