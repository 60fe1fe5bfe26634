// csrc/cuda/device.h for a machine without a GPU: the same names in plain C++. The threads of a block are fibers that
// meet at barriers and warp instructions. What a GPU forgives or only sometimes does, happens here always: a load
// outside of a buffer or off its alignment is an error, shared memory starts poisoned, asynchronous copies land no
// sooner than they are waited for, a warp instruction that not all lanes reach is a deadlock, and the order in which
// threads run is shuffled, so that a missing barrier shows. With RACES, races.h finds it whatever the order was.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct alignas(8) Words2 { u32 v[2]; };
struct alignas(16) Words4 { u32 v[4]; };

#define KERNEL(threads, blocks) static void
#define DEVICE inline
#define DYNAMIC_SHARED(name) u8 *name = emulation::shared

namespace emulation {

constexpr size_t STACK = 128 << 10, SHARED = 228 << 10, FENCE = 4096;
constexpr int WARP = 32;

struct Copy { void *to; const void *from; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups;  // committed and open asynchronous copies, the open group last
    bool done;
};
struct Meeting {  // of a warp or a block: what each thread brings, and how many have come
    int arrived = 0, kind = 0;
    u64 round = 0;
    u8 brought[WARP][64];
};
struct Range { u64 begin, end; bool writable; std::vector<int> users; };

static std::vector<Range> ranges;
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static Meeting block;
static ucontext_t scheduler;
static int current;
static i64 block_index[2], grid[2];
static bool progress;
static char failure[256];
alignas(128) static u8 shared[SHARED + FENCE];

static void yield() { swapcontext(&fibers[current].context, &scheduler); }
static void fail(const char *what, u64 at) {
    if (!failure[0])
        snprintf(failure, sizeof failure, "%s at %#llx by thread %d of block %lld, %lld", what, at, current,
                 block_index[0], block_index[1]);
}
#ifdef RACES
}  // namespace emulation
#include "races.h"
namespace emulation {
#else
#define NOT_TRACED
static void touch(const void *, size_t, bool, bool = false) {}
static void landed(const void *, size_t) {}
static void begin_block(size_t) {}
static void end_block() {}
static void passed_block() {}
static void passed_warp() {}
#endif

// What a launch writes belongs to one thread: nothing orders the threads of different blocks.
static bool alone(Range &r, u64 from, size_t size, bool writing) {
    if (!r.writable) return true;
    const int me = 1 + current + static_cast<int>(fibers.size() * (block_index[0] + block_index[1] * grid[0]));
    if (r.users.empty()) r.users.resize(r.end - r.begin);
    for (u64 i = from - r.begin; i < from - r.begin + size; i++) {
        if (r.users[i] && r.users[i] != me) return fail("race: two threads use what one of them writes", from), false;
        if (writing) r.users[i] = me;
    }
    return true;
}
static bool check(const void *at, size_t size, bool writing) {
    const u64 from = reinterpret_cast<u64>(at);
    if (from % size) return fail("misaligned access", from), false;
    for (Range &r : ranges)
        if (from >= r.begin && from + size <= r.end && (r.writable || !writing)) return alone(r, from, size, writing);
    return fail(writing ? "store outside of every buffer" : "load outside of every buffer", from), false;
}

// All threads of `meeting` call this; the last to come runs `act`, then all go on.
static void meet(Meeting &meeting, int size, int kind, const std::function<void()> &act) {
    if (meeting.arrived && meeting.kind != kind) fail("threads meet at different instructions", kind);
    meeting.kind = kind;
    const u64 round = meeting.round;
    if (++meeting.arrived == size) {
        act();
        meeting.arrived = 0;
        meeting.round++;
        progress = true;
        return;
    }
    while (meeting.round == round) yield();
}
template <class In, class Out> static Out together(int kind, const In &in, void (*act)(const In *, Out *)) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "a lane brings at most 64 bytes");
    Meeting &warp = warps[current / WARP];
    memcpy(warp.brought[current % WARP], &in, sizeof in);
    meet(warp, WARP, kind, [&] {
        In ins[WARP];
        Out outs[WARP];
        for (int i = 0; i < WARP; i++) memcpy(&ins[i], warp.brought[i], sizeof(In));
        act(ins, outs);
        for (int i = 0; i < WARP; i++) memcpy(warp.brought[i], &outs[i], sizeof(Out));
    });
    Out out;
    memcpy(&out, warp.brought[current % WARP], sizeof out);
    return out;
}

