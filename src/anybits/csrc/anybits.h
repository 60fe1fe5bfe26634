// The C interface of the CPU kernels: no torch, no C++ types, no state but a scratch buffer per thread.
//
// A weight lives in one "blob": a header, the planes repacked for one instruction set, and the levels of
// each precision. The blob holds no pointers, so it is an ordinary byte tensor to its owner. Every entry
// point checks the header and all shape arguments before it touches anything else.
#ifndef ANYBITS_H
#define ANYBITS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { AB_MAX_PLANES = 8, AB_MAX_ROWS = 512, AB_MAX_DENSE_ROWS = 64 };
enum ab_dtype { AB_F32 = 0, AB_BF16 = 1, AB_F16 = 2, AB_I8 = 3 };  // AB_I8: affine levels only
enum ab_levels { AB_AFFINE = 0, AB_CODEBOOK = 1 };
enum ab_isa { AB_PORTABLE = 0, AB_AVX2 = 1, AB_AVX512 = 2, AB_NEON = 3, AB_AMX = 4, AB_ISA_COUNT = 5 };

enum ab_status {
    AB_OK = 0,
    AB_BAD_BLOB = 1,       // not a blob, of another version, or shorter than its header says
    AB_BAD_ISA = 2,        // this machine cannot run the blob's instruction set
    AB_BAD_SHAPE = 3,      // a shape argument is out of range or does not fit the blob
    AB_BAD_PRECISION = 4,  // a precision that is not stored
    AB_BAD_DTYPE = 5,
    AB_NO_MEMORY = 6,
};

// What a matrix is, as far as its storage goes.
typedef struct {
    int32_t isa;             // ab_isa that will run it
    int32_t levels;          // ab_levels
    int32_t level_dtype;     // ab_dtype of scales and offsets (affine); centroids are always given as float
    int32_t has_offsets;     // affine: 0 when symmetric
    int64_t out_features;    // N
    int64_t in_features;     // K
    int64_t group_columns;   // affine: columns of a group, a multiple of 32 unless it is K itself
    int32_t planes;          // P, 1 ... 8
    uint32_t precisions;     // bit p is set when precision p is stored
} ab_shape;

// Bytes of the blob for `shape`, or -(ab_status) when the shape cannot be.
int64_t ab_blob_bytes(const ab_shape *shape);

// Write the header. `blob` is 64-byte aligned.
int ab_blob_begin(void *blob, int64_t blob_bytes, const ab_shape *shape);

// Repack plane `plane` from int32 words [N, ceil(K/32)] (contiguous).
int ab_blob_plane(void *blob, int64_t blob_bytes, int plane, const int32_t *words, int threads);

// Repack the levels of `precision`. Affine: scales [p, N, G] and offsets [N, G] (NULL when symmetric) in
// level_dtype. Codebook: float32 centroids [N, 2**p] as `scales`, NULL as `offsets`.
int ab_blob_levels(void *blob, int64_t blob_bytes, int precision, const void *scales, const void *offsets);

// What the levels of `precision` in AB_I8 are multiplied by, float32: scale_steps [p, N] and offset_steps [N] (NULL when
// symmetric).
int ab_blob_steps(void *blob, int64_t blob_bytes, int precision, const float *scale_steps, const float *offset_steps);

// y [M, N] = x [M, K] * W_p^T; 1 <= M <= 512; rows of x are x_stride elements apart, y is contiguous.
// row_precisions: NULL, or int32 [M] that overrides `precision` per row. activation_bits: 16, or 8 where speed counts
// more than an error below 1e-2.
int ab_matmul(const void *blob, int64_t blob_bytes, const void *x, int dtype, int64_t rows, int64_t in_features,
              int64_t x_stride, int precision, const int32_t *row_precisions, void *y, int activation_bits, int threads);

// Rows first ... first + count - 1 of W_p. Affine writes W_p^T as [K, count], codebook W_p as [count, K].
// dtype: AB_F32 or AB_BF16. `first` is a multiple of ab_tile_rows.
int ab_dequantize(const void *blob, int64_t blob_bytes, int precision, int64_t first, int64_t count, int dtype,
                  void *out, int threads);

