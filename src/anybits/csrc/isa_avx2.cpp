#include "call.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2_bytes.h"

const Kernels *kernels_avx2() { return &Avx2Instance::kernels; }
#else
const Kernels *kernels_avx2() { return nullptr; }
#endif