static std::function<void()> entry;
static void start() {
    entry();
    fibers[current].done = true;
    progress = true;
    for (;;) yield();
}

// Run one block: every thread in turn, each time in another order, until all are done or none can go on.
NOT_TRACED static void run_block(int threads, size_t shared_bytes, u32 seed) {
    memset(shared, 0xcd, sizeof shared);
    for (Meeting &w : warps) w.arrived = 0;
    block.arrived = 0;
    for (Fiber &f : fibers) {
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        f.groups.assign(1, {});
        f.done = false;
        makecontext(&f.context, start, 0);
    }
    begin_block(shared_bytes);
    std::vector<int> order(threads);
    for (int i = 0; i < threads; i++) order[i] = i;
    for (int left = threads; left && !failure[0];) {
        for (int i = threads - 1; i > 0; i--) {
            seed = seed * 1664525u + 1013904223u;
            std::swap(order[i], order[(seed >> 8) % (i + 1)]);
        }
        progress = false;
        left = 0;
        for (int i : order) {
            if (fibers[i].done) continue;
            left++;
            current = i;
            swapcontext(&scheduler, &fibers[i].context);
        }
        if (left && !progress) fail("deadlock: not all threads reached a barrier or warp instruction", left);
    }
    end_block();
    for (size_t i = shared_bytes; i < shared_bytes + FENCE && i < sizeof shared; i++)
        if (shared[i] != 0xcd) return fail("store behind the end of shared memory", i);
}

static const char *run(i64 gx, i64 gy, int threads, i64 shared_bytes, const u64 *buffers, int count, u32 seed) {
    failure[0] = 0;
    ranges.clear();
    for (int i = 0; i < count; i++) ranges.push_back({buffers[3 * i], buffers[3 * i + 1], buffers[3 * i + 2] != 0, {}});
    if (static_cast<size_t>(shared_bytes) > SHARED || threads % WARP) return "the launch does not fit";
    fibers.resize(threads);
    for (Fiber &f : fibers) f.stack.resize(STACK);
    warps.resize(threads / WARP);
    grid[0] = gx, grid[1] = gy;
    for (block_index[1] = 0; block_index[1] < gy; block_index[1]++)
        for (block_index[0] = 0; block_index[0] < gx && !failure[0]; block_index[0]++)
            run_block(threads, static_cast<size_t>(shared_bytes), seed++);
    return failure;
}

}  // namespace emulation

DEVICE int thread_index() { return emulation::current; }
DEVICE i64 block_x() { return emulation::block_index[0]; }
DEVICE i64 block_y() { return emulation::block_index[1]; }
DEVICE i64 blocks_x() { return emulation::grid[0]; }

DEVICE void block_barrier() {
    emulation::meet(emulation::block, static_cast<int>(emulation::fibers.size()), 1, emulation::passed_block);
}
DEVICE void warp_barrier() {
    emulation::meet(emulation::warps[emulation::current / emulation::WARP], emulation::WARP, 2, emulation::passed_warp);
}

template <class T> DEVICE T load(const T *at) {
    T value;
    memset(&value, 0, sizeof value);
    if (emulation::check(at, sizeof(T), false)) memcpy(&value, at, sizeof value);
    return value;
}
template <class T> DEVICE void store(T *at, T value) {
    if (emulation::check(at, sizeof(T), true)) *at = value;
}

NOT_TRACED static void copy_async(void *shared, const void *global) {
    const u64 to = reinterpret_cast<u64>(shared);
    if (to % 16) emulation::fail("misaligned copy", to);
    if (!emulation::check(global, 16, false)) return;
    emulation::touch(shared, 16, true, true);
    memset(shared, 0xa5, 16);
    emulation::fibers[emulation::current].groups.back().push_back({shared, global});
}
DEVICE void copy_commit() { emulation::fibers[emulation::current].groups.emplace_back(); }
template <int PENDING> NOT_TRACED static void copy_wait() {
    auto &groups = emulation::fibers[emulation::current].groups;
    while (groups.size() > PENDING + 1) {
        for (const emulation::Copy &c : groups.front()) memcpy(c.to, c.from, 16), emulation::landed(c.to, 16);
        groups.erase(groups.begin());
    }
}

