// A CUDA driver that does nothing but write down what it was asked: cuda-bindings, the real one, loads it as libcuda.
// It shows that the arguments go through the bindings as the driver wants them. seen: one line a call.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int CUresult;
static char seen[1 << 16];
static size_t used;
static uintptr_t context;
static int broken;  // the status that a launch gives

#define SAY(...) used += (size_t)snprintf(seen + used, sizeof seen - used, __VA_ARGS__)

const char *driver_seen(void) { return seen; }
void driver_breaks(int status) { broken = status; }

CUresult cuInit(unsigned flags) { SAY("init %u\n", flags); return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **made, int device) {
    *made = (void *)(uintptr_t)(0x1000 + device);
    SAY("retain %d\n", device);
    return 0;
}
CUresult cuCtxGetCurrent(void **now) { *now = (void *)context; return 0; }
CUresult cuCtxSetCurrent(void *now) {
    context = (uintptr_t)now;
    SAY("current %#lx\n", (unsigned long)context);
    return 0;
}
CUresult cuModuleLoadData(void **module, const void *image) {
    *module = (void *)0x2000;
    SAY("load %02x%.3s\n", ((const unsigned char *)image)[0], (const char *)image + 1);
    return 0;
}
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)0x3000;
    SAY("function %#lx %s\n", (unsigned long)module, name);
    return 0;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) {
    SAY("attribute %#lx %d %d\n", (unsigned long)function, attribute, value);
    return 0;
}
CUresult cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void *stream, void **parameters, void **extra) {
    const unsigned char *bytes = parameters[0];
    SAY("launch %#lx grid %u %u %u block %u %u %u shared %u stream %#lx extra %d arguments ", (unsigned long)function, gx,
        gy, gz, bx, by, bz, shared, (unsigned long)stream, extra != 0);
    for (int i = 0; i < 136; i++) SAY("%02x", bytes[i]);
    SAY("\n");
    return broken;
}

#define ENTRY(function) {#function, (void *)function}
static const struct { const char *name; void *function; } entries[] = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGet), ENTRY(cuDevicePrimaryCtxRetain),
    ENTRY(cuCtxGetCurrent), ENTRY(cuCtxSetCurrent), ENTRY(cuModuleLoadData), ENTRY(cuModuleGetFunction),
    ENTRY(cuFuncSetAttribute), ENTRY(cuLaunchKernel),
};
CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    *function = 0;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (!strcmp(symbol, entries[i].name)) *function = entries[i].function;
    if (status) *status = *function ? 0 : 1;
    return 0;
}
