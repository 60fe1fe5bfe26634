"""The CPU backend: SIMD kernels that read p planes at precision p (csrc/, docs/kernels.md)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from anybits.errors import AnybitsError
from anybits.kernels import many_rows
from anybits.kernels import reference as _reference  # noqa: F401  (registered first: the last resort)
from anybits.kernels.backend import register
from anybits.kernels.native import AFFINE, CODEBOOK, DTYPES, check, header_of, isa_number, library, loaded
from anybits.weight import AffineLevels, Levels, PlaneWeight, check_precision, group_columns

_LEVEL_DTYPES = DTYPES | {torch.int8: 3}
_HUGE_PAGE = 2 << 20

ACTIVATION_BITS = "ANYBITS_CPU_ACTIVATION_BITS"
"""The environment variable that says in how many bits activations are kept."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A PlaneWeight repacked for one instruction set.

    blob: uint8, self-describing (csrc/blob.h).
    """

    blob: torch.Tensor
    out_features: int
    in_features: int
    precisions: tuple[int, ...]


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
            CODEBOOK if scaled is None else AFFINE,
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
        check(packer.blob_begin(*at, *shape))
        for i in range(weight.max_precision):
            plane = weight.planes[i].contiguous()
            check(packer.blob_plane(*at, i, plane.data_ptr(), torch.get_num_threads()))
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
    check(pack(*at, precision, plain[0].data_ptr(), plain[1].data_ptr() if len(plain) > 1 else None))


def allocate(size: int) -> torch.Tensor:
    """Return uint8 `[size]`, in 2 MiB pages where the system grants them: streaming runs a fifth faster."""
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size]


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
    dtype = DTYPES.get(x.dtype, -1)
    if rows is not None:
        rows = _checked_rows(rows, count)
    asked = x, blob, precision, rows
    many = count >= many_rows.LEAST_DENSE_ROWS
    if dtype < 0 or count == 0 or (many and many_rows.dense_is_faster(*asked, activation_bits)):
        return many_rows.dense_product(x, blob, out_features, precision, rows)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty((count, out_features), dtype=x.dtype)
    run, size, stride = loaded().products, x.element_size(), x.stride(0)
    source, threads = (blob.data_ptr(), blob.numel()), torch.get_num_threads()
    at_once = min(count, many_rows.PASS_ROWS)
    if count > at_once:
        at_once = many_rows.rows_of_a_pass(*asked, activation_bits)
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


def _checked_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    if rows.dtype != torch.int32 or rows.shape != (count,) or rows.device.type != "cpu":
        raise AnybitsError(
            f"precision of {count} rows must be int32 [{count}] on the CPU, "
            f"got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    return rows.contiguous()


def _refusal(
    status: int, x: torch.Tensor, blob: torch.Tensor, precision: int, rows: torch.Tensor | None
) -> AnybitsError:
    """Return the AnybitsError that says what the library found wrong."""
    header = header_of(blob)
    for p in [precision] if rows is None else rows.unique().tolist():
        check_precision(p, header.precisions)
    if x.shape[1] != header.in_features:
        return AnybitsError(f"activations have {x.shape[1]} columns where the weight has {header.in_features}")
    return AnybitsError(f"the CPU kernels refused a packed weight of {blob.numel()} bytes (status {status})")


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
        gradient, header = gradients[0], header_of(prepared.blob)
        out = gradient.new_empty(gradient.shape[0], header.in_features)
        for p in [precision] if rows is None else rows.unique().tolist():
            chosen = slice(None) if rows is None else (rows == p).nonzero()[:, 0]
            w_t = many_rows.dequantized(prepared.blob, header, p)
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
