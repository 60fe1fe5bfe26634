// Activations in 8 bits on NEON, and many rows of any activations: what avx2_bytes.h has. With the dot products of Armv8.2
// sixteen products are one instruction, without them three.
#pragma once

#include "neon.h"

namespace {

constexpr int BYTE_PLANES = 6;  // more planes say more than 8 bits of a centroid keep

struct NeonBytes : Neon {
    using X = int8_t;
    static constexpr float X_LIMIT = 127.0f;
    static constexpr int16_t SHRINK = 508;  // 13-bit centroids become 8-bit ones: times SHRINK / 32768
    static constexpr float CENTROID = 32768.0f / SHRINK;

    static void reorder(const int16_t *q, int8_t *out) {
        for (int i = 0; i < 64; i++) out[i] = static_cast<int8_t>(q[i]);
    }

    struct Words { V w[4]; };

    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 4 ? 1 : 1 << (P - 4);
        V at[COUNT];
        explicit Table(const int16_t *c) {
            uint8_t bytes[16 * COUNT];
            for (int i = 0; i < 16 * COUNT; i++)  // a table shorter than 16 entries is repeated
                bytes[i] = static_cast<uint8_t>((c[i & ((1 << P) - 1)] * SHRINK + 0x4000) >> 15);
            for (int i = 0; i < COUNT; i++) at[i] = vld1q_u8(bytes + 16 * i);
        }
        void lookup(const V *codes, Words &out) const {
            for (int i = 0; i < 4; i++) out.w[i] = Neon::Table<P>::find(at, codes[i]);
        }
    };

    static int32x4_t add_products(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, w, x);
#else  // two products of at most 127 * 127 fit into 16 bits
        return vpadalq_s16(sum, vmlal_s8(vmull_high_s8(w, x), vget_low_s8(w), vget_low_s8(x)));
#endif
    }

    static F dot(const Words &w, const int8_t *x) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < 4; i++) sum = add_products(sum, vreinterpretq_s8_u8(w.w[i]), vld1q_s8(x + 64 * i));
        return vcvtq_f32_s32(sum);
    }
};

// As on AVX2, by counts of instructions: no Arm machine was at hand.
constexpr int WORDS_ROWS[2][AB_MAX_PLANES + 1] = {{0, 513, 16, 16, 16, 16, 16, 16, 16}, {0, 513, 513, 48, 20, 12, 8, 8, 8}};

struct NeonInstance {
    using Exact = Instance<Neon>;
    static Form form(const Call &c) {
        if (c.weight->shape.levels == AB_AFFINE) return words_pay(c, WORDS_ROWS[c.eight_bits]) ? WORD_LEVELS : Exact::form(c);
        return c.eight_bits && c.segments[0].precision <= BYTE_PLANES ? BYTES : EXACT;
    }
    static void activations(const Call &c, int row, float *floats) {
        if (c.form == WORD_LEVELS) return word_activations<Neon>(c, row, floats);
        if (c.form == BYTES) return codebook_activations<NeonBytes>(c, row, floats);
        Exact::activations(c, row, floats);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.form == WORD_LEVELS) return word_multiply<Neon>(c, first, last, scratch);
        if (c.form == BYTES) return codebook_multiply<NeonBytes>(c, first, last, scratch);
        Exact::multiply(c, first, last, scratch);
    }
    static constexpr Kernels kernels = {Neon::TILE, Neon::ROW_WORDS, form, activations, multiply, dequantize_rows<Neon>, nullptr};
};

}  // namespace
