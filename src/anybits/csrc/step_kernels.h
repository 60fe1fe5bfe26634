// What step.h computes, as each instruction set offers it.
#pragma once

#include <stdint.h>

// y [rows, n] = x [rows, k] * weight [n, k]^T + bias. Each row of x is zero from k to the next multiple of 32.
struct DenseCall {
    const uint16_t *weight, *bias;  // bias: NULL or [n]
    const uint16_t *x;
    int64_t n, k, x_stride;
    int rows;
    uint16_t *y;
};

// One new position of each sequence. Strides in elements; the last dimension of each tensor is dense.
struct AttendCall {
    const uint16_t *query;  // [batch, heads, dim]
    uint16_t *key, *value;  // [batch, kv_heads, length, dim], [... value_dim]
    uint16_t *out;                        // [batch, heads, value_dim], dense
    int64_t heads, kv_heads, length, dim, value_dim;  // dim and value_dim are multiples of 16
    int64_t query_batch, key_batch, key_head, key_stride, value_batch, value_head, value_stride;
    int64_t padded;  // length, rounded up to a multiple of 16
    float scaling;
    const uint16_t *new_key, *new_value, *cos, *sin;  // as in ab_attention
    int64_t angle_batch;
};

constexpr int QUERIES_AT_ONCE = 4;

struct StepKernels {
    void (*dense)(const DenseCall &call, int64_t first, int64_t last);  // rows of weight
    void (*rms_norm)(const uint16_t *x, const uint16_t *weight, int64_t k, float eps, uint16_t *y);
    void (*silu_mul)(const uint16_t *gate, const uint16_t *up, int64_t count, uint16_t *y);
    void (*add)(const uint16_t *a, const uint16_t *b, int64_t count, uint16_t *y);
    // Pairs of a sequence and a key head. scratch: attend_scratch() floats.
    void (*attend)(const AttendCall &call, int64_t first, int64_t last, float *scratch);
};

// What an attention call needs of a thread, in floats.
inline int64_t attend_scratch(int64_t dim, int64_t value_dim, int64_t padded) {
    return QUERIES_AT_ONCE * (2 * dim + value_dim + padded);
}

// The kernels for `isa`; NULL where this machine does not run it.
const StepKernels *step_kernels_of(int isa);

const StepKernels *step_portable();
const StepKernels *step_avx2();
const StepKernels *step_avx512();
const StepKernels *step_avx512_bf16();
