// float32 <-> bfloat16 and float16, rounding to nearest even. Plain loops that compilers vectorise.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

inline float float_of_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

inline uint32_t bits_of_float(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

inline float bf16_to_float(uint16_t h) { return float_of_bits(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float f) {
    const uint32_t u = bits_of_float(f);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const bool nan = (u & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(nan ? 0x7fc0 | (u >> 31 << 15) : rounded);
}

// Multiplying by 2^112 moves float16's exponent to float32's bias and gets subnormals right.
inline float f16_to_float(uint16_t h) {
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000;
    return float_of_bits(sign | ((h & 0x7c00) == 0x7c00 ? special : finite));
}

inline uint16_t float_to_f16(float f) {
    const uint32_t u = bits_of_float(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
        const uint32_t low = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
        return static_cast<uint16_t>(sign | low);
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

}  // namespace
