// Everything the kernels ask of the machine, in one place: instructions, memory, barriers. No header is included,
// so that NVRTC needs no CUDA toolkit. tests/cuda_emulation/device.h defines the same names in plain C++, where the
// threads of a block are fibers, every access is checked, and asynchronous copies land as late as they may.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct alignas(8) Words2 { u32 v[2]; };
struct alignas(16) Words4 { u32 v[4]; };

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE i64 block_x() { return blockIdx.x; }
DEVICE i64 block_y() { return blockIdx.y; }
DEVICE i64 blocks_x() { return gridDim.x; }

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Loads of data that nothing writes during the kernel, through the read-only path.
template <class T> DEVICE T load(const T *at) { return __ldg(at); }
template <> DEVICE Words2 load(const Words2 *at) {
    const uint2 v = __ldg(reinterpret_cast<const uint2 *>(at));
    return {{v.x, v.y}};
}
template <> DEVICE Words4 load(const Words4 *at) {
    const uint4 v = __ldg(reinterpret_cast<const uint4 *>(at));
    return {{v.x, v.y, v.z, v.w}};
}
template <class T> DEVICE void store(T *at, T value) { *at = value; }

// 16 bytes from global to shared memory, in the background. Planes are used once: they pass by L1.
DEVICE void copy_async(void *shared, const void *global) {
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE float shuffle_xor(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
DEVICE int shuffle_xor(int v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }

DEVICE float bits_to_float(u32 v) { return __uint_as_float(v); }
DEVICE u32 float_to_bits(float v) { return __float_as_uint(v); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float inverse_root(float v) { return rsqrtf(v); }
DEVICE float exponential(float v) { return expf(v); }
DEVICE int nearest(float v) { return __float2int_rn(v); }
DEVICE float half_to_float(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
DEVICE u16 float_to_half(float v) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
DEVICE float bfloat_to_float(u16 v) { return __uint_as_float(static_cast<u32>(v) << 16); }
DEVICE u16 float_to_bfloat(float v) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}

// d[16 x 8] = a[16 x 32] * b[32 x 8] + c, in 8-bit and 32-bit integers. Lane 4r + t holds of a: rows r and r + 8,
// bytes 4t ... 4t + 3 (a0, a1) and 16 + 4t ... (a2, a3); of b: column r, the same bytes (b0, b1); of c and d:
// rows r (0, 1) and r + 8 (2, 3), columns 2t and 2t + 1.
DEVICE void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// The same with a[16 x 16] and b[16 x 8] in fp16, sums in fp32: halves 2t, 2t + 1 and 8 + 2t, 9 + 2t.
DEVICE void multiply_halves(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
