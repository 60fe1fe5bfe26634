// What AVX2 does beside tables of sums and 16-bit centroids: few rows of 8-bit activations and codebooks, and many rows of any
// activations and affine levels (docs/kernels.md).
#pragma once

#include "avx2.h"

namespace {

constexpr int BYTE_PLANES = 6;  // more planes say more than 8 bits of a centroid keep

// vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits, so centroids give their signs to the
// activations: no factor is above 127, and two products stay below 2^15.
struct Avx2Bytes : Avx2 {
    using X = int8_t;
    static constexpr int64_t PART = 256;
    static constexpr float X_LIMIT = 127.0f;
    static constexpr int16_t SHRINK = 508;  // 13-bit centroids become 8-bit ones: times SHRINK / 32768
    static constexpr float CENTROID = 32768.0f / SHRINK;

    struct Words { V w[4]; };

    static void reorder(const int16_t *q, int8_t *out) {
        for (int i = 0; i < 64; i++) out[i] = static_cast<int8_t>(q[i]);
    }

    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 4 ? 1 : 1 << (P - 4), ENTRIES = 16 * COUNT;
        alignas(32) uint8_t at[ENTRIES];
        explicit Table(const int16_t *c) {
            for (int i = 0; i < ENTRIES; i++)  // a table shorter than 16 entries is repeated
                at[i] = static_cast<uint8_t>((c[i & ((1 << P) - 1)] * SHRINK + 0x4000) >> 15);
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

// Rows of x from which centroids in 16 bits are as fast: a product of 32 bytes takes four instructions, of 32 words too.
constexpr int WORDS_AGAIN = 8;

// Rows of x from which 14-bit levels cost less than tables of sums, by the highest precision, with activations in 16 and in 8 bits;
// 513 for never. In 16 bits they would from five on: up to 15 a row's result does not depend on its batch.
constexpr int WORDS_ROWS[2][AB_MAX_PLANES + 1] = {{0, 513, 16, 16, 16, 16, 16, 16, 16}, {0, 513, 513, 48, 20, 12, 8, 8, 8}};

struct Avx2Instance {
    using Exact = Instance<Avx2>;
    static Form form(const Call &c) {
        if (c.weight->shape.levels == AB_AFFINE) return words_pay(c, WORDS_ROWS[c.eight_bits]) ? WORD_LEVELS : Exact::form(c);
        return c.eight_bits && c.rows < WORDS_AGAIN && c.segments[0].precision <= BYTE_PLANES ? BYTES : EXACT;
    }
    static void activations(const Call &c, int row, float *floats) {
        if (c.form == WORD_LEVELS) return word_activations<Avx2>(c, row, floats);
        if (c.form == BYTES) return codebook_activations<Avx2Bytes>(c, row, floats);
        Exact::activations(c, row, floats);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.form == WORD_LEVELS) return word_multiply<Avx2>(c, first, last, scratch);
        if (c.form == BYTES) return codebook_multiply<Avx2Bytes>(c, first, last, scratch);
        Exact::multiply(c, first, last, scratch);
    }
    static constexpr Kernels kernels = {Avx2::TILE, Avx2::ROW_WORDS, form, activations, multiply, dequantize_rows<Avx2>, nullptr};
};

}  // namespace
