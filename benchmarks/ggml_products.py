"""Times ggml's matrix products through its shared libraries, in a process of its own: vs_llama_cpp.py starts it.

python benchmarks/ggml_products.py BUILD THREADS

Reads one JSON request a line and answers each with one line. Neither torch nor anybits is loaded here, so that ggml's
threads meet no others. BUILD is a folder with libggml-base, libggml-cpu and libggml in it or below it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"q4_0": 2, "q8_0": 8, "q2_K": 10, "q3_K": 11, "q4_K": 12}
"""Numbers of enum ggml_type."""

FEATURES = ("avx2", "fma", "f16c", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8", "neon")
BEYOND_CACHE = 128 << 20  # bytes of copies that one graph reads, so that none waits in a cache
DISTINCT_ROWS = 64  # rows that are quantized; the others repeat them
_F32 = 0
_POINTERS = (
    "ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph_custom", "ggml_get_data", "ggml_version",
    "ggml_backend_cpu_init", "ggml_backend_cpu_reg", "ggml_backend_reg_dev_get", "ggml_backend_reg_get_proc_address",
    "ggml_backend_buft_name", "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_backend_get_default_buffer_type",
)  # fmt: skip
_SIZES = (
    "ggml_row_size", "ggml_nbytes", "ggml_tensor_overhead", "ggml_graph_overhead_custom", "ggml_quantize_chunk",
)  # fmt: skip


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Library:
    """The functions of ggml's three shared libraries, by name."""

    def __init__(self, build: Path) -> None:
        self._parts = [ctypes.CDLL(str(self._find(build, name)), ctypes.RTLD_GLOBAL) for name in ("base", "cpu", "")]
        for name in _POINTERS:
            self[name].restype = ctypes.c_void_p
        for name in _SIZES:
            self[name].restype = ctypes.c_size_t
        self["ggml_backend_dev_supports_op"].restype = ctypes.c_bool

    @staticmethod
    def _find(build: Path, part: str) -> Path:
        name = f"libggml-{part}.so" if part else "libggml.so"
        for found in sorted(build.rglob(name)):
            return found
        raise SystemExit(f"{build} has no {name}: give the folder of a llama.cpp build with shared libraries")

    def __getitem__(self, name: str) -> Any:
        for part in self._parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise SystemExit(f"this build of ggml has no function {name}")

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function; a bare int is an address."""
        return self[name](*(ctypes.c_void_p(a) if type(a) is int else a for a in arguments))


@dataclass
class Weight:
    """Copies of one quantized matrix [n, k] in one kind of buffer."""

    kind: str
    n: int
    k: int
    tensors: list[int]
    bytes: int
    values: np.ndarray  # float32 [DISTINCT_ROWS, k], dequantized by ggml
    owned: list[tuple[str, int]] = field(default_factory=list)


class Products:
    """Builds graphs of products with the CPU backend and times them."""

    def __init__(self, build: Path, threads: int) -> None:
        self.ggml = Library(build)
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.ggml("ggml_log_set", self._silent, None)  # it reports each tensor that it repacks
        self.backend = self.ggml("ggml_backend_cpu_init")
        self.ggml("ggml_backend_cpu_set_n_threads", self.backend, ctypes.c_int(threads))
        registry = self.ggml("ggml_backend_cpu_reg")
        self.device = self.ggml("ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))
        self.buffers = {"CPU": self.ggml("ggml_backend_get_default_buffer_type", self.backend)}
        extra = self.ggml("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        if extra:
            more = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(extra)(self.device)
            for i in range(64):
                if not more[i]:
                    break
                self.buffers[ctypes.string_at(self.ggml("ggml_backend_buft_name", more[i])).decode()] = more[i]
        self.weights: dict[str, Weight] = {}

    def about(self) -> dict[str, Any]:
        """Return ggml's version, what it was built for, and the kinds of buffers that it has."""
        has = [name for name in FEATURES if self.ggml[f"ggml_cpu_has_{name}"]()]
        version = ctypes.string_at(self.ggml("ggml_version")).decode()
        return {"ggml": version, "features": has, "buffers": list(self.buffers)}

    def load(self, key: str, kind: str, buffer: str, n: int, k: int) -> dict[str, Any]:
        """Make a weight; answer its bytes, or None for bytes when the buffer does not take the type."""
        rng = np.random.default_rng(7)
        rows = min(n, DISTINCT_ROWS)
        floats = (rng.standard_normal((rows, k)) * 0.02).astype(np.float32)
        size = self.ggml("ggml_row_size", ctypes.c_int(TYPES[kind]), ctypes.c_int64(k))
        packed, values = np.empty((rows, size), np.uint8), np.empty((rows, k), np.float32)
        self.ggml(
            "ggml_quantize_chunk", ctypes.c_int(TYPES[kind]), floats.ctypes.data, packed.ctypes.data,
            ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(k), None,
        )  # fmt: skip
        self.ggml(f"dequantize_row_{kind}", packed.ctypes.data, values.ctypes.data, ctypes.c_int64(rows * k))
        whole = np.ascontiguousarray(np.resize(packed, (n, size)))
        count = min(256, -(-BEYOND_CACHE // whole.nbytes))
        context = self._context(count + 8)
        tensors = [self._tensor(context, TYPES[kind], k, n) for _ in range(count)]
        memory = self.ggml("ggml_backend_alloc_ctx_tensors_from_buft", context, self.buffers[buffer])
        weight = Weight(kind, n, k, tensors, whole.nbytes, values)
        weight.owned = [("ggml_backend_buffer_free", memory), ("ggml_free", context)]
        x = self._tensor(context, _F32, k, 1)
        product = self.ggml("ggml_mul_mat", context, tensors[0], x)
        if not self.ggml("ggml_backend_dev_supports_op", self.device, product):
            self._free(weight)
            return {"bytes": None}
        for tensor in tensors:
            self.ggml(
                "ggml_backend_tensor_set", tensor, whole.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(whole.nbytes)
            )
        self.weights[key] = weight
        return {"bytes": whole.nbytes, "copies": count}

    def drop(self, key: str) -> dict[str, Any]:
        """Free a weight."""
        self._free(self.weights.pop(key))
        return {}

    def time(self, key: str, m: int, budget: float) -> dict[str, Any]:
        """Answer seconds of a product of m rows, one entry for each run of the graph, and the relative L2 error."""
        weight = self.weights[key]
        context, graph_size = self._context(len(weight.tensors) + 8), len(weight.tensors) + 8
        x = self._tensor(context, _F32, weight.k, m)
        ys = [self.ggml("ggml_mul_mat", context, w, x) for w in weight.tensors]
        graph = self.ggml("ggml_new_graph_custom", context, ctypes.c_size_t(graph_size), ctypes.c_bool(False))
        for y in ys:
            self.ggml("ggml_build_forward_expand", graph, y)
        memory = self.ggml("ggml_backend_alloc_ctx_tensors_from_buft", context, self.buffers["CPU"])
        values = np.random.default_rng(m).standard_normal((m, weight.k)).astype(np.float32)
        ctypes.memmove(self.ggml("ggml_get_data", x), values.ctypes.data, values.nbytes)
        times: list[float] = []
        while len(times) < 4 or sum(times) < budget:
            start = time.perf_counter()
            status = self.ggml("ggml_backend_graph_compute", self.backend, graph)
            times.append(time.perf_counter() - start)
            if status:
                raise SystemExit(f"ggml_backend_graph_compute failed with {status}")
        result = np.empty((m, weight.n), np.float32)
        ctypes.memmove(result.ctypes.data, self.ggml("ggml_get_data", ys[-1]), result.nbytes)
        wanted = values.astype(np.float64) @ weight.values.astype(np.float64).T
        wanted = np.resize(wanted.T, (weight.n, m)).T
        error = float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))
        self.ggml("ggml_backend_buffer_free", memory)
        self.ggml("ggml_free", context)
        return {"seconds": [t / len(ys) for t in times[1:]], "error": error}

    def _context(self, tensors: int) -> int:
        size = 4 * tensors * self.ggml("ggml_tensor_overhead") + (1 << 20)
        size += self.ggml("ggml_graph_overhead_custom", ctypes.c_size_t(tensors), ctypes.c_bool(False))
        return int(self.ggml("ggml_init", _InitParams(size, None, True)))

    def _tensor(self, context: int, kind: int, columns: int, rows: int) -> int:
        shape = ctypes.c_int64(columns), ctypes.c_int64(rows)
        return int(self.ggml("ggml_new_tensor_2d", context, ctypes.c_int(kind), *shape))

    def _free(self, weight: Weight) -> None:
        for name, what in weight.owned:
            self.ggml(name, what)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ggml prints must not be taken for an answer
    products = Products(Path(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(products, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
