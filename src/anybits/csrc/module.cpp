// The Python face of anybits.h: integers in, integers out, limited to the stable ABI so that one build serves
// every Python from 3.11 on. Addresses come from tensors that the caller keeps alive during the call.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <string.h>

#include "anybits.h"

namespace {

// Reads `count` integers; None is 0. Returns false with an exception set.
bool integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, long long *out) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, given);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = args[i] == Py_None ? 0 : PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

template <class T>
T *pointer(long long address) {
    return reinterpret_cast<T *>(static_cast<intptr_t>(address));
}

ab_shape shape_of(const long long *v) {
    ab_shape s;
    s.isa = static_cast<int32_t>(v[0]), s.levels = static_cast<int32_t>(v[1]);
    s.level_dtype = static_cast<int32_t>(v[2]), s.has_offsets = static_cast<int32_t>(v[3]);
    s.out_features = v[4], s.in_features = v[5], s.group_columns = v[6];
    s.planes = static_cast<int32_t>(v[7]), s.precisions = static_cast<uint32_t>(v[8]);
    return s;
}

PyObject *blob_bytes(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[9];
    if (!integers(args, given, 9, v)) return nullptr;
    const ab_shape s = shape_of(v);
    return PyLong_FromLongLong(ab_blob_bytes(&s));
}

PyObject *blob_begin(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[11];
    if (!integers(args, given, 11, v)) return nullptr;
    const ab_shape s = shape_of(v + 2);
    return PyLong_FromLong(ab_blob_begin(pointer<void>(v[0]), v[1], &s));
}

