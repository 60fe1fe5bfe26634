// NEON as every 64-bit ARM has it: byte lookups in up to 64 entries (tbl), widening sums.
#pragma once

#include "dequantize.h"
#include "word_levels.h"

#include <arm_neon.h>

namespace {

struct Neon : ShortIntegers {
    using V = uint8x16_t;
    using F = float32x4_t;
    static constexpr int TILE = 16, LANES = 4, BYTES = 16;
    static constexpr int LOOKUP_ROWS = 4;       // rows of x that go through an inner loop together
    static constexpr int CODES_ROWS = 5;

    static F zero() { return vdupq_n_f32(0); }
    static F set1(float v) { return vdupq_n_f32(v); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F load(const float *p) { return vld1q_f32(p); }
    static void store(float *p, F v) { vst1q_f32(p, v); }
    static float total(F v) { return vaddvq_f32(v); }

    static F halves(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

    template <int DTYPE>
    static F level(const uint8_t *p, int f) {
        if constexpr (DTYPE == AB_F32) return vld1q_f32(reinterpret_cast<const float *>(p) + f * 4);
        if constexpr (DTYPE == AB_I8) {
            int32_t four;
            memcpy(&four, p + f * 4, 4);
            const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
            return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
        }
        const uint16_t *h = reinterpret_cast<const uint16_t *>(p) + f * 4;
        if constexpr (DTYPE == AB_F16) return halves(h);
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(h), 16));
    }

