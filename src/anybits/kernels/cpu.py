"""The CPU backend: SIMD kernels that read p planes at precision p (csrc/, docs/kernels.md)."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from anybits.errors import AnybitsError
from anybits.kernels import reference as _reference  # noqa: F401  (registered first: the last resort)
from anybits.kernels.backend import register
from anybits.weight import AffineLevels, Levels, PlaneWeight, check_precision, group_columns

ISAS = ("portable", "avx2", "avx512", "neon", "amx")
"""Instruction sets by the number that csrc/anybits.h gives them."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LEVEL_DTYPES = _DTYPES | {torch.int8: 3}
_AFFINE, _CODEBOOK = 0, 1
_HUGE_PAGE = 2 << 20

ACTIVATION_BITS = "ANYBITS_CPU_ACTIVATION_BITS"
"""The environment variable that says in how many bits activations are kept."""

PASS_ROWS, LEVEL_PASS_ROWS = 64, 512
"""Rows of x in one pass of the kernel, and of one that makes levels and multiplies them (AB_MAX_ROWS)."""

DENSE_ROWS = {
    ("amx", True): (0, 90, 90, 64, 48, 40, 36, 32, 30),
    ("amx", False): (0, 100, 100, 100, 100, 96, 96, 80, 64),
    ("avx512", True): (0, 256, 256, 160, 84, 66, 52, 48, 42),
    ("avx512", False): (0, 72, 72, 72, 72, 70, 68, 64, 60),
    ("avx2", True): (0, 42, 42, 28, 20, 16, 14, 12, 12),
    ("avx2", False): (0, 42, 42, 40, 40, 24, 12, 12, 12),
    ("neon", True): (0, 42, 42, 28, 20, 16, 14, 12, 12),
    ("neon", False): (0, 42, 42, 40, 40, 24, 12, 12, 12),
    ("portable", True): (0, 12, 12, 12, 12, 12, 12, 12, 12),
    ("portable", False): (0, 12, 12, 12, 12, 12, 12, 12, 12),
}
"""(instruction set, affine) -> for p = 0 ... 8, rows of bf16 x from which slabs and torch's GEMM are faster.

amx: cycles for 2048 weights on one core of a Xeon with AMX, best of 60 to 300 calls in the second-level cache,
p = 2 / 3 / 4. Kernel at 16 rows: affine 586 / 801 / 1008, codebook 451 / 467 / 484. Slabs: affine 987 / 1177 / 1389,
codebook 333 / 363 / 394. torch's bf16 GEMM: 1020 at 16 rows, 1270 at 32, 1900 at 64, 2700 at 128, 4350 at 256,
7450 at 512. avx2: measured on a quiet Zen 4.

avx512: both ways measured on a quiet Zen 4, 4096 x 4096, two threads, p = 2, 3, 4, 6, 8; p = 5 and 7 lie between.
Kernel against slabs in ms: affine p = 3 at 160 rows 15.6 and 16.1, p = 4 at 80 rows 10.2 and 10.4, at 96 rows 12.1
and 11.6, p = 6 at 48 rows 8.7 and 9.4, at 56 rows 10.2 and 9.5, p = 8 at 40 rows 9.8 and 10.4, at 48 rows 11.5 and
10.4; codebook p = 2 / 4 / 6 at 64 rows, 8.5 / 8.0 / 8.2 and 8.9 / 8.6 / 8.6, at 96 rows 12.1 / 12.4 / 12.7 and 10.9,
p = 8 at 48 rows 7.1 and 8.3, at 64 rows 9.0 and 8.6. Precisions 5 to 8 of amx are extrapolated, NEON's row is a copy
of avx2's and portable's a guess. Affine rows of avx2 and neon are for groups that 128 columns do not divide; others
multiply levels in 14 bits (csrc/word_levels.h), which no GEMM of float32 is faster than.
"""

LEAST_DENSE_ROWS = min(rows for crossings in DENSE_ROWS.values() for rows in crossings[1:])
"""Fewer rows never become dense."""

