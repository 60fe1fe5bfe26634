// Many rows of bf16 on AVX-512 with products of bf16; everything else is isa_avx512.cpp's.
#include "call.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__GFNI__) && defined(__AVX512BF16__)
#include "avx512_bf16.h"

const Kernels *kernels_avx512_bf16() { return Bf16Instance::kernels(); }
#else
const Kernels *kernels_avx512_bf16() { return nullptr; }
#endif
