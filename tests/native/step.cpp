// The kernels of a decode step in buffers of exactly the right size, beside plain double-precision sums.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "anybits.h"

namespace {

uint64_t state = 0x9e3779b97f4a7c15u;

uint16_t random_bf16() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    const float f = static_cast<float>(state >> 40) / static_cast<float>(1 << 23) - 1.0f;
    uint32_t u;
    memcpy(&u, &f, 4);
    return static_cast<uint16_t>(u >> 16);
}

double value(uint16_t h) {
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

std::vector<uint16_t> random_of(int64_t count) {
    std::vector<uint16_t> v(static_cast<size_t>(count));
    for (uint16_t &h : v) h = random_bf16();
    return v;
}

int failures = 0;

void expect(bool fine, const char *what, int isa, int64_t a, int64_t b, int64_t c) {
    if (fine) return;
    failures++;
    printf("FAILED %s: isa %d sizes %ld %ld %ld\n", what, isa, static_cast<long>(a), static_cast<long>(b), static_cast<long>(c));
}

bool close(uint16_t got, double wanted) { return fabs(value(got) - wanted) <= fabs(wanted) / 128 + 1e-5; }

void check_dense(int isa, int64_t m, int64_t n, int64_t k) {
    const std::vector<uint16_t> x = random_of(m * k), w = random_of(n * k), bias = random_of(n);
    std::vector<uint16_t> y(static_cast<size_t>(m * n), 0x7fff);
    expect(ab_dense(isa, w.data(), bias.data(), n, k, x.data(), m, k, y.data(), 1) == AB_OK, "dense", isa, m, n, k);
    for (int64_t r = 0; r < m; r++)
        for (int64_t i = 0; i < n; i++) {
            double sum = value(bias[static_cast<size_t>(i)]);
            for (int64_t j = 0; j < k; j++) sum += value(x[static_cast<size_t>(r * k + j)]) * value(w[static_cast<size_t>(i * k + j)]);
            expect(close(y[static_cast<size_t>(r * n + i)], sum), "dense sum", isa, m, n, k);
        }
    expect(ab_dense(isa, w.data(), nullptr, n, k, x.data(), 65, k, y.data(), 1) == AB_BAD_SHAPE, "rows", isa, 65, n, k);
}

void check_rows(int isa, int64_t k) {
    const std::vector<uint16_t> x = random_of(2 * k), w = random_of(k);
    std::vector<uint16_t> y(static_cast<size_t>(2 * k), 0x7fff);
    expect(ab_rms_norm(isa, x.data(), w.data(), 2, k, 1e-5f, y.data(), 1) == AB_OK, "norm", isa, 2, k, 0);
    for (int64_t r = 0; r < 2; r++) {
        double squares = 0;
        for (int64_t i = 0; i < k; i++) squares += value(x[static_cast<size_t>(r * k + i)]) * value(x[static_cast<size_t>(r * k + i)]);
        for (int64_t i = 0; i < k; i++) {
            const double wanted = value(x[static_cast<size_t>(r * k + i)]) / sqrt(squares / static_cast<double>(k) + 1e-5);
            expect(close(y[static_cast<size_t>(r * k + i)], wanted * value(w[static_cast<size_t>(i)])), "normed", isa, r, i, k);
        }
    }
    expect(ab_silu_mul(isa, x.data(), x.data() + k, k, y.data(), 1) == AB_OK, "silu", isa, k, 0, 0);
    for (int64_t i = 0; i < k; i++) {
        const double g = value(x[static_cast<size_t>(i)]);
        expect(close(y[static_cast<size_t>(i)], g / (1 + exp(-g)) * value(x[static_cast<size_t>(k + i)])), "gated", isa, i, k, 0);
    }
}

void check_attend(int isa, int64_t heads, int64_t kv_heads, int64_t length, int64_t dim, int64_t value_dim) {
    const std::vector<uint16_t> q = random_of(heads * dim);
    std::vector<uint16_t> k = random_of(kv_heads * length * dim), v = random_of(kv_heads * length * value_dim);
    std::vector<uint16_t> out(static_cast<size_t>(heads * value_dim), 0x7fff);
    ab_attention a = {q.data(), k.data(), v.data(), out.data(), 1, heads, kv_heads, length, dim, value_dim,
                      heads * dim, kv_heads * length * dim, length * dim, dim,
                      kv_heads * length * value_dim, length * value_dim, value_dim, nullptr, nullptr, nullptr, nullptr, 0};
    expect(ab_attend(isa, &a, 0.5f, 1) == AB_OK, "attend", isa, heads, length, dim);
    for (int64_t h = 0; h < heads; h++) {
        const int64_t from = h / (heads / kv_heads);
        std::vector<double> shares;
        double sum = 0;
        for (int64_t l = 0; l < length; l++) {
            double score = 0;
            for (int64_t i = 0; i < dim; i++)
                score += value(q[static_cast<size_t>(h * dim + i)]) * value(k[static_cast<size_t>((from * length + l) * dim + i)]);
            shares.push_back(exp(score * 0.5)), sum += shares.back();
        }
        for (int64_t i = 0; i < value_dim; i++) {
            double wanted = 0;
            for (int64_t l = 0; l < length; l++)
                wanted += shares[static_cast<size_t>(l)] / sum * value(v[static_cast<size_t>((from * length + l) * value_dim + i)]);
            expect(close(out[static_cast<size_t>(h * value_dim + i)], wanted), "attended", isa, h, i, length);
        }
    }
    if (dim % 32 == 0) {  // a new position: where it goes, and nothing beside it
        const std::vector<uint16_t> key = random_of(kv_heads * dim), value = random_of(kv_heads * value_dim);
        const std::vector<uint16_t> cos(static_cast<size_t>(dim), 0x3f80), sin(static_cast<size_t>(dim), 0);
        a.new_key = key.data(), a.new_value = value.data(), a.cos = cos.data(), a.sin = sin.data();
        expect(ab_attend(isa, &a, 0.5f, 1) == AB_OK, "attend new", isa, heads, length, dim);
        for (int64_t h = 0; h < kv_heads; h++)
            expect(!memcmp(&k[static_cast<size_t>((h * length + length - 1) * dim)], &key[static_cast<size_t>(h * dim)], static_cast<size_t>(dim) * 2),
                   "placed", isa, h, length, dim);
    }
    a.dim = 8;
    expect(ab_attend(isa, &a, 0.5f, 1) == AB_BAD_SHAPE, "dim", isa, heads, length, 8);
}

}  // namespace

int step_failures(int isa) {
    failures = 0;
    const int64_t sizes[][3] = {{1, 1, 1}, {1, 7, 33}, {5, 9, 70}, {8, 4, 16}};
    for (const auto &s : sizes) check_dense(isa, s[0], s[1], s[2]);
    for (int64_t k : {1, 15, 16, 100}) check_rows(isa, k);
    check_attend(isa, 4, 4, 1, 16, 16);
    check_attend(isa, 6, 2, 19, 32, 80);
    check_attend(isa, 7, 1, 32, 128, 64);
    return failures;
}
