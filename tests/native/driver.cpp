// Runs every instruction set of this machine over ragged shapes in buffers of exactly the right size, so that a
// sanitizer sees any step outside, and compares with a plain double-precision product.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "anybits.h"

int step_failures(int isa);   // step.cpp
int layer_failures(int isa);  // layer.cpp

namespace {

uint64_t state = 88172645463325252u;

uint32_t random_bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
}

float random_float() { return static_cast<float>(random_bits() & 0xffff) / 32768.0f - 1.0f; }

int failures = 0;

void expect(bool fine, const char *what, const ab_shape &s, int p, int rows) {
    if (fine) return;
    failures++;
    printf("FAILED %s: isa %d levels %d [%ld, %ld] group %ld p %d rows %d\n", what, s.isa, s.levels,
           static_cast<long>(s.out_features), static_cast<long>(s.in_features), static_cast<long>(s.group_columns), p, rows);
}

struct Weight {
    ab_shape shape;
    std::vector<int32_t> words;                 // [P, N, W]
    std::vector<std::vector<float>> scales, offsets;  // by precision
    void *blob;
    int64_t bytes;

    int64_t width() const { return (shape.in_features + 31) / 32; }
    int64_t groups() const { return (shape.in_features + shape.group_columns - 1) / shape.group_columns; }
    int bit(int b, int64_t n, int64_t k) const {
        const int64_t row = (b * shape.out_features + n) * width();
        return static_cast<uint32_t>(words[static_cast<size_t>(row + k / 32)]) >> (k % 32) & 1;
    }
    double value(int p, int64_t n, int64_t k) const {
        const std::vector<float> &s = scales[static_cast<size_t>(p)];
        if (shape.levels == AB_CODEBOOK) {
            size_t code = 0;
            for (int b = 0; b < p; b++) code = code << 1 | static_cast<size_t>(bit(b, n, k));
            return s[(static_cast<size_t>(n) << p) + code];
        }
        const int64_t g = k / shape.group_columns;
        double v = shape.has_offsets ? offsets[static_cast<size_t>(p)][static_cast<size_t>(n * groups() + g)] : 0;
        for (int b = 0; b < p; b++)
            v += (bit(b, n, k) ? 1 : -1) * s[static_cast<size_t>((b * shape.out_features + n) * groups() + g)];
        return v;
    }
};

// Levels of precision p in 8 bits: counts of every row's steps, in buffers of exactly their size.
void make_in_steps(Weight *w, int p) {
    const int64_t n = w->shape.out_features, groups = w->groups();
    const int entries = p + (w->shape.has_offsets ? 1 : 0);
    std::vector<int8_t> counts(static_cast<size_t>(entries * n * groups));
    std::vector<float> steps(static_cast<size_t>(entries * n));
    for (int8_t &count : counts) count = static_cast<int8_t>(random_bits());
    for (float &step : steps) step = random_float() / 128;
    for (int64_t i = 0; i < entries * n * groups; i++) {
        std::vector<float> &to = (i < p * n * groups ? w->scales : w->offsets)[static_cast<size_t>(p)];
        to.push_back(counts[static_cast<size_t>(i)] * steps[static_cast<size_t>(i / groups)]);
    }
    const int8_t *offsets = w->shape.has_offsets ? counts.data() + p * n * groups : nullptr;
    const float *last = w->shape.has_offsets ? steps.data() + p * n : nullptr;
    expect(ab_blob_levels(w->blob, w->bytes, p, counts.data(), offsets) == AB_OK, "counts", w->shape, p, 0);
    expect(ab_blob_steps(w->blob, w->bytes, p, steps.data(), last) == AB_OK, "steps", w->shape, p, 0);
    expect(ab_blob_steps(w->blob, w->bytes, p, nullptr, last) == AB_BAD_SHAPE, "none", w->shape, p, 0);
    expect(ab_blob_steps(w->blob, w->bytes, 9, steps.data(), last) == AB_BAD_PRECISION, "precision", w->shape, p, 0);
}

Weight make(const ab_shape &shape) {
    Weight w{shape, {}, {}, {}, nullptr, 0};
    w.words.resize(static_cast<size_t>(shape.planes * shape.out_features * w.width()));
    for (int32_t &word : w.words) word = static_cast<int32_t>(random_bits());
    w.bytes = ab_blob_bytes(&shape);
    w.blob = aligned_alloc(64, static_cast<size_t>(w.bytes));
    memset(w.blob, 0xff, static_cast<size_t>(w.bytes));
    ab_blob_begin(w.blob, w.bytes, &shape);
    const int64_t plane = shape.out_features * w.width();
    for (int b = 0; b < shape.planes; b++) ab_blob_plane(w.blob, w.bytes, b, w.words.data() + b * plane, 1);
    w.scales.resize(9), w.offsets.resize(9);
    for (int p = 1; p <= shape.planes; p++) {
        const int64_t count = shape.levels == AB_CODEBOOK ? shape.out_features << p : p * shape.out_features * w.groups();
        if (shape.level_dtype == AB_I8) {
            make_in_steps(&w, p);
            continue;
        }
        for (int64_t i = 0; i < count; i++) w.scales[static_cast<size_t>(p)].push_back(random_float());
        for (int64_t i = 0; i < shape.out_features * w.groups(); i++) w.offsets[static_cast<size_t>(p)].push_back(random_float());
        const float *offsets = shape.has_offsets ? w.offsets[static_cast<size_t>(p)].data() : nullptr;
        expect(ab_blob_levels(w.blob, w.bytes, p, w.scales[static_cast<size_t>(p)].data(), offsets) == AB_OK, "levels", shape, p, 0);
    }
    return w;
}

