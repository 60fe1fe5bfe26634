// One product y = x * W_p^T in the steps that the threads of a team take together.
#pragma once

#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "call.h"

namespace {

// Bytes, rounded up to whole cache lines.
inline size_t lines(int64_t bytes) { return static_cast<size_t>(ceil_div(bytes, 64) * 64); }

constexpr size_t LARGE_PAGE = 2 << 20;

// Memory of one calling thread, kept between calls.
struct Memory {
    char *at = nullptr;
    size_t size = 0;
    ~Memory() { free(at); }

    // What was in it is lost where it grows.
    bool reserve(size_t bytes) {
        if (bytes <= size) return true;
        free(at);
        const size_t page = bytes < LARGE_PAGE ? 4096 : LARGE_PAGE;
        at = static_cast<char *>(aligned_alloc(page, (bytes + page - 1) / page * page));
        size = at ? bytes : 0;
#ifdef MADV_HUGEPAGE
        if (at && page == LARGE_PAGE) madvise(at, (bytes + page - 1) / page * page, MADV_HUGEPAGE);
#endif
        return at != nullptr;
    }
};

}  // namespace

struct Product {
    Call call = {};
    const Kernels *kernels = nullptr;
    size_t tables = 0, scales = 0;  // bytes of the activations: what they are looked up in, their scales (and as many for their sums)
    size_t scratch = 0;             // bytes that each thread needs

    // Completes `call`, whose weight, x, dtype, x_stride, rows, order, segments, y and eight_bits are set. `groups` has
    // room for all rows.
    void plan(const Kernels *kernels_of_weight, Group *groups);

    size_t activation_bytes() const { return tables + 2 * scales; }
    // Lets the activations lie at `memory`.
    void place(char *memory);
    // Whether another product of the same x has the same activations.
    bool same_activations(const Product &other) const;
    // What one of `parts` threads does: its share of the activations, then, when all are there, tiles of y.
    void fill(int part, int parts, char *scratch) const;
    void multiply(int64_t first_tile, int64_t last_tile, char *scratch) const;
    // Threads between which there is anything to divide, and tiles of W.
    int fillers(int threads) const;
    int64_t tiles() const;
    // The first of a tile's rows of W, or of y's columns; out_features for the tile behind the last.
    int64_t row_of(int64_t tile) const;
};