PyObject *blob_plane(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[5];
    if (!integers(args, given, 5, v)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_blob_plane(pointer<void>(v[0]), v[1], static_cast<int>(v[2]), pointer<const int32_t>(v[3]),
                           static_cast<int>(v[4]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

PyObject *blob_levels(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[5];
    if (!integers(args, given, 5, v)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_blob_levels(pointer<void>(v[0]), v[1], static_cast<int>(v[2]), pointer<void>(v[3]), pointer<void>(v[4]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

PyObject *blob_steps(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[5];
    if (!integers(args, given, 5, v)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_blob_steps(pointer<void>(v[0]), v[1], static_cast<int>(v[2]), pointer<const float>(v[3]),
                           pointer<const float>(v[4]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

// Products of one x: after x, dtype, rows, k, stride, row precisions, activation bits and threads come, for each weight, its blob, bytes,
// precision and y.
PyObject *products(PyObject *, PyObject *const *args, Py_ssize_t given) {
    constexpr Py_ssize_t SHARED = 8, EACH = 4, MOST = 8;
    const Py_ssize_t weights = (given - SHARED) / EACH;
    if (given < SHARED || weights > MOST) {
        PyErr_SetString(PyExc_TypeError, "expected 8 arguments and 4 for each of at most 8 weights");
        return nullptr;
    }
    long long v[SHARED + EACH * MOST];
    if (!integers(args, given, SHARED + EACH * weights, v)) return nullptr;
    int status = AB_OK;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; i < weights && status == AB_OK; i++) {
        const long long *w = v + SHARED + EACH * i;
        status = ab_matmul(pointer<void>(w[0]), w[1], pointer<void>(v[0]), static_cast<int>(v[1]), v[2], v[3], v[4],
                           static_cast<int>(w[2]), pointer<const int32_t>(v[5]), pointer<void>(w[3]), static_cast<int>(v[6]),
                           static_cast<int>(v[7]));
    }
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

PyObject *same_bytes(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[3];
    if (!integers(args, given, 3, v)) return nullptr;
    return PyBool_FromLong(memcmp(pointer<void>(v[0]), pointer<void>(v[1]), static_cast<size_t>(v[2])) == 0);
}

PyObject *dequantize(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[8];
    if (!integers(args, given, 8, v)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_dequantize(pointer<void>(v[0]), v[1], static_cast<int>(v[2]), v[3], v[4], static_cast<int>(v[5]),
                           pointer<void>(v[6]), static_cast<int>(v[7]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

PyObject *dense(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[10];
    if (!integers(args, given, 10, v)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_dense(static_cast<int>(v[0]), pointer<void>(v[1]), pointer<void>(v[2]), v[3], v[4], pointer<void>(v[5]), v[6],
                      v[7], pointer<void>(v[8]), static_cast<int>(v[9]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

// The last argument is a float, those before it are `count` integers.
bool integers_and_float(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, long long *out, float *last) {
    if (!integers(args, given - 1, count, out)) return false;
    *last = static_cast<float>(PyFloat_AsDouble(args[count]));
    return !PyErr_Occurred();
}

PyObject *rms_norm(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[7];
    float eps;
    if (!integers_and_float(args, given, 7, v, &eps)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_rms_norm(static_cast<int>(v[0]), pointer<void>(v[1]), pointer<void>(v[2]), v[3], v[4], eps,
                         pointer<void>(v[5]), static_cast<int>(v[6]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

PyObject *silu_mul(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[6];
    if (!integers(args, given, 6, v)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_silu_mul(static_cast<int>(v[0]), pointer<void>(v[1]), pointer<void>(v[2]), v[3], pointer<void>(v[4]),
                         static_cast<int>(v[5]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

PyObject *attend(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[24];
    float scaling;
    if (!integers_and_float(args, given, 24, v, &scaling)) return nullptr;
    const ab_attention a = {pointer<void>(v[2]), pointer<void>(v[3]), pointer<void>(v[4]), pointer<void>(v[5]), v[6], v[7],
                            v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17], v[18], pointer<void>(v[19]), pointer<void>(v[20]),
                            pointer<void>(v[21]), pointer<void>(v[22]), v[23]};
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_attend(static_cast<int>(v[0]), &a, scaling, static_cast<int>(v[1]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

// A layer as bytes (ab_layer), then what integers() takes: isa, threads, x, y, batch, length, cos, sin, angle_batch, and of
// the cache key, value and their strides.
PyObject *layer_step(PyObject *, PyObject *const *args, Py_ssize_t given) {
    constexpr Py_ssize_t NUMBERS = 17;
    char *bytes;
    Py_ssize_t size;
    long long v[NUMBERS];
    if (given < 1 || PyBytes_AsStringAndSize(args[0], &bytes, &size) || !integers(args + 1, given - 1, NUMBERS, v)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "expected a layer and 17 integers");
        return nullptr;
    }
    ab_layer layer;
    if (size != static_cast<Py_ssize_t>(sizeof layer)) {
        PyErr_Format(PyExc_ValueError, "a layer has %zd bytes, got %zd", static_cast<Py_ssize_t>(sizeof layer), size);
        return nullptr;
    }
    memcpy(&layer, bytes, sizeof layer);
    const ab_place place = {pointer<void>(v[9]), pointer<void>(v[10]), v[11], v[12], v[13], v[14], v[15], v[16],
                            pointer<void>(v[6]), pointer<void>(v[7]), v[8], v[4], v[5]};
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = ab_layer_step(static_cast<int>(v[0]), &layer, &place, pointer<void>(v[2]), pointer<void>(v[3]), static_cast<int>(v[1]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(status);
}

PyObject *read_seconds(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[3];
    if (!integers(args, given, 3, v)) return nullptr;
    double seconds;
    Py_BEGIN_ALLOW_THREADS;
    seconds = ab_read_seconds(pointer<void>(v[0]), v[1], static_cast<int>(v[2]));
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(seconds);
}

PyObject *tile_rows(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[1];
    if (!integers(args, given, 1, v)) return nullptr;
    return PyLong_FromLong(ab_tile_rows(static_cast<int>(v[0])));
}

PyObject *isa_usable(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[1];
    if (!integers(args, given, 1, v)) return nullptr;
    return PyBool_FromLong(ab_isa_usable(static_cast<int>(v[0])));
}

PyObject *fuses_bf16(PyObject *, PyObject *const *args, Py_ssize_t given) {
    long long v[1];
    if (!integers(args, given, 1, v)) return nullptr;
    return PyBool_FromLong(ab_fuses_bf16(static_cast<int>(v[0])));
}

PyObject *isa_best(PyObject *, PyObject *const *, Py_ssize_t) { return PyLong_FromLong(ab_isa_best()); }

PyObject *use_openmp(PyObject *, PyObject *library) {
    PyObject *encoded = PyUnicode_AsUTF8String(library);
    if (!encoded) return nullptr;
    const char *name = PyBytes_AsString(encoded);
    const long found = name ? ab_use_openmp(name) : 0;
    Py_DECREF(encoded);
    return name ? PyBool_FromLong(found) : nullptr;
}

#define FAST(name, doc) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(name)), METH_FASTCALL, doc}

PyMethodDef methods[] = {
    FAST(blob_bytes, "Bytes of a blob, or minus a status."),
    FAST(blob_begin, "Write the header of a blob."),
    FAST(blob_plane, "Repack one plane."),
    FAST(blob_levels, "Repack the levels of one precision."),
    FAST(blob_steps, "Repack the steps of one precision's levels in 8 bits."),
    FAST(products, "y = x @ W_p.T for one or several weights; returns a status."),
    FAST(same_bytes, "Whether two pieces of memory hold the same."),
    FAST(dequantize, "Write rows of W_p; returns a status."),
    FAST(dense, "y = x @ w.T + bias in bfloat16; returns a status."),
    FAST(rms_norm, "y = weight * x / rms(x) in bfloat16; returns a status."),
    FAST(silu_mul, "y = silu(gate) * up in bfloat16; returns a status."),
    FAST(attend, "Attention of one position of each sequence in bfloat16; returns a status."),
    FAST(layer_step, "One position of each sequence through a decoder layer in bfloat16; returns a status."),
    FAST(read_seconds, "Seconds of one reading pass over memory."),
    FAST(tile_rows, "Rows interleaved in a blob of an instruction set."),
    FAST(isa_usable, "Whether this machine runs an instruction set."),
    FAST(fuses_bf16, "Whether an instruction set multiplies bf16 levels that are never written."),
    FAST(isa_best, "The best instruction set of this machine."),
    {"use_openmp", use_openmp, METH_O, "Use the OpenMP runtime already loaded from this library."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "The CPU kernels of anybits.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
