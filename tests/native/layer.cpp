// A decoder layer in one call beside its parts one after another, in buffers of exactly the right size: the same bits.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "anybits.h"

namespace {

uint64_t state = 0x2545f4914f6cdd1du;

uint32_t random_bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
}

typedef std::vector<uint16_t> Halves;

uint16_t rounded(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float value(uint16_t h) {
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

Halves random_of(int64_t count) {
    Halves v(static_cast<size_t>(count));
    for (uint16_t &h : v) h = rounded(static_cast<float>(random_bits() & 0xffff) / 32768.0f - 1.0f);
    return v;
}

Halves sum(const Halves &a, const Halves &b) {
    Halves y(a.size());
    for (size_t i = 0; i < a.size(); i++) y[i] = rounded(value(a[i]) + value(b[i % b.size()]));
    return y;
}

constexpr int64_t HIDDEN = 64, MIDDLE = 80, HEADS = 4, KV_HEADS = 2, DIM = 32, LENGTH = 7, PRECISION = 2;

struct Matrix {
    ab_matrix m;
    Halves bias;
    int64_t out, in;

    Matrix(int isa, int levels, int64_t rows, int64_t columns, bool biased) : bias(random_of(biased ? rows : 0)), out(rows), in(columns) {
        const bool affine = levels == AB_AFFINE;
        const ab_shape s = {isa, levels, AB_F32, affine, rows, columns, affine ? 32 : columns, 3, 0xc};
        const int64_t bytes = ab_blob_bytes(&s), groups = (columns + 31) / 32;
        void *blob = aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
        ab_blob_begin(blob, bytes, &s);
        std::vector<int32_t> words(static_cast<size_t>(rows * groups));
        for (int b = 0; b < 3; b++) {
            for (int32_t &w : words) w = static_cast<int32_t>(random_bits());
            ab_blob_plane(blob, bytes, b, words.data(), 1);
        }
        for (int p = 2; p <= 3; p++) {
            std::vector<float> scales(static_cast<size_t>(affine ? p * rows * groups : rows << p)), offsets(static_cast<size_t>(rows * groups));
            for (float &f : scales) f = static_cast<float>(random_bits() & 0xff) / 4096.0f;
            for (float &f : offsets) f = static_cast<float>(random_bits() & 0xff) / 4096.0f;
            ab_blob_levels(blob, bytes, p, scales.data(), affine ? offsets.data() : nullptr);
        }
        m = {blob, bytes, PRECISION, biased ? bias.data() : nullptr};
    }
    ~Matrix() { free(const_cast<void *>(m.blob)); }
    Matrix(const Matrix &) = delete;
    Matrix &operator=(const Matrix &) = delete;

    Halves operator()(const Halves &x, int64_t batch) const {
        Halves y(static_cast<size_t>(batch * out));
        ab_matmul(m.blob, m.blob_bytes, x.data(), AB_BF16, batch, in, in, PRECISION, nullptr, y.data(), 16, 1);
        return bias.empty() ? y : sum(y, bias);
    }
};

Halves normed(int isa, const Halves &x, const Halves &weight) {
    const int64_t k = static_cast<int64_t>(weight.size());
    Halves y(x.size());
    ab_rms_norm(isa, x.data(), weight.data(), static_cast<int64_t>(x.size()) / k, k, 1e-5f, y.data(), 1);
    return y;
}

// Number of outputs, keys and values that differ.
int differing(int isa, int levels, int64_t batch, bool biased, bool head_norms) {
    const Matrix q(isa, levels, HEADS * DIM, HIDDEN, biased), k(isa, levels, KV_HEADS * DIM, HIDDEN, biased),
        v(isa, levels, KV_HEADS * DIM, HIDDEN, biased), o(isa, levels, HIDDEN, HEADS * DIM, biased),
        gate(isa, levels, MIDDLE, HIDDEN, biased), up(isa, levels, MIDDLE, HIDDEN, biased), down(isa, levels, HIDDEN, MIDDLE, biased);
    const Halves first = random_of(HIDDEN), second = random_of(HIDDEN), of_query = random_of(DIM), of_key = random_of(DIM);
    const Halves x = random_of(batch * HIDDEN), cos = random_of(DIM), sin = random_of(DIM);
    Halves keys = random_of(batch * KV_HEADS * LENGTH * DIM), values = random_of(batch * KV_HEADS * LENGTH * DIM);
    Halves own_keys = keys, own_values = values;

    const Halves n = normed(isa, x, first);
    Halves query = q(n, batch), key = k(n, batch);
    const Halves val = v(n, batch);
    if (head_norms) query = normed(isa, query, of_query), key = normed(isa, key, of_key);
    Halves attended(query.size());
    const ab_attention a = {query.data(), keys.data(), values.data(), attended.data(), batch, HEADS, KV_HEADS, LENGTH, DIM, DIM,
                            HEADS * DIM, KV_HEADS * LENGTH * DIM, LENGTH * DIM, DIM, KV_HEADS * LENGTH * DIM, LENGTH * DIM, DIM,
                            key.data(), val.data(), cos.data(), sin.data(), 0};
    ab_attend(isa, &a, 0.3f, 1);
    const Halves h = sum(x, o(attended, batch)), m = normed(isa, h, second), g = gate(m, batch), u = up(m, batch);
    Halves act(g.size());
    ab_silu_mul(isa, g.data(), u.data(), static_cast<int64_t>(g.size()), act.data(), 1);
    const Halves wanted = sum(h, down(act, batch));

    const ab_layer layer = {q.m, k.m, v.m, o.m, gate.m, up.m, down.m, first.data(), second.data(),
                            head_norms ? of_query.data() : nullptr, head_norms ? of_key.data() : nullptr,
                            1e-5f, 1e-5f, 1e-5f, 1e-5f, 0.3f, HIDDEN, MIDDLE, HEADS, KV_HEADS, DIM, 16};
    ab_place place = {own_keys.data(), own_values.data(), KV_HEADS * LENGTH * DIM, LENGTH * DIM, DIM,
                      KV_HEADS * LENGTH * DIM, LENGTH * DIM, DIM, cos.data(), sin.data(), 0, batch, LENGTH};
    Halves y(x.size(), 0x7fff);
    if (ab_layer_step(isa, &layer, &place, x.data(), y.data(), 1) != AB_OK) return -1;
    int wrong = (own_keys != keys) + (own_values != values);
    for (size_t i = 0; i < y.size(); i++) wrong += y[i] != wanted[i];

    ab_layer bad = layer;
    bad.middle = MIDDLE + 1;
    wrong += ab_layer_step(isa, &bad, &place, x.data(), y.data(), 1) != AB_BAD_SHAPE;
    bad = layer, bad.down.precision = 1;
    wrong += ab_layer_step(isa, &bad, &place, x.data(), y.data(), 1) != AB_BAD_PRECISION;
    place.batch = AB_MAX_LAYER_ROWS + 1;
    wrong += ab_layer_step(isa, &layer, &place, x.data(), y.data(), 1) != AB_BAD_SHAPE;
    return wrong;
}

}  // namespace

int layer_failures(int isa) {
    int failures = 0;
    for (int levels : {AB_AFFINE, AB_CODEBOOK})
        for (int batch : {1, 3, static_cast<int>(AB_MAX_LAYER_ROWS)})
            for (int kind = 0; kind < 4; kind++) {
                const int wrong = differing(isa, levels, batch, kind & 1, kind & 2);
                if (wrong) printf("FAILED layer: isa %d levels %d batch %d kind %d: %d\n", isa, levels, batch, kind, wrong);
                failures += wrong != 0;
            }
    return failures;
}
