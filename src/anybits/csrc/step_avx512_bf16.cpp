#include "step_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include "step.h"

const StepKernels *step_avx512_bf16() { return &kernels; }
#else
const StepKernels *step_avx512_bf16() { return nullptr; }
#endif
