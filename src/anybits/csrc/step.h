// What stands between the products of one decode step: the dense output layer, norms, the gated activation, attention
// of one new position. bfloat16 in and out, float32 in between. One source for all instruction sets: vectors of 16
// floats (step_vectors.h), which each step_*.cpp compiles with its own flags.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "anybits.h"
#include "convert.h"
#include "step_kernels.h"
#include "step_vectors.h"

namespace {

// Calls body(values of a and b, how many count, where) for 16 elements at a time; what lies past the end reads as 0.
template <class F>
STEP_INLINE void over(const uint16_t *a, const uint16_t *b, int64_t count, F &&body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(load_bf16(a + i), load_bf16(b + i), LANES, i);
    if (i == count) return;
    uint16_t tail[2][LANES] = {};
    memcpy(tail[0], a + i, static_cast<size_t>(count - i) * 2);
    memcpy(tail[1], b + i, static_cast<size_t>(count - i) * 2);
    body(load_bf16(tail[0]), load_bf16(tail[1]), static_cast<int>(count - i), i);
}

STEP_INLINE void store_some(uint16_t *at, floats v, int count) {
    if (count == LANES) return store_bf16(at, v);
    uint16_t h[LANES];
    store_bf16(h, v);
    memcpy(at, h, static_cast<size_t>(count) * 2);
}

// y = bf16(weight * bf16(x / sqrt(mean(x^2) + eps))), rounded where torch rounds it.
void rms_norm(const uint16_t *x, const uint16_t *weight, int64_t k, float eps, uint16_t *y) {
    floats squares = {};
    over(x, x, k, [&](floats v, floats, int, int64_t) { squares += v * v; });
    const float scale = 1.0f / sqrtf(sum_of(squares) / static_cast<float>(k) + eps);
    over(x, weight, k, [&](floats v, floats w, int n, int64_t i) { store_some(y + i, rounded_bf16(v * scale) * w, n); });
}

// y = bf16(bf16(g / (1 + e^-g)) * u).
void silu_mul(const uint16_t *gate, const uint16_t *up, int64_t count, uint16_t *y) {
    over(gate, up, count, [&](floats g, floats u, int n, int64_t i) {
        store_some(y + i, rounded_bf16(g / (exp_of(-g) + 1.0f)) * u, n);
    });
}

// y = bf16(a + b).
void add(const uint16_t *a, const uint16_t *b, int64_t count, uint16_t *y) {
    over(a, b, count, [&](floats v, floats w, int n, int64_t i) { store_some(y + i, v + w, n); });
}

// Adds the products of a step of columns to sums. AVX512_BF16 multiplies pairs in one instruction: fewer instructions
// a byte leave more reads from memory under way.
#if defined(__AVX512BF16__)
constexpr int DENSE_STEP = 2 * LANES;
typedef __m512bh pieces;

STEP_INLINE pieces load_step(const uint16_t *at) {
    pieces v;
    memcpy(&v, at, sizeof v);
    return v;
}

STEP_INLINE floats added(floats sum, pieces w, pieces x) { return (floats)_mm512_dpbf16_ps((__m512)sum, w, x); }
#else
constexpr int DENSE_STEP = LANES;
typedef floats pieces;

STEP_INLINE pieces load_step(const uint16_t *at) { return load_bf16(at); }

STEP_INLINE floats added(floats sum, pieces w, pieces x) { return sum + w * x; }
#endif

// R rows of w with M rows of x. The sums of a pair do not depend on R and M: a row's result is the same in every batch.
template <int R, int M>
STEP_INLINE void dense_tile(const uint16_t *const *w, const uint16_t *x, int64_t x_stride, int64_t k, float *sums) {
    floats sum[R][M] = {};
    int64_t i = 0;
    for (; i + DENSE_STEP <= k; i += DENSE_STEP) {
        pieces v[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w[r] + i + 1024, 0, 2);
            v[r] = load_step(w[r] + i);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const pieces a = load_step(x + m * x_stride + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[r][m] = added(sum[r][m], v[r], a);
        }
    }
    if (i < k)
        for (int r = 0; r < R; r++) {
            uint16_t tail[DENSE_STEP] = {};
            memcpy(tail, w[r] + i, static_cast<size_t>(k - i) * 2);
            for (int m = 0; m < M; m++)
                sum[r][m] = added(sum[r][m], load_step(tail), load_step(x + m * x_stride + i));
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r * M + m] = sum_of(sum[r][m]);
}

constexpr int DENSE_AT_ONCE = 4;  // rows of w, and of x

template <int R>
STEP_INLINE void dense_rows(const DenseCall &c, const uint16_t *const *w, int64_t n) {
    for (int m = 0; m < c.rows; m += DENSE_AT_ONCE) {
        const int here = c.rows - m < DENSE_AT_ONCE ? c.rows - m : DENSE_AT_ONCE;
        const uint16_t *x = c.x + m * c.x_stride;
        float sums[R * DENSE_AT_ONCE];
        switch (here) {
            case 1: dense_tile<R, 1>(w, x, c.x_stride, c.k, sums); break;
            case 2: dense_tile<R, 2>(w, x, c.x_stride, c.k, sums); break;
            case 3: dense_tile<R, 3>(w, x, c.x_stride, c.k, sums); break;
            default: dense_tile<R, 4>(w, x, c.x_stride, c.k, sums); break;
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < here; i++) {
                const float bias = c.bias ? bf16_to_float(c.bias[n + r]) : 0.0f;
                c.y[(m + i) * c.n + n + r] = float_to_bf16(sums[r * here + i] + bias);
            }
    }
}

void widen(const uint16_t *x, int64_t k, float *out) {
    for (int64_t i = 0; i < k; i++) out[i] = bf16_to_float(x[i]);
}

void dense(const DenseCall &c, int64_t first, int64_t last) {
    const uint16_t *w[DENSE_AT_ONCE];
    int64_t n = first;
    for (; n + DENSE_AT_ONCE <= last; n += DENSE_AT_ONCE) {
        for (int r = 0; r < DENSE_AT_ONCE; r++) w[r] = c.weight + (n + r) * c.k;
        dense_rows<DENSE_AT_ONCE>(c, w, n);
    }
    for (; n < last; n++) {
        w[0] = c.weight + n * c.k;
        dense_rows<1>(c, w, n);
    }
}

#if defined(__AVX512F__)
constexpr int KEYS_AT_ONCE = 4, COLUMNS_AT_ONCE = 4;  // vectors of sums, for four queries, that registers hold
#else
constexpr int KEYS_AT_ONCE = 1, COLUMNS_AT_ONCE = 1;
#endif
constexpr int64_t KEYS_AHEAD = 16;  // positions that are fetched ahead into the second-level cache

STEP_INLINE void fetch_row(const uint16_t *row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 32) __builtin_prefetch(row + i, 0, 2);
}

