#include "threads.h"

#include <dlfcn.h>

namespace {

// Every OpenMP runtime that torch ships (GNU, LLVM, Intel) exports GNU's entry point.
void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
int (*thread_number)() = nullptr;
int (*team_size)() = nullptr;
void (*gomp_barrier)() = nullptr;

struct Job {
    void (*body)(void *, int, int);
    void *context;
};

void run_part(void *job) {
    const Job *j = static_cast<const Job *>(job);
    j->body(j->context, thread_number(), team_size());
}

}  // namespace

bool threads_use(const char *library) {
    void *handle = dlopen(library, RTLD_NOLOAD | RTLD_NOW);
    if (!handle) return false;
    void *run = dlsym(handle, "GOMP_parallel"), *number = dlsym(handle, "omp_get_thread_num");
    void *size = dlsym(handle, "omp_get_num_threads"), *barrier = dlsym(handle, "GOMP_barrier");
    if (!run || !number || !size || !barrier) return false;
    thread_number = reinterpret_cast<int (*)()>(number);
    team_size = reinterpret_cast<int (*)()>(size);
    gomp_barrier = reinterpret_cast<void (*)()>(barrier);
    gomp_parallel = reinterpret_cast<void (*)(void (*)(void *), void *, unsigned, unsigned)>(run);
    return true;
}

// Inside another parallel region the team has one member, and the one part does all the work.
void threads_run(int threads, void (*body)(void *, int, int), void *context) {
    if (!gomp_parallel) return body(context, 0, 1);
    Job job{body, context};
    gomp_parallel(run_part, &job, static_cast<unsigned>(threads), 0);
}

void threads_wait() { gomp_barrier(); }
