#include "call.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include "avx512.h"

const Kernels *kernels_avx512() { return &Instance<Avx512>::kernels; }
#else
const Kernels *kernels_avx512() { return nullptr; }
#endif