float of_bf16(uint16_t h) {
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// bf16 takes a path of its own where there are matrix instructions.
void check_matmul(const Weight &w, int p, int rows, bool mixed, bool fast, bool bf16 = false) {
    const int64_t n = w.shape.out_features, k = w.shape.in_features;
    const std::unique_ptr<float[]> x(new float[static_cast<size_t>(rows * k)]), y(new float[static_cast<size_t>(rows * n)]);
    const std::unique_ptr<int32_t[]> each(new int32_t[static_cast<size_t>(rows)]);
    for (int64_t i = 0; i < rows * k; i++) x[static_cast<size_t>(i)] = random_float();
    for (int64_t i = 0; i < rows * n; i++) y[static_cast<size_t>(i)] = NAN;
    for (int r = 0; r < rows; r++) each[static_cast<size_t>(r)] = mixed ? 1 + static_cast<int>(random_bits() % 8) : p;
    const std::unique_ptr<uint16_t[]> x16(new uint16_t[static_cast<size_t>(rows * k)]), y16(new uint16_t[static_cast<size_t>(rows * n)]);
    for (int64_t i = 0; bf16 && i < rows * k; i++) {
        uint32_t u;
        memcpy(&u, &x[static_cast<size_t>(i)], 4);
        x16[static_cast<size_t>(i)] = static_cast<uint16_t>(u >> 16);
        x[static_cast<size_t>(i)] = of_bf16(x16[static_cast<size_t>(i)]);
    }
    const void *from = bf16 ? static_cast<const void *>(x16.get()) : x.get();
    void *to = bf16 ? static_cast<void *>(y16.get()) : y.get();
    const int status = ab_matmul(w.blob, w.bytes, from, bf16 ? AB_BF16 : AB_F32, rows, k, k, p, mixed ? each.get() : nullptr, to, fast ? 8 : 16, 1);
    for (int64_t i = 0; bf16 && i < rows * n; i++) y[static_cast<size_t>(i)] = of_bf16(y16[static_cast<size_t>(i)]);
    expect(status == AB_OK, "status", w.shape, p, rows);
    double error = 0, norm = 0;
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) {
            double sum = 0, size = 0;
            for (int64_t j = 0; j < k; j++) {
                const double term = w.value(each[static_cast<size_t>(r)], i, j) * x[static_cast<size_t>(r * k + j)];
                sum += term, size += term * term;
            }
            const double difference = y[static_cast<size_t>(r * n + i)] - sum;
            error += difference * difference, norm += size;
        }
    // Of 14-bit factors that are at most 1; a byte of a level is a 126th of up to eight scales, and is half of that wrong.
    const double rounding = (fast ? 4.0 / 126 : 1e-4) * sqrt(static_cast<double>(rows * n * k));
    expect(sqrt(error) < (fast ? 5e-2 : bf16 ? 6e-3 : 4e-4) * sqrt(norm) + rounding, "product", w.shape, p, rows);
}

void check_dequantize(const Weight &w, int p) {
    const int64_t n = w.shape.out_features, k = w.shape.in_features, tile = ab_tile_rows(w.shape.isa);
    const int64_t first = n > tile ? tile : 0, count = n - first;
    const std::unique_ptr<float[]> out(new float[static_cast<size_t>(count * k)]);
    expect(ab_dequantize(w.blob, w.bytes, p, first, count, AB_F32, out.get(), 1) == AB_OK, "status", w.shape, p, 0);
    double worst = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < k; j++) {
            const int64_t at = w.shape.levels == AB_AFFINE ? j * count + i : i * k + j;
            const double difference = fabs(out[static_cast<size_t>(at)] - w.value(p, first + i, j));
            worst = difference > worst || isnan(difference) ? difference : worst;
        }
    expect(worst < 1e-4, "dequantize", w.shape, p, 0);
}