#if defined(__AVX512F__)
// sum_of each of 4 x 4 vectors: [q][j] = sum_of(sums[j][q]), the same additions in the same order, 16 at a time.
STEP_INLINE __m512 quarters_of(const floats *v) {
    const __m512d a = (__m512d)v[0], b = (__m512d)v[1], c = (__m512d)v[2], d = (__m512d)v[3];
    const __m512 ab = (__m512)_mm512_shuffle_f64x2(a, b, 0x44) + (__m512)_mm512_shuffle_f64x2(a, b, 0xee);
    const __m512 cd = (__m512)_mm512_shuffle_f64x2(c, d, 0x44) + (__m512)_mm512_shuffle_f64x2(c, d, 0xee);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}

STEP_INLINE floats sums_of(const floats (*sums)[4]) {
    const __m512 a = quarters_of(sums[0]), b = quarters_of(sums[1]), c = quarters_of(sums[2]), d = quarters_of(sums[3]);
    const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    return (floats)((__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd));
}
#endif

// Scores of Q queries [Q, dim] (float32) with L keys from `row` on, times `scaling`, at scores [Q, padded].
template <int Q, int L>
STEP_INLINE void scores_of(const AttendCall &c, const uint16_t *row, const float *query, float *scores) {
    floats sum[L][Q] = {};
    for (int64_t i = 0; i < c.dim; i += LANES) {
        floats k[L];
#pragma GCC unroll 4
        for (int j = 0; j < L; j++) k[j] = load_bf16(row + j * c.key_stride + i);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            const floats v = load_floats(query + q * c.dim + i);
#pragma GCC unroll 4
            for (int j = 0; j < L; j++) sum[j][q] += k[j] * v;
        }
    }