template <class T> struct Shuffle { T value; int lanes; };
template <class T> DEVICE T shuffle_xor(T v, int lanes) {
    return emulation::together<Shuffle<T>, T>(3, {v, lanes}, [](const Shuffle<T> *in, T *out) {
        for (int i = 0; i < 32; i++) out[i] = in[i ^ in[i].lanes].value;
    });
}

DEVICE float bits_to_float(u32 v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
DEVICE u32 float_to_bits(float v) {
    u32 u;
    memcpy(&u, &v, 4);
    return u;
}
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float inverse_root(float v) { return 1.0f / sqrtf(v); }
DEVICE float exponential(float v) { return expf(v); }
DEVICE int nearest(float v) { return static_cast<int>(rintf(v)); }
DEVICE float half_to_float(u16 h) {
    const u32 sign = static_cast<u32>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
    const float size = exponent ? ldexpf(1024.0f + fraction, static_cast<int>(exponent) - 25) : ldexpf(fraction, -24);
    return bits_to_float(sign | float_to_bits(size));
}
DEVICE u16 float_to_half(float v) {
    const u32 sign = float_to_bits(v) >> 16 & 0x8000;
    const float size = fabsf(v);
    if (size != size) return static_cast<u16>(sign | 0x7e00);
    if (size == 0) return static_cast<u16>(sign);
    if (size >= 65520.0f) return static_cast<u16>(sign | 0x7c00);
    int exponent;
    frexpf(size, &exponent);
    if (exponent < -13) return static_cast<u16>(sign | static_cast<u32>(rintf(ldexpf(size, 24))));
    const u32 fraction = static_cast<u32>(rintf(ldexpf(size, 11 - exponent)));  // 1024 ... 2048
    return static_cast<u16>(sign | ((static_cast<u32>(exponent + 14) << 10) + fraction - 1024));
}
DEVICE float bfloat_to_float(u16 v) { return bits_to_float(static_cast<u32>(v) << 16); }
DEVICE u16 float_to_bfloat(float v) {
    const u32 u = float_to_bits(v);
    if (v != v) return 0x7fff;
    return static_cast<u16>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

struct Product { u32 a[4], b[2], c[4]; };
struct Result { u32 v[4]; };
// Element `k` of row or column `index` of a fragment of width-byte numbers, by the lanes that hold it.
template <class Sum> DEVICE void product(const Product *in, Result *out, int width, Sum (*multiply)(u32, u32)) {
    const int each = 4 / width;  // numbers in a register
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            Sum sum;
            memcpy(&sum, &in[lane].c[i], 4);
            for (int k = 0; k < 8 * each; k++) {
                const int slot = k / each % 4, half = k / (4 * each), shift = 8 * width * (k % each);
                const u32 a = in[row % 8 * 4 + slot].a[row / 8 + 2 * half] >> shift;
                const u32 b = in[column * 4 + slot].b[half] >> shift;
                sum += multiply(a, b);
            }
            memcpy(&out[lane].v[i], &sum, 4);
        }
}
DEVICE void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const int (&c)[4]) {
    Product p{{a0, a1, a2, a3}, {b0, b1}, {}};
    memcpy(p.c, c, 16);
    const Result r = emulation::together<Product, Result>(4, p, [](const Product *in, Result *out) {
        product<int>(in, out, 1, [](u32 a, u32 b) { return static_cast<int8_t>(a) * static_cast<int8_t>(b); });
    });
    memcpy(d, r.v, 16);
}
DEVICE void multiply_halves(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Product p{{a0, a1, a2, a3}, {b0, b1}, {}};
    memcpy(p.c, c, 16);
    const Result r = emulation::together<Product, Result>(5, p, [](const Product *in, Result *out) {
        product<float>(in, out, 2, [](u32 a, u32 b) {
            return half_to_float(static_cast<u16>(a)) * half_to_float(static_cast<u16>(b));
        });
    });
    memcpy(c, r.v, 16);
}
