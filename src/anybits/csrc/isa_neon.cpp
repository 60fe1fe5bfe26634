#include "call.h"

#if defined(__aarch64__)
#include "neon_bytes.h"

const Kernels *kernels_neon() { return &NeonInstance::kernels; }
#else
const Kernels *kernels_neon() { return nullptr; }
#endif