    static void load_f16(const uint16_t *p, float *out, int64_t n) {
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) vst1q_f32(out + i, halves(p + i));
        for (; i < n; i++) out[i] = f16_to_float(p[i]);
    }
    static void store_f16(const float *p, uint16_t *out, int64_t n) {
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(p + i))));
        for (; i < n; i++) out[i] = float_to_f16(p[i]);
    }

    struct ByteSums {
        uint16x8_t low, high;  // rows 0-7, 8-15
        void clear() { low = high = vdupq_n_u16(0); }
        void add(V bytes) {
            low = vaddw_u8(low, vget_low_u8(bytes));
            high = vaddw_high_u8(high, bytes);
        }
        void rows(uint32x4_t *out) const {
            out[0] = vmovl_u16(vget_low_u16(low)), out[1] = vmovl_high_u16(low);
            out[2] = vmovl_u16(vget_low_u16(high)), out[3] = vmovl_high_u16(high);
        }
    };

    template <int MC, Entries E, int STEPS>
    static inline __attribute__((always_inline)) void lookup(const uint8_t *plane, int steps,
                                                             const uint8_t *const *tables, F (*sums)[4]) {
        constexpr bool WIDE = E == TWO_BYTES;
        const V nibble = vdupq_n_u8(0x0f);
        constexpr int TABLE = table_of(E);
        const int count = STEPS ? STEPS : steps;
        ByteSums high[MC], low[MC];
        for (int m = 0; m < MC; m++) high[m].clear(), low[m].clear();
        for (int t = 0; t < count; t++) {
            for (int j = 0; j < 4; j++) {
                const V v = vld1q_u8(plane + t * 64 + j * 16), a = vandq_u8(v, nibble), b = vshrq_n_u8(v, 4);
                for (int m = 0; m < MC; m++) {
                    const uint8_t *T = tables[m] + t * TABLE + j * 16;
                    high[m].add(vqtbl1q_u8(vld1q_u8(T), a));
                    high[m].add(vqtbl1q_u8(vld1q_u8(T + 64), b));
                    if constexpr (WIDE) {
                        low[m].add(vqtbl1q_u8(vld1q_u8(T + 128), a));
                        low[m].add(vqtbl1q_u8(vld1q_u8(T + 192), b));
                    }
                }
            }
        }
        const uint32x4_t bias = vdupq_n_u32(static_cast<uint32_t>(count * 8 * (WIDE ? 128 * 256 : 128)));
        for (int m = 0; m < MC; m++) {
            uint32x4_t top[4], rest[4];
            high[m].rows(top);
            if constexpr (WIDE) {
                low[m].rows(rest);
                for (int i = 0; i < 4; i++) top[i] = vmlaq_n_u32(rest[i], top[i], 255);
            }
            for (int i = 0; i < 4; i++) sums[m][i] = vcvtq_f32_s32(vreinterpretq_s32_u32(vsubq_u32(top[i], bias)));
        }
    }

    static V bytes(int v) { return vdupq_n_u8(static_cast<uint8_t>(v)); }
    static V load_bytes(const uint8_t *p) { return vld1q_u8(p); }
    static void store_bytes(uint8_t *p, V v) { vst1q_u8(p, v); }
    static V both(V a, V b) { return vandq_u8(a, b); }
    static V select(V mask, V a, V b) { return vbslq_u8(mask, a, b); }
    template <int N>
    static V right(V v) { return vshrq_n_u8(v, N); }
    template <int N>
    static V left(V v) { return vshlq_n_u8(v, N); }
    static V down(V v, int n) { return vshlq_u8(v, vdupq_n_s8(static_cast<int8_t>(-n))); }

    static void reorder(const int16_t *q, int16_t *out) { memcpy(out, q, 128); }

    struct Words { V w[8]; };

    template <int P>
    struct Table {
        static constexpr int COUNT = P <= 4 ? 1 : 1 << (P - 4);
        V low[COUNT], high[COUNT];
        explicit Table(const int16_t *c) {
            uint8_t l[16 * COUNT], h[16 * COUNT];
            for (int i = 0; i < 16 * COUNT; i++) {  // a table shorter than 16 entries is repeated
                const uint16_t v = static_cast<uint16_t>(c[i & ((1 << P) - 1)]);
                l[i] = static_cast<uint8_t>(v), h[i] = static_cast<uint8_t>(v >> 8);
            }
            for (int i = 0; i < COUNT; i++) low[i] = vld1q_u8(l + 16 * i), high[i] = vld1q_u8(h + 16 * i);
        }
        // An index past a table leaves `found` as it was, so tables of 64 follow one another.
        static V find(const V *t, V index) {
            if constexpr (P <= 4) {
                return vqtbl1q_u8(t[0], vandq_u8(index, vdupq_n_u8(0x0f)));
            } else if constexpr (P == 5) {
                return vqtbl2q_u8(uint8x16x2_t{{t[0], t[1]}}, index);
            } else {
                V found = vqtbl4q_u8(uint8x16x4_t{{t[0], t[1], t[2], t[3]}}, index);
                for (int i = 4; i < COUNT; i += 4) {
                    index = vsubq_u8(index, vdupq_n_u8(64));
                    found = vqtbx4q_u8(found, uint8x16x4_t{{t[i], t[i + 1], t[i + 2], t[i + 3]}}, index);
                }
                return found;
            }
        }
        void one(V code, V *out) const {
            const V l = find(low, code), h = find(high, code);
            out[0] = vzip1q_u8(l, h), out[1] = vzip2q_u8(l, h);
        }
        void lookup(const V *codes, Words &out) const {
            for (int i = 0; i < 4; i++) one(codes[i], out.w + 2 * i);
        }
    };

    static F dot(const Words &w, const int16_t *x) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < 8; i++) {
            const int16x8_t a = vreinterpretq_s16_u8(w.w[i]), b = vld1q_s16(x + (i >> 1) * 64 + (i & 1) * 8);
            sum = vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b));
            sum = vmlal_high_s16(sum, a, b);
        }
        return vcvtq_f32_s32(sum);
    }

    // For word_levels.h: a vector is one row.
    using Sum = int32x4_t;
    static Sum no_sum() { return vdupq_n_s32(0); }
    static V zip_low(V a, V b) { return vzip1q_u8(a, b); }
    static V zip_high(V a, V b) { return vzip2q_u8(a, b); }
    static V add_words(V a, V b) { return vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b))); }
    static V find(V table, V code) { return vqtbl1q_u8(table, vandq_u8(code, vdupq_n_u8(0x0f))); }
    static V eight_words(const int16_t *p) { return vreinterpretq_u8_s16(vld1q_s16(p)); }
    static Sum add_word_products(Sum sum, V w, V x) {
        const int16x8_t a = vreinterpretq_s16_u8(w), b = vreinterpretq_s16_u8(x);
        return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
    }
    static constexpr int row_of(int place) { return place; }
    static F four_totals(const Sum *s) {
        const F first = vpaddq_f32(vcvtq_f32_s32(s[0]), vcvtq_f32_s32(s[1]));
        return vpaddq_f32(first, vpaddq_f32(vcvtq_f32_s32(s[2]), vcvtq_f32_s32(s[3])));
    }
    // 16 rows' values, rounded, as low and high bytes.
    static void narrow(const F *v, V *low, V *high) {
        uint16x8_t words[2];
        for (int i = 0; i < 2; i++) {
            const int16x4_t first = vmovn_s32(vcvtnq_s32_f32(v[2 * i]));
            words[i] = vreinterpretq_u16_s16(vmovn_high_s32(first, vcvtnq_s32_f32(v[2 * i + 1])));
        }
        *low = vmovn_high_u16(vmovn_u16(words[0]), words[1]);
        *high = vshrn_high_n_u16(vshrn_n_u16(words[0], 8), words[1], 8);
    }
};

}  // namespace
