#include "step_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "step.h"

const StepKernels *step_avx2() { return &kernels; }
#else
const StepKernels *step_avx2() { return nullptr; }
#endif