#if defined(__AVX512F__)
    if constexpr (Q == 4 && L == 4) {
        float all[LANES];
        store_floats(all, sums_of(sum) * c.scaling);
        for (int q = 0; q < Q; q++) memcpy(scores + q * c.padded, all + q * 4, 4 * sizeof(float));
        return;
    }
#endif
    for (int q = 0; q < Q; q++)
        for (int j = 0; j < L; j++) scores[q * c.padded + j] = sum_of(sum[j][q]) * c.scaling;
}

template <int Q>
STEP_INLINE void all_scores(const AttendCall &c, const uint16_t *key, const float *query, float *scores) {
    int64_t l = 0;
    for (; l + KEYS_AT_ONCE <= c.length; l += KEYS_AT_ONCE) {
        const uint16_t *row = key + l * c.key_stride;
        for (int j = 0; j < KEYS_AT_ONCE; j++) fetch_row(row + (KEYS_AHEAD + j) * c.key_stride, c.dim);
        scores_of<Q, KEYS_AT_ONCE>(c, row, query, scores + l);
    }
    for (; l < c.length; l++) scores_of<Q, 1>(c, key + l * c.key_stride, query, scores + l);
}

// Adds values first ... last - 1, each times its share, to sums [Q, value_dim]; V vectors of 16 at a time.
template <int Q, int V>
STEP_INLINE void weigh(const AttendCall &c, const uint16_t *value, const float *shares, int64_t first, int64_t last, float *sums) {
    floats sum[Q][V];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) sum[q][i] = load_floats(sums + q * c.value_dim + i * LANES);
    for (int64_t l = first; l < last; l++)
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) {
            const floats v = load_bf16(value + l * c.value_stride + i * LANES);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) sum[q][i] += v * shares[q * c.padded + l];
        }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) store_floats(sums + q * c.value_dim + i * LANES, sum[q][i]);
}

// Values of one piece stay in the first-level cache while all their columns are added, while the next piece is fetched.
constexpr int64_t VALUES_AT_ONCE = 32;

template <int Q>
STEP_INLINE void weigh_all(const AttendCall &c, const uint16_t *value, const float *shares, float *sums) {
    memset(sums, 0, static_cast<size_t>(Q * c.value_dim) * sizeof(float));
    for (int64_t first = 0; first < c.length; first += VALUES_AT_ONCE) {
        const int64_t last = first + VALUES_AT_ONCE < c.length ? first + VALUES_AT_ONCE : c.length;
        for (int64_t l = last; l < last + VALUES_AT_ONCE; l++) fetch_row(value + l * c.value_stride, c.value_dim);
        int64_t i = 0;
        for (; i + COLUMNS_AT_ONCE * LANES <= c.value_dim; i += COLUMNS_AT_ONCE * LANES)
            weigh<Q, COLUMNS_AT_ONCE>(c, value + i, shares, first, last, sums + i);
        for (; i < c.value_dim; i += LANES) weigh<Q, 1>(c, value + i, shares, first, last, sums + i);
    }
}

