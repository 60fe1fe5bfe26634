// Which instruction set runs, what is checked before it does, and how the work is divided.
#include "dispatch.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "product.h"
#include "threads.h"

namespace {

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}

// The system must grant the tiles' registers to the process; it refuses where it does not know them.
bool has_amx() {
#if defined(__linux__)
    constexpr unsigned TILE_AND_INT8 = 1u << 24 | 1u << 25;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & TILE_AND_INT8) != TILE_AND_INT8) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
    constexpr unsigned long DOT_PRODUCTS = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & DOT_PRODUCTS) != 0;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

bool machine_runs(int isa) {
    switch (isa) {
        case AB_PORTABLE: return true;
#if defined(__x86_64__)
        case AB_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case AB_AVX512: return has_avx512();
        case AB_AMX: {
            static const bool granted = has_amx();
            return granted;
        }
#elif defined(__aarch64__)
        case AB_NEON: return true;
#endif
        default: return false;
    }
}

const Kernels *built(int isa) {
    switch (isa) {
        case AB_PORTABLE: return kernels_portable();
#if defined(__x86_64__)
        case AB_AVX2: return kernels_avx2();
        case AB_AVX512: return ab_fuses_bf16(isa) ? kernels_avx512_bf16() : kernels_avx512();
        case AB_AMX: return kernels_amx();
#elif defined(__aarch64__)
        case AB_NEON: {
            static const bool dot = kernels_neon_dot() && has_dot_products();
            return dot ? kernels_neon_dot() : kernels_neon();
        }
#endif
        default: return nullptr;
    }
}

// `key` says what the tables in it were made from.
struct Workspace : Memory {
    struct Key {
        int64_t x_bytes, k, block, rows;
        int32_t isa, dtype, levels, form;
        uint16_t order[AB_MAX_ROWS], groups[AB_MAX_ROWS];  // of Batch: positions of rows, and their groups
    } key = {};

    bool reserve(size_t bytes) {
        if (bytes > size) key = {};
        return Memory::reserve(bytes);
    }
};

thread_local Workspace workspace;

constexpr int64_t KEEP_X_BYTES = 256 << 10;  // activations up to this size are compared instead of tabulated again

// Highest precision first; rows of equal precision keep their order.
int sort_rows(const int32_t *precisions, int precision, int rows, int *order, Segment *segments) {
    int count = 0, placed = 0;
    for (int p = AB_MAX_PLANES; p >= 1; p--) {
        const int first = placed;
        for (int r = 0; r < rows; r++)
            if ((precisions ? precisions[r] : precision) == p) order[placed++] = r;
        if (placed > first) segments[count++] = {p, first, placed - first};
    }
    return count;
}

// The layers that read one input (query, key and value; gate and up) follow one another: when x holds the same
// bytes as last time, its tables are still good. Comparing contents is safe where comparing addresses is not.
bool same_x(const Call &c, int64_t row_bytes, const char *kept) {
    const char *x = static_cast<const char *>(c.x);
    const int64_t stride = c.x_stride * (c.dtype == AB_F32 ? 4 : 2);
    for (int r = 0; r < c.rows; r++)
        if (memcmp(kept + r * row_bytes, x + r * stride, static_cast<size_t>(row_bytes)) != 0) return false;
    return true;
}

void keep_x(const Call &c, int64_t row_bytes, char *kept) {
    const int64_t stride = c.x_stride * (c.dtype == AB_F32 ? 4 : 2);
    for (int r = 0; r < c.rows; r++)
        memcpy(kept + r * row_bytes, static_cast<const char *>(c.x) + r * stride, static_cast<size_t>(row_bytes));
}

// What the tables in the workspace are made from, x itself aside.
Workspace::Key key_of(const Call &c, int64_t x_bytes) {
    const Header *h = c.weight;
    Workspace::Key key;
    memset(&key, 0, sizeof key);
    key.x_bytes = x_bytes, key.k = h->shape.in_features, key.block = h->block_columns, key.rows = c.rows;
    key.isa = h->shape.isa, key.dtype = c.dtype, key.levels = h->shape.levels, key.form = c.form;
    for (int i = 0; i < c.group_count; i++)
        for (int p = c.groups[i].first; p < c.groups[i].first + c.groups[i].count; p++)
            key.order[p] = static_cast<uint16_t>(c.order[p]), key.groups[p] = static_cast<uint16_t>(i + 1);
    return key;
}

