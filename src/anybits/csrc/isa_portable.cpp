// Standard C++ only: what runs where nothing better does, and the plainest reading of the algorithm.
#include "dequantize.h"

namespace {

struct Portable : ShortIntegers {
    using V = uint64_t;  // eight bytes of a plane; shifts cross byte borders exactly as vector shifts do
    struct F { float v[4]; };
    static constexpr int TILE = 16, LANES = 4, BYTES = 8;
    static constexpr int LOOKUP_ROWS = 1;       // rows of x that go through an inner loop together

    static F zero() { return set1(0); }
    static F set1(float v) { return {{v, v, v, v}}; }
    static F fma(F a, F b, F c) {
        for (int i = 0; i < 4; i++) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    static F load(const float *p) {
        F f;
        memcpy(f.v, p, 16);
        return f;
    }
    static void store(float *p, F f) { memcpy(p, f.v, 16); }
    static float total(F f) { return (f.v[0] + f.v[2]) + (f.v[1] + f.v[3]); }

    template <int DTYPE>
    static F level(const uint8_t *p, int f) {
        F out;
        for (int i = 0; i < 4; i++) out.v[i] = level_value<DTYPE>(p, f * 4 + i);
        return out;
    }

    static void load_f16(const uint16_t *p, float *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) out[i] = f16_to_float(p[i]);
    }
    static void store_f16(const float *p, uint16_t *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) out[i] = float_to_f16(p[i]);
    }

    template <int MC, Entries E, int STEPS>
    static void lookup(const uint8_t *plane, int steps, const uint8_t *const *tables, F (*sums)[4]) {
        constexpr bool WIDE = E == TWO_BYTES;
        constexpr int TABLE = table_of(E);
        for (int m = 0; m < MC; m++) {
            int32_t high[TILE] = {0}, low[TILE] = {0};
            for (int s = 0; s < 4 * steps; s++) {  // byte j of step s / 4
                const uint8_t *T = tables[m] + (s >> 2) * TABLE + (s & 3) * 16, *v = plane + s * TILE;
                for (int r = 0; r < TILE; r++) {
                    high[r] += T[v[r] & 15] + T[64 + (v[r] >> 4)] - 256;
                    if (WIDE) low[r] += T[128 + (v[r] & 15)] + T[192 + (v[r] >> 4)] - 256;
                }
            }
            for (int r = 0; r < TILE; r++)
                sums[m][r / 4].v[r % 4] = static_cast<float>(WIDE ? 255 * high[r] + low[r] : high[r]);
        }
    }

    static V bytes(int v) { return 0x0101010101010101u * static_cast<uint64_t>(v); }
    static V load_bytes(const uint8_t *p) {
        V v;
        memcpy(&v, p, 8);
        return v;
    }
    static void store_bytes(uint8_t *p, V v) { memcpy(p, &v, 8); }
    static V both(V a, V b) { return a & b; }
    static V select(V mask, V a, V b) { return b ^ (mask & (a ^ b)); }
    template <int N>
    static V right(V v) { return v >> N; }
    template <int N>
    static V left(V v) { return v << N; }
    static V down(V v, int n) { return v >> n; }

    static void reorder(const int16_t *q, int16_t *out) { memcpy(out, q, 128); }

    struct Words { int16_t w[32]; };

    template <int P>
    struct Table {
        const int16_t *c;
        explicit Table(const int16_t *centroids) : c(centroids) {}
        void lookup(const V *codes, Words &out) const {
            for (int i = 0; i < 32; i++) out.w[i] = c[codes[i / 8] >> (8 * (i % 8)) & ((1 << P) - 1)];
        }
    };

    static F dot(const Words &w, const int16_t *x) {
        int32_t sum[4] = {0};
        for (int i = 0; i < 32; i++) sum[i % 4] += w.w[i] * x[i / 8 * 64 + i % 8];
        F out;
        for (int i = 0; i < 4; i++) out.v[i] = static_cast<float>(sum[i]);
        return out;
    }
};

}  // namespace

const Kernels *kernels_portable() { return &Instance<Portable>::kernels; }