DENSE_ROWS_FP32 = 8
"""Factor on DENSE_ROWS for fp32 and fp16 x: at 64 rows slabs took 22 ms with fp32 and 8 to 11 with bf16.

The factor itself is an estimate: no row count beyond 64 was measured.
"""

DENSE_ROWS_MIXED = 64
"""Rows up to which DENSE_ROWS grows with the number of precisions in a batch: slabs are made once for each."""

BYTE_PLANES = 6
"""Precisions up to this one have products of 8-bit activations and levels that are faster than GEMMs for any number
of rows, on avx512 and amx (csrc/avx512_bytes.h)."""

BF16_PLANES = 4
"""Precisions up to this one have products of bf16 levels that are never written, where the machine has AVX512_BF16
(csrc/avx512_bf16.h), for any number of rows."""

CENTROID_PLANES = 4
"""Precisions up to this one make a codebook's centroids once for many rows (csrc/levels.h)."""

SLAB_BYTES = 2 << 20
"""Bytes of one dequantized slab: slabs of 8 MiB took two to four times as long to fill as those of 2 MiB."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A PlaneWeight repacked for one instruction set.

    blob: uint8, self-describing (csrc/blob.h).
    """

    blob: torch.Tensor
    out_features: int
    in_features: int
    precisions: tuple[int, ...]


@cache
def library() -> ModuleType | None:
    """Return the extension module, sharing torch's thread pool; None when it was not built."""
    try:
        from anybits.kernels import _cpu
    except ImportError:
        return None
    torch_folder = Path(torch.__file__).parent
    shipped = [*torch_folder.glob("lib/lib*omp*"), *torch_folder.parent.glob("torch.libs/lib*omp*")]
    names = ["libgomp.so.1", "libomp.so", "libiomp5.so", "libomp.dylib", *map(str, shipped)]
    any(_cpu.use_openmp(name) for name in names)
    return _cpu


def loaded() -> ModuleType:
    """Return the extension module, where somebody has seen that there is one."""
    found = library()
    assert found is not None, "unsupported() said that there is no library"
    return found


def isa_number(name: str | None = None) -> int:
    """Return the number of the instruction set `name`, or else of ANYBITS_CPU_ISA, or else of this machine's best."""
    name, machine = name or os.environ.get("ANYBITS_CPU_ISA"), loaded()
    if not name:
        return int(machine.isa_best())
    usable = [isa for i, isa in enumerate(ISAS) if machine.isa_usable(i)]
    if name not in usable:
        raise AnybitsError(f"instruction set '{name}' does not run here: choose {' or '.join(usable)}")
    return ISAS.index(name)