int run(Product &p, int threads) {
    Call &c = p.call;
    const int64_t row_bytes = c.weight->shape.in_features * (c.dtype == AB_F32 ? 4 : 2);
    const int64_t x_bytes = row_bytes * c.rows, kept_bytes = x_bytes <= KEEP_X_BYTES ? x_bytes : 0;
    const size_t kept = lines(kept_bytes);
    if (!workspace.reserve(kept + p.activation_bytes() + p.scratch * static_cast<size_t>(threads))) return AB_NO_MEMORY;
    p.place(workspace.at + kept);
    char *const scratch = workspace.at + kept + p.activation_bytes();
    const Workspace::Key key = key_of(c, x_bytes);
    const bool known = kept_bytes && !memcmp(&key, &workspace.key, sizeof key) && same_x(c, row_bytes, workspace.at);
    if (!known) {
        workspace.key = {};
        const bool worth = static_cast<int64_t>(c.rows) * c.weight->shape.in_features >= 16384;
        parallel(worth ? p.fillers(threads) : 1, [&](int part, int parts) { p.fill(part, parts, scratch + part * p.scratch); });
        if (kept_bytes) {
            keep_x(c, row_bytes, workspace.at);
            workspace.key = key;
        }
    }
    const int64_t tiles = p.tiles(), fours = ceil_div(tiles, 4);
    Queue queue;
    parallel(static_cast<int>(tiles < threads ? tiles : threads), [&](int part, int parts) {
        if (c.form == BF16) {  // long, and four tiles at a time: who is held up by another process takes fewer
            for (int64_t first, last; queue.take(fours, 1, parts, &first, &last);)
                p.multiply(4 * first, 4 * last < tiles ? 4 * last : tiles, scratch + part * p.scratch);
            return;
        }
        p.multiply(tiles * part / parts, tiles * (part + 1) / parts, scratch + part * p.scratch);
    });
    return AB_OK;
}

int check_rows(const Header *h, int64_t rows, int precision, const int32_t *row_precisions) {
    if (rows < 1 || rows > AB_MAX_ROWS) return AB_BAD_SHAPE;
    if (!row_precisions) return stored(h, precision) ? AB_OK : AB_BAD_PRECISION;
    for (int64_t r = 0; r < rows; r++)
        if (!stored(h, row_precisions[r])) return AB_BAD_PRECISION;
    return AB_OK;
}

}  // namespace

const Kernels *kernels_of(int isa) { return machine_runs(isa) ? built(isa) : nullptr; }

extern "C" int ab_tile_rows(int isa) {
    const Kernels *k = built(isa);
    return k ? k->tile_rows : 0;
}

extern "C" int ab_isa_usable(int isa) { return kernels_of(isa) != nullptr; }

extern "C" int ab_fuses_bf16(int isa) {
#if defined(__x86_64__)
    static const bool has = kernels_avx512_bf16() && has_avx512() && __builtin_cpu_supports("avx512bf16");
    return isa == AB_AVX512 && has;
#else
    return isa < 0;
#endif
}

extern "C" int ab_isa_best(void) {
    const int best_first[] = {AB_AMX, AB_AVX512, AB_NEON, AB_AVX2};
    for (int isa : best_first)
        if (kernels_of(isa)) return isa;
    return AB_PORTABLE;
}

extern "C" int ab_use_openmp(const char *library) { return threads_use(library); }

extern "C" int ab_matmul(const void *blob, int64_t blob_bytes, const void *x, int dtype, int64_t rows, int64_t in_features,
                         int64_t x_stride, int precision, const int32_t *row_precisions, void *y, int activation_bits,
                         int threads) {
    int status = blob_check(blob, blob_bytes);
    if (status != AB_OK) return status;
    const Header *h = header_of(blob);
    const Kernels *kernels = kernels_of(h->shape.isa);
    if (!kernels) return AB_BAD_ISA;
    if (dtype < AB_F32 || dtype > AB_F16) return AB_BAD_DTYPE;
    if (in_features != h->shape.in_features || !x || !y) return AB_BAD_SHAPE;
    status = check_rows(h, rows, precision, row_precisions);
    if (status != AB_OK) return status;
    int order[AB_MAX_ROWS];
    Segment segments[AB_MAX_PLANES];
    Group groups[AB_MAX_ROWS];
    Product product;
    Call &c = product.call;
    c.weight = h, c.x = x, c.dtype = dtype, c.x_stride = x_stride, c.rows = static_cast<int>(rows), c.y = y;
    c.eight_bits = activation_bits <= 8;
    c.segment_count = sort_rows(row_precisions, precision, c.rows, order, segments);
    c.order = order, c.segments = segments;
    product.plan(kernels, groups);
    return run(product, threads < 1 ? 1 : threads);
}

extern "C" int ab_dequantize(const void *blob, int64_t blob_bytes, int precision, int64_t first, int64_t count, int dtype,
                             void *out, int threads) {
    const int status = blob_check(blob, blob_bytes);
    if (status != AB_OK) return status;
    const Header *h = header_of(blob);
    const Kernels *kernels = kernels_of(h->shape.isa);
    if (!kernels) return AB_BAD_ISA;
    if (dtype != AB_F32 && dtype != AB_BF16) return AB_BAD_DTYPE;
    if (!stored(h, precision)) return AB_BAD_PRECISION;
    if (!out || first < 0 || first % kernels->tile_rows || count < 1 || first + count > h->shape.out_features)
        return AB_BAD_SHAPE;
    const int64_t tiles = ceil_div(count, kernels->tile_rows);
    parallel(static_cast<int>(tiles < threads ? tiles : threads), [&](int part, int parts) {
        const int64_t begin = first + tiles * part / parts * kernels->tile_rows;
        const int64_t end = first + tiles * (part + 1) / parts * kernels->tile_rows;
        const int64_t last = end < first + count ? end : first + count;
        if (begin < last) kernels->dequantize(h, precision, begin, last - begin, first, count, dtype, out);
    });
    return AB_OK;
}
