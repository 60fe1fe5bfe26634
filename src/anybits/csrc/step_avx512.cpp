#include "step_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include "step.h"

const StepKernels *step_avx512() { return &kernels; }
#else
const StepKernels *step_avx512() { return nullptr; }
#endif