class CpuBackend:
    """Multiplies straight from repacked planes.

    isa: one of ISAS, or None for ANYBITS_CPU_ISA or else the best of this machine; activation_bits: 16, or 8, with
    which products of many rows, or of codebooks, are up to twice as fast (relative error about 1e-2 instead of 1e-4;
    docs/kernels.md says where it has an effect), or None for ANYBITS_CPU_ACTIVATION_BITS or else 16.
    """

    name = "cpu"
    device_type: str | None = "cpu"

    def __init__(self, isa: str | None = None, activation_bits: int | None = None) -> None:
        if activation_bits not in (None, 8, 16):
            raise AnybitsError(f"activations in {activation_bits} bits are not allowed: choose 16 or 8")
        self._isa = isa
        self._activation_bits = activation_bits

    def unsupported(self, weight: PlaneWeight, device: torch.device) -> str | None:
        """Return why not, or None: any PlaneWeight on a CPU, if the kernels were compiled at install."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if library() is None:
            return "the CPU kernels were not compiled when anybits was installed (a C++17 compiler is needed)"
        isa_number(self._isa)
        return None

    def prepare(self, weight: PlaneWeight) -> PackedWeight:
        """Return `weight` repacked plane after plane into 2 MiB pages; nothing in it refers to `weight`."""
        packer, isa = loaded(), isa_number(self._isa)
        levels = weight.levels
        scaled = levels if isinstance(levels, AffineLevels) else None
        dtype = _common_dtype(levels)
        shape = (
            isa,
            _CODEBOOK if scaled is None else _AFFINE,
            _LEVEL_DTYPES[dtype],
            int(scaled is not None and scaled.offsets is not None),
            weight.out_features,
            weight.in_features,
            weight.in_features if scaled is None else group_columns(scaled.group_size, weight.in_features),
            weight.max_precision,
            sum(1 << p for p in weight.precisions),
        )
        size = packer.blob_bytes(*shape)
        if size < 0:
            raise AnybitsError(f"this weight cannot be repacked for the CPU kernels (status {-size})")
        blob = allocate(size)
        at = (blob.data_ptr(), size)
        _check(packer.blob_begin(*at, *shape))
        for i in range(weight.max_precision):
            plane = weight.planes[i].contiguous()
            _check(packer.blob_plane(*at, i, plane.data_ptr(), torch.get_num_threads()))
        for p in weight.precisions:
            tensors = list(levels.tensors(p).values())
            count = 1 if scaled is None or scaled.offsets is None else 2
            _pack(packer.blob_levels, at, p, tensors[:count], dtype)
            if tensors[count:]:
                _pack(packer.blob_steps, at, p, tensors[count:], torch.float32)
        return PackedWeight(blob, weight.out_features, weight.in_features, weight.precisions)

    def matmul(self, x: torch.Tensor, prepared: PackedWeight, precision: int | torch.Tensor) -> torch.Tensor:
        """Return x `[M, K]` @ W_p.T as `[M, N]` in x's dtype (fp32, bf16 or fp16), accumulated in float32."""
        rows = None if isinstance(precision, int) else precision
        wanted = precision if isinstance(precision, int) else 0
        bits = self.activation_bits()
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, prepared, wanted, rows, bits)
        run = torch.ops.anybits.cpu_matmul if torch.compiler.is_compiling() or type(x) is not torch.Tensor else _matmul
        return run(x, prepared.blob, prepared.out_features, wanted, rows, bits)

    def activation_bits(self) -> int:
        """Return in how many bits activations are kept: 16 or 8."""
        return _activation_bits_by_environment() if self._activation_bits is None else self._activation_bits


@cache
def _activation_bits_by_environment() -> int:
    given = os.environ.get(ACTIVATION_BITS, "") or "16"
    if given not in ("16", "8"):
        raise AnybitsError(f"{ACTIVATION_BITS}={given} is not allowed: choose 16 or 8")
    return int(given)