// Rows that are interleaved in a blob of `isa`; 0 when this build has no such instruction set.
int ab_tile_rows(int isa);

// Whether this build and this machine run `isa`, and the best that they run.
int ab_isa_usable(int isa);
int ab_isa_best(void);

// Whether many rows of bf16 x multiply bf16 levels without a matrix of them ever being written.
int ab_fuses_bf16(int isa);

// Bytes read per second by `threads` threads over `bytes` bytes at `memory`, in `seconds` of one pass.
double ab_read_seconds(const void *memory, int64_t bytes, int threads);

// The rest of a decode step, all in bfloat16 with sums in float32. `isa` is one that ab_isa_usable says runs.
// Sums are taken in one order: a row's result depends neither on other rows nor on `threads`.

// y [rows, n] = x [rows, k] * weight [n, k]^T + bias (NULL or [n]); 1 <= rows <= 64, rows of x are x_stride apart.
int ab_dense(int isa, const void *weight, const void *bias, int64_t n, int64_t k, const void *x, int64_t rows,
             int64_t x_stride, void *y, int threads);

// y [rows, k] = weight [k] * (x / sqrt(mean(x^2) + eps)).
int ab_rms_norm(int isa, const void *x, const void *weight, int64_t rows, int64_t k, float eps, void *y,
                int threads);

// y [count] = silu(gate) * up.
int ab_silu_mul(int isa, const void *gate, const void *up, int64_t count, void *y, int threads);

// Attention of one new position of each sequence; strides in elements, the last dimension dense.
typedef struct {
    const void *query;  // [batch, heads, dim]
    void *key, *value;  // [batch, kv_heads, length, dim], [..., length, value_dim]
    void *out;                        // [batch, heads, value_dim], dense
    int64_t batch, heads, kv_heads, length, dim, value_dim;  // dim and value_dim are multiples of 16
    int64_t query_batch;                                     // the heads of a query lie dim apart
    int64_t key_batch, key_head, key_stride;
    int64_t value_batch, value_head, value_stride;
    // NULL, or the new position's key [batch, kv_heads, dim] and value, dense: they are written to the last place of `key` and
    // `value` first. Query and key are then rotated by cos and sin [batch, dim] (rotate_half), rounded as torch does.
    const void *new_key, *new_value, *cos, *sin;
    int64_t angle_batch;
} ab_attention;

int ab_attend(int isa, const ab_attention *attention, float scaling, int threads);

// One matrix of a layer at one precision; bias: NULL or bfloat16 [out_features].
typedef struct {
    const void *blob;
    int64_t blob_bytes;
    int64_t precision;
    const void *bias;
} ab_matrix;

// A decoder layer: h = x + output(attention(first_norm(x))), y = h + down(silu(gate(n)) * up(n)) with n = second_norm(h).
// query_norm and key_norm: NULL, or [dim], over each head. All numbers are 8 bytes wide: it is packed in Python.
typedef struct {
    ab_matrix query, key, value, output, gate, up, down;
    const void *first_norm, *second_norm, *query_norm, *key_norm;
    double first_eps, second_eps, query_eps, key_eps, scaling;
    int64_t hidden, middle, heads, kv_heads, dim, activation_bits;  // dim is a multiple of 32
} ab_layer;

// Where the new position of each sequence goes, and what it sees: as in ab_attention, with value_dim = dim.
typedef struct {
    void *key, *value;  // [batch, kv_heads, length, dim]; the last place is the new one's
    int64_t key_batch, key_head, key_stride, value_batch, value_head, value_stride;
    const void *cos, *sin;
    int64_t angle_batch;
    int64_t batch, length;
} ab_place;

enum { AB_MAX_LAYER_ROWS = 16 };

// y [batch, hidden] of x [batch, hidden], both dense, rounded to bfloat16 wherever the parts above round.
int ab_layer_step(int isa, const ab_layer *layer, const ab_place *place, const void *x, void *y, int threads);

// Use the OpenMP runtime that is already loaded in this process; without one the kernels run on one thread.
// Returns whether one was found.
int ab_use_openmp(const char *library);

#ifdef __cplusplus
}
#endif
#endif