// Arguments that do not fit are refused before anything is read.
void check_refusals(const Weight &w) {
    const int64_t n = w.shape.out_features, k = w.shape.in_features;
    float x = 0, y = 0;
    expect(ab_matmul(w.blob, w.bytes - 1, &x, AB_F32, 1, k, k, 2, nullptr, &y, 16, 1) == AB_BAD_BLOB, "short", w.shape, 2, 1);
    expect(ab_matmul(w.blob, w.bytes, &x, AB_F32, 1, k + 1, k, 2, nullptr, &y, 16, 1) == AB_BAD_SHAPE, "k", w.shape, 2, 1);
    expect(ab_matmul(w.blob, w.bytes, &x, AB_F32, 0, k, k, 2, nullptr, &y, 16, 1) == AB_BAD_SHAPE, "rows", w.shape, 2, 0);
    expect(ab_matmul(w.blob, w.bytes, &x, AB_F32, 513, k, k, 2, nullptr, &y, 16, 1) == AB_BAD_SHAPE, "rows", w.shape, 2, 513);
    expect(ab_matmul(w.blob, w.bytes, &x, 7, 1, k, k, 2, nullptr, &y, 16, 1) == AB_BAD_DTYPE, "dtype", w.shape, 2, 1);
    const int32_t bad[] = {-1, 0, 9, 31, 1 << 30};
    for (int32_t p : bad)
        expect(ab_matmul(w.blob, w.bytes, &x, AB_F32, 1, k, k, 2, &p, &y, 16, 1) == AB_BAD_PRECISION, "precision", w.shape, p, 1);
    expect(ab_dequantize(w.blob, w.bytes, 2, 0, n + 1, AB_F32, &y, 1) == AB_BAD_SHAPE, "count", w.shape, 2, 0);
    expect(ab_dequantize(w.blob, w.bytes, 2, 1, 1, AB_F32, &y, 1) == AB_BAD_SHAPE || w.shape.levels == AB_CODEBOOK, "first", w.shape, 2, 0);
    std::vector<char> copy(static_cast<char *>(w.blob), static_cast<char *>(w.blob) + w.bytes);
    // Any change to magic or shape is refused, or leaves the layout as it is and is harmless: a row at most as
    // long as whole words or spans allow.
    std::vector<float> row(static_cast<size_t>(k + 512));
    for (size_t byte = 0; byte < 64; byte++) {
        char *at = copy.data() + byte, before = *at;
        *at = static_cast<char>(before ^ 1 << (byte % 8));
        ab_dequantize(copy.data(), w.bytes, 2, 0, 1, AB_F32, row.data(), 1);
        *at = before;
    }
}

void check_shape(const ab_shape &shape) {
    const Weight w = make(shape);
    for (int p = 1; p <= 8; p++) {
        check_matmul(w, p, 1, false, false);
        check_dequantize(w, p);
    }
    for (int rows = 2; rows <= 19; rows += rows < 9 ? 1 : 5) check_matmul(w, 3, rows, rows % 2 == 0, false);
    for (int rows = 7; rows <= 19; rows += 4) check_matmul(w, 5, rows, rows % 8 == 7, false, true);
    for (int p = 2; p <= 8; p += 3) check_matmul(w, p, 1, false, false, true), check_matmul(w, p, 8, p == 5, false, true);
    for (int p = 1; p <= 8; p++) check_matmul(w, p, p % 2 ? 3 : 17, false, true, p % 3 == 0);
    for (int p = 2; p <= 4; p += 2) check_matmul(w, p, 97, false, false, true), check_matmul(w, p, 37, false, true, true);
    for (int rows : {1, 8, 33}) check_matmul(w, 4, rows, true, true), check_matmul(w, 5, rows, false, true, true);
    check_refusals(w);
    free(w.blob);
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{1, 1, 1}, {5, 40, 40}, {37, 512, 128}, {16, 100, 64}, {70, 1000, 128}, {33, 288, 96}, {3, 1056, 32}};
    int ran = 0;
    for (int isa = 0; isa < AB_ISA_COUNT; isa++) {
        if (!ab_isa_usable(isa)) continue;
        ran++;
        failures += step_failures(isa) + layer_failures(isa);
        for (const auto &s : shapes) {
            for (int offsets = 0; offsets < 2; offsets++)
                for (int dtype : {AB_F32, AB_I8}) check_shape({isa, AB_AFFINE, dtype, offsets, s[0], s[1], s[2], 8, 0x1fe});
            check_shape({isa, AB_CODEBOOK, AB_F32, 0, s[0], s[1], s[1], 8, 0x1fe});
        }
    }
    const ab_shape wrong = {AB_PORTABLE, AB_AFFINE, AB_F32, 0, 8, 64, 33, 2, 0x4};
    if (ab_blob_bytes(&wrong) != -AB_BAD_SHAPE) failures++;
    const ab_shape codebook = {AB_PORTABLE, AB_CODEBOOK, AB_I8, 0, 8, 64, 64, 2, 0x4};
    if (ab_blob_bytes(&codebook) != -AB_BAD_DTYPE) failures++;
    printf("%d instruction sets, %d failures\n", ran, failures);
    return failures != 0;
}
