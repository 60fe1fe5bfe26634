#include "step.h"

const StepKernels *step_portable() { return &kernels; }