def _common_dtype(levels: Levels) -> torch.dtype:
    """Return the dtype that all levels are kept in: their own when they agree, else float32."""
    if not isinstance(levels, AffineLevels):
        return torch.float32
    dtypes = {t.dtype for kind in (levels.scales, levels.offsets or {}) for t in kind.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _pack(
    pack: Callable[..., int], at: tuple[int, int], precision: int, tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> None:
    """Hand one or two tensors, those of scales and those of offsets where there are any, to the library as `dtype`."""
    plain = [t.to(dtype).contiguous() for t in tensors]
    _check(pack(*at, precision, plain[0].data_ptr(), plain[1].data_ptr() if len(plain) > 1 else None))


def allocate(size: int) -> torch.Tensor:
    """Return uint8 `[size]`, in 2 MiB pages where the system grants them: streaming runs a fifth faster."""
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size]


def _check(status: int) -> None:
    if status:
        raise AnybitsError(f"the CPU kernels refused a weight or its shape (status {status})")


def _matmul(
    x: torch.Tensor,
    blob: torch.Tensor,
    out_features: int,
    precision: int,
    rows: torch.Tensor | None,
    activation_bits: int,
) -> torch.Tensor:
    """The body of anybits::cpu_matmul."""
    count, columns = x.shape
    dtype = _DTYPES.get(x.dtype, -1)
    if rows is not None:
        rows = _checked_rows(rows, count)
    if (
        dtype < 0
        or count == 0
        or (count >= LEAST_DENSE_ROWS and _dense_is_faster(x, blob, precision, rows, activation_bits))
    ):
        return _dense(x, blob, out_features, precision, rows)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty((count, out_features), dtype=x.dtype)
    run, size, stride = loaded().products, x.element_size(), x.stride(0)
    source, threads = (blob.data_ptr(), blob.numel()), torch.get_num_threads()
    at_once = PASS_ROWS if count <= PASS_ROWS else _rows_of_a_pass(x, blob, precision, rows, activation_bits)
    for first in range(0, count, at_once):
        status = run(
            x.data_ptr() + first * stride * size,
            dtype,
            min(count - first, at_once),
            columns,
            stride,
            None if rows is None else rows.data_ptr() + 4 * first,
            activation_bits,
            threads,
            *source,
            precision,
            y.data_ptr() + first * out_features * size,
        )
        if status:
            raise _refusal(status, x, blob, precision, rows)
    return y


def _dense_is_faster(
    x: torch.Tensor, blob: torch.Tensor, precision: int, rows: torch.Tensor | None, activation_bits: int
) -> bool:
    header = _header(blob)
    highest = precision if rows is None else int(rows.max())
    if not 1 <= highest <= 8 or _by_words(header):
        return False
    if _by_bytes(header, highest, activation_bits) or _by_bf16(x, header, highest):
        return False
    limit = DENSE_ROWS[ISAS[header.isa], header.affine][highest]
    if rows is not None:
        limit = max(limit, min(DENSE_ROWS_MIXED, limit * rows.unique().numel()))
    return x.shape[0] >= limit * (1 if x.dtype == torch.bfloat16 else DENSE_ROWS_FP32)


def _by_bytes(header: _Header, highest: int, activation_bits: int) -> bool:
    """Return whether products of bytes run, for any number of rows."""
    return activation_bits == 8 and highest <= BYTE_PLANES and ISAS[header.isa] in ("avx512", "amx")


def _by_words(header: _Header) -> bool:
    """Return whether many rows multiply levels in 14 bits that are never written."""
    return header.affine and header.whole_blocks and ISAS[header.isa] in ("avx2", "neon")


def _by_bf16(x: torch.Tensor, header: _Header, highest: int) -> bool:
    """Return whether many rows multiply bf16 levels that are never written."""
    fused = highest <= BF16_PLANES and x.dtype == torch.bfloat16
    return fused and bool(loaded().fuses_bf16(header.isa))


def _rows_of_a_pass(
    x: torch.Tensor, blob: torch.Tensor, precision: int, rows: torch.Tensor | None, activation_bits: int
) -> int:
    header, highest = _header(blob), precision if rows is None else int(rows.max())
    fused = _by_bytes(header, highest, activation_bits) or _by_bf16(x, header, highest)
    levels = (fused and (header.affine or highest <= CENTROID_PLANES)) or _by_words(header)
    return LEVEL_PASS_ROWS if levels else PASS_ROWS


def _checked_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    if rows.dtype != torch.int32 or rows.shape != (count,) or rows.device.type != "cpu":
        raise AnybitsError(
            f"precision of {count} rows must be int32 [{count}] on the CPU, "
            f"got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    return rows.contiguous()


@dataclass(frozen=True)
class _Header:
    """The first fields of csrc/blob.h's Header that Python needs."""

    isa: int
    affine: bool
    out_features: int
    in_features: int
    whole_blocks: bool  # affine: 128 columns share a scale of the activations
    precisions: tuple[int, ...]


def _header(blob: torch.Tensor) -> _Header:
    if blob.numel() < 64:
        raise AnybitsError(f"a packed weight of {blob.numel()} bytes cannot be one")
    fields = struct.unpack("<Q4i3qiI", blob[:56].numpy().tobytes())
    _, isa, levels, _, _, n, k, group, planes, mask = fields
    whole = group % 128 == 0 or group % 32 != 0
    return _Header(isa, levels == _AFFINE, n, k, whole, tuple(p for p in range(1, planes + 1) if mask >> p & 1))


def _refusal(
    status: int, x: torch.Tensor, blob: torch.Tensor, precision: int, rows: torch.Tensor | None
) -> AnybitsError:
    """Return the AnybitsError that says what the library found wrong."""
    header = _header(blob)
    for p in [precision] if rows is None else rows.unique().tolist():
        check_precision(p, header.precisions)
    if x.shape[1] != header.in_features:
        return AnybitsError(f"activations have {x.shape[1]} columns where the weight has {header.in_features}")
    return AnybitsError(f"the CPU kernels refused a packed weight of {blob.numel()} bytes (status {status})")


def _dense(
    x: torch.Tensor, blob: torch.Tensor, out_features: int, precision: int, rows: torch.Tensor | None
) -> torch.Tensor:
    """Dequantize slab after slab and multiply each with torch's GEMM, once per precision among the rows."""
    header = _header(blob)
    if x.shape[1] != header.in_features:
        raise AnybitsError(f"activations have {x.shape[1]} columns where the weight has {header.in_features}")
    y = x.new_empty(x.shape[0], out_features)
    if rows is None:
        _dense_into(y, x, blob, header, precision)
        return y
    for p in rows.unique().tolist():
        chosen = (rows == p).nonzero()[:, 0]
        part = x.new_empty(chosen.numel(), out_features)
        _dense_into(part, x[chosen], blob, header, p)
        y[chosen] = part
    return y


def _dense_into(y: torch.Tensor, x: torch.Tensor, blob: torch.Tensor, header: _Header, precision: int) -> None:
    check_precision(precision, header.precisions)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    x = x.to(dtype)
    k, n = header.in_features, header.out_features
    tile = max(64, loaded().tile_rows(header.isa))
    # Odd multiples of a tile: columns a power of two apart would push each other out of the cache.
    count = ((max(1, SLAB_BYTES // (k * dtype.itemsize) // tile) - 1) | 1) * tile
    slab = torch.empty(k * min(count, n), dtype=dtype)
    source, to = (blob.data_ptr(), blob.numel(), precision), (_DTYPES[dtype], slab.data_ptr(), torch.get_num_threads())
    for first in range(0, n, count):
        here = min(count, n - first)
        _check(loaded().dequantize(*source, first, here, *to))
        flat = slab[: k * here]
        w_t = flat.view(k, here) if header.affine else flat.view(here, k).t()
        y[:, first : first + here] = x @ w_t


def _dequantized(blob: torch.Tensor, header: _Header, precision: int) -> torch.Tensor:
    """Return W_p.T as float32 `[K, N]`."""
    flat = torch.empty(header.in_features * header.out_features)
    where = (blob.data_ptr(), blob.numel(), precision, 0, header.out_features, _DTYPES[torch.float32])
    _check(loaded().dequantize(*where, flat.data_ptr(), torch.get_num_threads()))
    if header.affine:
        return flat.view(header.in_features, header.out_features)
    return flat.view(header.out_features, header.in_features).t()


class _Product(torch.autograd.Function):
    """The kernel's product, differentiable in x: a model that runs outside no_grad still runs on the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        prepared: PackedWeight,
        precision: int,
        rows: torch.Tensor | None,
        activation_bits: int,
    ) -> torch.Tensor:
        ctx.saved = prepared, precision, rows
        return _matmul(x, prepared.blob, prepared.out_features, precision, rows, activation_bits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        prepared, precision, rows = ctx.saved
        gradient, header = gradients[0], _header(prepared.blob)
        out = gradient.new_empty(gradient.shape[0], header.in_features)
        for p in [precision] if rows is None else rows.unique().tolist():
            chosen = slice(None) if rows is None else (rows == p).nonzero()[:, 0]
            w_t = _dequantized(prepared.blob, header, p)
            out[chosen] = (gradient[chosen].float() @ w_t.t()).to(out.dtype)
        return out, None, None, None, None


def _fake_matmul(
    x: torch.Tensor,
    blob: torch.Tensor,
    out_features: int,
    precision: int,
    rows: torch.Tensor | None,
    activation_bits: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


_operators = torch.library.Library("anybits", "FRAGMENT")
_operators.define(
    "cpu_matmul(Tensor x, Tensor blob, int out_features, int precision, Tensor? rows, int activation_bits) -> Tensor"
)
_operators.impl("cpu_matmul", _matmul, "CPU")
torch.library.register_fake("anybits::cpu_matmul", _fake_matmul, lib=_operators)

register(CpuBackend())