// scratch: Q queries and Q sums of values in float32, then scores.
template <int Q>
STEP_INLINE void attend_queries(const AttendCall &c, const uint16_t *key, const uint16_t *value, const uint16_t *query,
                                float *scratch, uint16_t *out) {
    float *const floats_of_query = scratch, *const sums = scratch + Q * c.dim, *const scores = sums + Q * c.value_dim;
    float whole[Q];
    widen(query, Q * c.dim, floats_of_query);
    all_scores<Q>(c, key, floats_of_query, scores);
    for (int q = 0; q < Q; q++) {
        float *row = scores + q * c.padded, most = -INFINITY;
        for (int64_t l = c.length; l < c.padded; l++) row[l] = -INFINITY;
        floats greatest = load_floats(row), sum = {};
        for (int64_t l = LANES; l < c.padded; l += LANES) {
            const floats v = load_floats(row + l);
            greatest = larger(v, greatest);
        }
        float lanes[LANES];
        store_floats(lanes, greatest);
        for (float lane : lanes) most = lane > most ? lane : most;
        for (int64_t l = 0; l < c.padded; l += LANES) {
            const floats share = exp_of(load_floats(row + l) - most);
            store_floats(row + l, share);
            sum += share;
        }
        whole[q] = sum_of(sum);
    }
    weigh_all<Q>(c, value, scores, sums);
    for (int q = 0; q < Q; q++)
        for (int64_t i = 0; i < c.value_dim; i += LANES)
            store_bf16(out + q * c.value_dim + i, load_floats(sums + q * c.value_dim + i) / whole[q]);
}

// y = bf16(bf16(x * cos) + bf16(turned * sin)), where turned is x with its halves exchanged and the new first one negated.
STEP_INLINE void rotate(const uint16_t *x, const uint16_t *cos, const uint16_t *sin, int64_t dim, uint16_t *y) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const floats a = load_bf16(x + i), b = load_bf16(x + half + i);
        const floats first = rounded_bf16(a * load_bf16(cos + i)) + rounded_bf16(-b * load_bf16(sin + i));
        const floats second = rounded_bf16(b * load_bf16(cos + half + i)) + rounded_bf16(a * load_bf16(sin + half + i));
        store_bf16(y + i, first), store_bf16(y + half + i, second);
    }
}

// Pairs of a sequence and a key head, first ... last - 1; the query heads that share the key head, four at a time.
void attend(const AttendCall &c, int64_t first, int64_t last, float *scratch) {
    for (int64_t pair = first; pair < last; pair++) {
        const int64_t batch = pair / c.kv_heads, head = pair % c.kv_heads, shared = c.heads / c.kv_heads;
        uint16_t *const key = c.key + batch * c.key_batch + head * c.key_head;
        uint16_t *const value = c.value + batch * c.value_batch + head * c.value_head;
        const uint16_t *cos = c.cos + batch * c.angle_batch, *sin = c.sin + batch * c.angle_batch;
        if (c.new_key) {
            rotate(c.new_key + pair * c.dim, cos, sin, c.dim, key + (c.length - 1) * c.key_stride);
            memcpy(value + (c.length - 1) * c.value_stride, c.new_value + pair * c.value_dim, static_cast<size_t>(c.value_dim) * 2);
        }
        for (int64_t q = 0; q < shared; q += QUERIES_AT_ONCE) {
            const int64_t at = head * shared + q;
            const uint16_t *query = c.query + batch * c.query_batch + at * c.dim;
            uint16_t *out = c.out + (batch * c.heads + at) * c.value_dim;
            if (c.new_key) {
                uint16_t *const turned = reinterpret_cast<uint16_t *>(scratch + QUERIES_AT_ONCE * (c.dim + c.value_dim + c.padded));
                for (int64_t i = 0; i < QUERIES_AT_ONCE && q + i < shared; i++)
                    rotate(query + i * c.dim, cos, sin, c.dim, turned + i * c.dim);
                query = turned;
            }
            switch (shared - q) {
                case 1: attend_queries<1>(c, key, value, query, scratch, out); break;
                case 2: attend_queries<2>(c, key, value, query, scratch, out); break;
                case 3: attend_queries<3>(c, key, value, query, scratch, out); break;
                default: attend_queries<4>(c, key, value, query, scratch, out); break;
            }
        }
    }
}

const StepKernels kernels = {dense, rms_norm, silu_mul, add, attend};

}  // namespace
