// Checks of the entry points of a decode step, and how its work is divided.
#include <stdlib.h>
#include <string.h>

#include "anybits.h"
#include "step_kernels.h"
#include "threads.h"

namespace {

bool has_bf16() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

template <class T>
struct Zeros {
    T *at;
    explicit Zeros(int64_t count) : at(static_cast<T *>(calloc(static_cast<size_t>(count), sizeof(T)))) {}
    ~Zeros() { free(at); }
    Zeros(const Zeros &) = delete;
    Zeros &operator=(const Zeros &) = delete;
};

// Starting a thread costs a few microseconds: about what this many numbers take.
int useful(int threads, int64_t numbers) { return numbers < 65536 ? 1 : threads; }

}  // namespace

const StepKernels *step_kernels_of(int isa) {
    if (!ab_isa_usable(isa)) return nullptr;
    switch (isa) {
        case AB_AMX:
        case AB_AVX512: return has_bf16() && step_avx512_bf16() ? step_avx512_bf16() : step_avx512();
        case AB_AVX2: return step_avx2();
        default: return step_portable();
    }
}

extern "C" int ab_dense(int isa, const void *weight, const void *bias, int64_t n, int64_t k, const void *x, int64_t rows,
                        int64_t x_stride, void *y, int threads) {
    const StepKernels *kernels = step_kernels_of(isa);
    if (!kernels) return AB_BAD_ISA;
    if (!weight || !x || !y || n < 1 || k < 1 || rows < 1 || rows > AB_MAX_DENSE_ROWS) return AB_BAD_SHAPE;
    const int64_t stride = (k + 31) / 32 * 32 + 32;  // an odd number of lines: rows must not share cache sets
    Zeros<uint16_t> padded(rows * stride);
    if (!padded.at) return AB_NO_MEMORY;
    for (int64_t m = 0; m < rows; m++)
        memcpy(padded.at + m * stride, static_cast<const uint16_t *>(x) + m * x_stride, static_cast<size_t>(k) * 2);
    const DenseCall c = {static_cast<const uint16_t *>(weight), static_cast<const uint16_t *>(bias), padded.at, n, k, stride,
                         static_cast<int>(rows), static_cast<uint16_t *>(y)};
    parallel(useful(threads, n * k), [&](int part, int parts) {
        kernels->dense(c, n * part / parts, n * (part + 1) / parts);
    });
    return AB_OK;
}

extern "C" int ab_rms_norm(int isa, const void *x, const void *weight, int64_t rows, int64_t k, float eps, void *y,
                           int threads) {
    const StepKernels *kernels = step_kernels_of(isa);
    if (!kernels) return AB_BAD_ISA;
    if (!x || !weight || !y || rows < 0 || k < 1) return AB_BAD_SHAPE;
    parallel(useful(threads, rows * k), [&](int part, int parts) {
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++)
            kernels->rms_norm(static_cast<const uint16_t *>(x) + r * k, static_cast<const uint16_t *>(weight), k, eps,
                              static_cast<uint16_t *>(y) + r * k);
    });
    return AB_OK;
}

extern "C" int ab_silu_mul(int isa, const void *gate, const void *up, int64_t count, void *y, int threads) {
    const StepKernels *kernels = step_kernels_of(isa);
    if (!kernels) return AB_BAD_ISA;
    if (!gate || !up || !y || count < 0) return AB_BAD_SHAPE;
    parallel(useful(threads, count), [&](int part, int parts) {
        const int64_t first = count * part / parts, last = count * (part + 1) / parts;
        kernels->silu_mul(static_cast<const uint16_t *>(gate) + first, static_cast<const uint16_t *>(up) + first,
                          last - first, static_cast<uint16_t *>(y) + first);
    });
    return AB_OK;
}

extern "C" int ab_attend(int isa, const ab_attention *a, float scaling, int threads) {
    const StepKernels *kernels = step_kernels_of(isa);
    if (!kernels) return AB_BAD_ISA;
    if (!a->query || !a->key || !a->value || !a->out || a->batch < 1 || a->kv_heads < 1 || a->length < 1) return AB_BAD_SHAPE;
    if (a->heads < 1 || a->heads % a->kv_heads || a->dim < 16 || a->dim % 16 || a->value_dim < 16 || a->value_dim % 16)
        return AB_BAD_SHAPE;
    if (a->new_key && (!a->new_value || !a->cos || !a->sin || a->dim % 32)) return AB_BAD_SHAPE;
    AttendCall c;
    c.query = static_cast<const uint16_t *>(a->query), c.key = static_cast<uint16_t *>(a->key);
    c.value = static_cast<uint16_t *>(a->value), c.out = static_cast<uint16_t *>(a->out);
    c.heads = a->heads, c.kv_heads = a->kv_heads, c.length = a->length, c.dim = a->dim, c.value_dim = a->value_dim;
    c.query_batch = a->query_batch, c.key_batch = a->key_batch, c.key_head = a->key_head, c.key_stride = a->key_stride;
    c.value_batch = a->value_batch, c.value_head = a->value_head, c.value_stride = a->value_stride;
    c.new_key = static_cast<const uint16_t *>(a->new_key), c.new_value = static_cast<const uint16_t *>(a->new_value);
    c.cos = static_cast<const uint16_t *>(a->cos), c.sin = static_cast<const uint16_t *>(a->sin);
    c.angle_batch = a->angle_batch;
    c.padded = (a->length + 15) / 16 * 16, c.scaling = scaling;
    const int64_t pairs = a->batch * a->kv_heads, each = attend_scratch(a->dim, a->value_dim, c.padded);
    const int most = useful(threads, pairs * a->length * (a->dim + a->value_dim));
    const int parts = most < 1 ? 1 : static_cast<int>(pairs < most ? pairs : most);
    Zeros<float> scratch(each * parts);
    if (!scratch.at) return AB_NO_MEMORY;
    parallel(parts, [&](int part, int all) {
        kernels->attend(c, pairs * part / all, pairs * (part + 1) / all, scratch.at + part * each);
    });
    return AB_OK;
}
