// Numbers of the dtypes that tensors have: macro DTYPE and the like are one of these.
#pragma once

constexpr int F16 = 0, BF16 = 1, F32 = 2;

template <int TYPE> DEVICE float read_float(const u8 *base, i64 index) {
    if (TYPE == F32) return load(reinterpret_cast<const float *>(base) + index);
    const u16 v = load(reinterpret_cast<const u16 *>(base) + index);
    return TYPE == F16 ? half_to_float(v) : bfloat_to_float(v);
}
template <int TYPE> DEVICE void write_float(u8 *base, i64 index, float v) {
    if (TYPE == F32) store(reinterpret_cast<float *>(base) + index, v);
    else store(reinterpret_cast<u16 *>(base) + index, TYPE == F16 ? float_to_half(v) : float_to_bfloat(v));
}
// v as a tensor of this dtype would keep it.
template <int TYPE> DEVICE float rounded(float v) {
    if (TYPE == F32) return v;
    return TYPE == F16 ? half_to_float(float_to_half(v)) : bfloat_to_float(float_to_bfloat(v));
}
