// Activations in 8 bits on NEON, and many rows of any activations: what avx2_bytes.h has. With the dot products of Armv8.2
// sixteen products are one instruction, without them three.
#pragma once

#include "neon.h"

namespace {

struct NeonBytes : ByteIntegers<Neon> {
    static constexpr int MOST_ROWS = AB_MAX_ROWS;

    struct Words { V w[4]; };

    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 4 ? 1 : 1 << (P - 4);
        V at[COUNT];
        explicit Table(const int16_t *c) {
            uint8_t bytes[16 * COUNT];
            for (int i = 0; i < 16 * COUNT; i++)  // a table shorter than 16 entries is repeated
                bytes[i] = static_cast<uint8_t>(shrunk(c[i & ((1 << P) - 1)]));
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

using NeonInstance = WordInstance<Neon, NeonBytes>;

}  // namespace
