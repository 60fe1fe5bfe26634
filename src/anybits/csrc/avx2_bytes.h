// What AVX2 does beside tables of sums and 16-bit centroids: few rows of 8-bit activations and codebooks, many rows of 8-bit
// activations, and many rows of others and affine levels (docs/kernels.md).
#pragma once

#include "avx2_byte_levels.h"

namespace {

// vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits, so centroids give their signs to the
// activations: no factor is above 127, and two products stay below 2^15.
struct Avx2Bytes : ByteIntegers<Avx2> {
    // With more, centroids in 16 bits are as fast where levels are not made: a product of 32 bytes takes four instructions, of 32 words too.
    static constexpr int MOST_ROWS = 7;

    struct Words { V w[4]; };

    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 4 ? 1 : 1 << (P - 4), ENTRIES = 16 * COUNT;
        alignas(32) uint8_t at[ENTRIES];
        explicit Table(const int16_t *c) {
            for (int i = 0; i < ENTRIES; i++)  // a table shorter than 16 entries is repeated
                at[i] = static_cast<uint8_t>(shrunk(c[i & ((1 << P) - 1)]));
        }
        void lookup(const V *codes, Words &out) const {
            for (int i = 0; i < 4; i++) {
                const V index = _mm256_and_si256(codes[i], _mm256_set1_epi8(0x0f));
                out.w[i] = Avx2::Table<P>::template find<COUNT>(at, index, codes[i]);
            }
        }
    };

    static F dot(const Words &w, const int8_t *x) {
        const V one = _mm256_set1_epi16(1);
        V sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) {
            const V v = _mm256_loadu_si256(reinterpret_cast<const V *>(x + 64 * i));
            const V pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.w[i]), _mm256_sign_epi8(v, w.w[i]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, one));
        }
        return _mm256_cvtepi32_ps(sum);
    }
};

struct Avx2Instance {
    using Others = WordInstance<Avx2, Avx2Bytes>;
    static Form form(const Call &c) { return byte_levels_pay(c) ? BYTE_LEVELS : Others::form(c); }
    static void activations(const Call &c, int row, float *floats) {
        if (c.form == BYTE_LEVELS) return byte_activations(c, row, floats);
        Others::activations(c, row, floats);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.form == BYTE_LEVELS) return byte_levels_multiply(c, first, last, scratch);
        Others::multiply(c, first, last, scratch);
    }
    static constexpr Kernels kernels = {Avx2::TILE, Avx2::ROW_WORDS, form, activations, multiply, dequantize_rows<Avx2>, nullptr};
};

}  // namespace
