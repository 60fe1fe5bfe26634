// AMX: tiles of 16 x 64 bytes and their products. Small matrices only pay for reading the planes: a product of tiles
// takes 16 cycles for one row of x or for eight. Everything else is AVX-512's, down to the layout of a blob.
#include "call.h"

#if defined(__AMX_INT8__) && defined(__AVX512VBMI__) && defined(__GFNI__)
#include "amx_codebook.h"

const Kernels *kernels_amx() { return &AmxInstance::kernels; }
#else
const Kernels *kernels_amx() { return nullptr; }
#endif
