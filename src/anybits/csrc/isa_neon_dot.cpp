#include "call.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include "neon_bytes.h"

const Kernels *kernels_neon_dot() { return &NeonInstance::kernels; }
#else
const Kernels *kernels_neon_dot() { return nullptr; }
#endif
