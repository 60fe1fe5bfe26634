// Whole matrices, for the cross-over to an ordinary GEMM. Values are exactly those of PlaneWeight.dequantize for
// affine levels (the same additions in the same order), and those that the codebook kernel multiplies by.
#pragma once

#include "codebook.h"

namespace {

template <int DTYPE>
inline float level_value(const uint8_t *levels, int64_t i) {
    if (DTYPE == AB_F32) return reinterpret_cast<const float *>(levels)[i];
    if (DTYPE == AB_I8) return static_cast<float>(reinterpret_cast<const int8_t *>(levels)[i]);
    const uint16_t value = reinterpret_cast<const uint16_t *>(levels)[i];
    return DTYPE == AB_BF16 ? bf16_to_float(value) : f16_to_float(value);
}

inline void store_value(void *out, int dtype, int64_t at, float value) {
    if (dtype == AB_F32)
        static_cast<float *>(out)[at] = value;
    else
        static_cast<uint16_t *>(out)[at] = float_to_bf16(value);
}

// The words of a step's rows, whichever way they are interleaved.
template <class I>
inline void step_words(const uint8_t *at, uint32_t *words) {
    if (I::ROW_WORDS) {
        memcpy(words, at, I::TILE * 4);
        return;
    }
    for (int r = 0; r < I::TILE; r++)
        words[r] = at[r] | at[I::TILE + r] << 8 | at[2 * I::TILE + r] << 16 | static_cast<uint32_t>(at[3 * I::TILE + r]) << 24;
}

// A tile's columns of one step: values[r] for column after column goes to out[column][r].
template <class I, int P>
void dequantize_step(const uint32_t (*words)[I::TILE], const float (*scales)[I::TILE], const float *offsets, int64_t columns,
                     int64_t rows, int dtype, void *out, int64_t at, int64_t stride) {
    if constexpr (I::OWN_DEQUANTIZE)
        if (columns == STEP && rows == I::TILE)
            return I::template dequantize_step<P>(words, scales, offsets, dtype, out, at, stride);
    for (int64_t k = 0; k < columns; k++, at += stride) {
        alignas(64) float values[I::TILE];
        alignas(64) uint16_t rounded[I::TILE];
        for (int r = 0; r < I::TILE; r++) {
            float value = offsets[r];
            for (int b = 0; b < P; b++)  // a clear bit means -scale
                value += float_of_bits(bits_of_float(scales[b][r]) ^ (~(words[b][r] >> k) << 31));
            values[r] = value;
            const uint32_t u = bits_of_float(value);
            rounded[r] = static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
        }
        const size_t count = static_cast<size_t>(rows);
        if (dtype == AB_F32)
            memcpy(static_cast<float *>(out) + at, values, count * 4);
        else if (rows == I::TILE)
            memcpy(static_cast<uint16_t *>(out) + at, rounded, sizeof rounded);
        else
            memcpy(static_cast<uint16_t *>(out) + at, rounded, count * 2);
    }
}

template <class I, int DTYPE>
void dequantize_affine_tile(const Header *h, int precision, int64_t tile, int64_t rows, int dtype, void *out,
                            int64_t column, int64_t stride) {
    const int64_t entries = affine_entries(h->shape, precision), step_bytes = I::TILE * 4;
    const uint8_t *levels = affine_levels_at(h, precision, tile);
    const float *steps = affine_steps_at(h, precision, tile);
    alignas(64) float scales[AB_MAX_PLANES][I::TILE], offsets[I::TILE];
    alignas(64) uint32_t words[AB_MAX_PLANES][I::TILE];
    void (*const step_of[])(const uint32_t (*)[I::TILE], const float (*)[I::TILE], const float *, int64_t, int64_t, int,
                            void *, int64_t, int64_t) = {
        dequantize_step<I, 1>, dequantize_step<I, 2>, dequantize_step<I, 3>, dequantize_step<I, 4>,
        dequantize_step<I, 5>, dequantize_step<I, 6>, dequantize_step<I, 7>, dequantize_step<I, 8>};
    int64_t ready = -1;
    for (int64_t step = 0; step < h->steps; step++) {
        const int64_t k = step * STEP, group = k / h->shape.group_columns;
        if (group != ready) {
            const int64_t first = group * entries * I::TILE;
            const auto value = [&](int64_t i) {
                const float level = level_value<DTYPE>(levels, first + i);
                return DTYPE == AB_I8 ? level * steps[i] : level;
            };
            for (int b = 0; b < precision; b++)
                for (int r = 0; r < I::TILE; r++) scales[b][r] = value(b * I::TILE + r);
            for (int r = 0; r < I::TILE; r++) offsets[r] = h->shape.has_offsets ? value(precision * I::TILE + r) : 0;
            ready = group;
        }
        for (int b = 0; b < precision; b++) step_words<I>(plane_at(h, b, tile) + step * step_bytes, words[b]);
        const int64_t columns = h->shape.in_features - k < STEP ? h->shape.in_features - k : STEP;
        step_of[precision - 1](words, scales, offsets, columns, rows, dtype, out, k * stride + column, stride);
    }
}

template <class I, int P>
void dequantize_codebook_row(const Header *h, int64_t n, int dtype, void *out, int64_t at) {
    using V = typename I::V;
    const uint8_t *plane = plane_at(h, 0, n);
    const int16_t *centroids = centroids_at(h, P, n);
    alignas(64) float values[1 << P < 32 ? 32 : 1 << P] = {0};
    for (int i = 0; i < 1 << P; i++) values[i] = static_cast<float>(centroids[i]) * row_scales(h, P)[n];
    alignas(64) uint8_t bytes[SPAN];
    int64_t begin = 0;
    if constexpr (I::OWN_DEQUANTIZE)
        if (dtype == AB_BF16) {
            begin = h->shape.in_features / SPAN;
            I::template dequantize_spans<P>(plane, h->plane_stride, begin, values, static_cast<uint16_t *>(out) + at);
        }
    for (int64_t span = begin; span < h->spans; span++) {
        for (int piece = 0; piece < 64 / I::BYTES; piece++) {
            V planes[P], codes[8];
            for (int b = 0; b < P; b++)
                planes[b] = I::load_bytes(plane + b * h->plane_stride + span * 64 + piece * I::BYTES);
            merge_codes<I, P>(planes, codes);
            for (int i = 0; i < 8; i++) I::store_bytes(bytes + 64 * i + piece * I::BYTES, codes[i]);
        }
        const int64_t k = span * SPAN, left = h->shape.in_features - k, columns = left < SPAN ? left : SPAN;
        for (int64_t i = 0; i < columns; i++) store_value(out, dtype, at + k + i, values[bytes[i] & ((1 << P) - 1)]);
    }
}

template <class I, int P>
void dequantize_codebook(const Header *h, int64_t first, int64_t count, int dtype, void *out, int64_t at) {
    const int64_t k = h->shape.in_features;
    for (int64_t r = 0; r < count; r++) dequantize_codebook_row<I, P>(h, first + r, dtype, out, at + r * k);
}

template <class I>
void dequantize_rows(const Header *h, int precision, int64_t first, int64_t count, int64_t planned_first, int64_t planned,
                     int dtype, void *out) {
    if (h->shape.levels == AB_CODEBOOK) {
        const int64_t at = (first - planned_first) * h->shape.in_features;
        switch (precision) {
            case 1: return dequantize_codebook<I, 1>(h, first, count, dtype, out, at);
            case 2: return dequantize_codebook<I, 2>(h, first, count, dtype, out, at);
            case 3: return dequantize_codebook<I, 3>(h, first, count, dtype, out, at);
            case 4: return dequantize_codebook<I, 4>(h, first, count, dtype, out, at);
            case 5: return dequantize_codebook<I, 5>(h, first, count, dtype, out, at);
            case 6: return dequantize_codebook<I, 6>(h, first, count, dtype, out, at);
            case 7: return dequantize_codebook<I, 7>(h, first, count, dtype, out, at);
            default: return dequantize_codebook<I, 8>(h, first, count, dtype, out, at);
        }
    }
    for (int64_t r = 0; r < count; r += I::TILE) {
        const int64_t tile = (first + r) / I::TILE, rows = count - r < I::TILE ? count - r : I::TILE;
        const int64_t column = first + r - planned_first;
        with_level_dtype(h, [&](auto dtype_of_levels) {
            dequantize_affine_tile<I, dtype_of_levels()>(h, precision, tile, rows, dtype, out, column, planned);
        });
    }
}

// The table of one instruction set: every function above, compiled with its flags.
template <class I>
struct Instance {
    static Form form(const Call &c) { return c.eight_bits && c.weight->shape.levels == AB_AFFINE ? SHORT_TABLES : EXACT; }
    static void activations(const Call &c, int row, float *floats) {
        if (c.weight->shape.levels == AB_AFFINE)
            affine_activations<I>(c, row, floats);
        else
            codebook_activations<I>(c, row, floats);
    }
    static void multiply(const Call &c, int64_t first, int64_t last, float *scratch) {
        if (c.weight->shape.levels == AB_CODEBOOK)
            codebook_multiply<I>(c, first, last, scratch);
        else if (c.form == SHORT_TABLES)
            affine_by_dtype<I, ONE_BYTE>(c, first, last, scratch);
        else if (I::WORD_ENTRIES && c.rows > 1)
            affine_by_dtype<I, I::WORD_ENTRIES ? WORDS : TWO_BYTES>(c, first, last, scratch);
        else
            affine_by_dtype<I, TWO_BYTES>(c, first, last, scratch);
    }
    static constexpr Kernels kernels = {I::TILE, I::ROW_WORDS, form, activations, multiply, dequantize_rows<I>, nullptr};
};

}  // namespace
