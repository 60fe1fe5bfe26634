// Inner interface between the files that are compiled for the baseline machine.
#pragma once

#include "call.h"

// The kernels of `isa`, or NULL when this build or this machine has none.
const Kernels *kernels_of(int isa);

int blob_check(const void *blob, int64_t blob_bytes);
