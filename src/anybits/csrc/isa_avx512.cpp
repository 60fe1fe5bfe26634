#include "call.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__GFNI__)
#include "avx512_bytes.h"

const Kernels *kernels_avx512() { return &Avx512Instance::kernels; }
#else
const Kernels *kernels_avx512() { return nullptr; }
#endif
