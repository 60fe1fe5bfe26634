"""Many rows of x on a CPU: how many a pass of the kernels takes, and when a dense product is faster."""

from __future__ import annotations

import torch

from anybits.errors import AnybitsError
from anybits.kernels.native import DTYPES, ISAS, Header, check, header_of, loaded
from anybits.weight import check_precision

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

CENTROID_PLANES = 4
"""Precisions up to this one make bytes of a codebook's centroids once for many rows (csrc/levels.h)."""

SLAB_BYTES = 2 << 20
"""Bytes of one dequantized slab: slabs of 8 MiB took two to four times as long to fill as those of 2 MiB."""


def dense_is_faster(
    x: torch.Tensor, blob: torch.Tensor, precision: int, rows: torch.Tensor | None, activation_bits: int
) -> bool:
    """Return whether slabs and torch's GEMM beat the kernels for x `[M, K]` at one precision, or those of `rows`."""
    header = header_of(blob)
    highest = precision if rows is None else int(rows.max())
    if not 1 <= highest <= 8 or _by_words(header):
        return False
    if _by_bytes(header, highest, activation_bits) or _by_bf16(x, header):
        return False
    limit = DENSE_ROWS[ISAS[header.isa], header.affine][highest]
    if rows is not None:
        limit = max(limit, min(DENSE_ROWS_MIXED, limit * rows.unique().numel()))
    return x.shape[0] >= limit * (1 if x.dtype == torch.bfloat16 else DENSE_ROWS_FP32)


def _by_bytes(header: Header, highest: int, activation_bits: int) -> bool:
    """Return whether products of bytes run, for any number of rows."""
    return activation_bits == 8 and highest <= BYTE_PLANES and ISAS[header.isa] in ("avx512", "amx")


def _by_words(header: Header) -> bool:
    """Return whether many rows multiply levels in 14 bits that are never written."""
    return header.affine and header.whole_blocks and ISAS[header.isa] in ("avx2", "neon")


def _by_bf16(x: torch.Tensor, header: Header) -> bool:
    """Return whether many rows multiply bf16 levels that are never written (csrc/avx512_bf16.h)."""
    return x.dtype == torch.bfloat16 and bool(loaded().fuses_bf16(header.isa))


def rows_of_a_pass(
    x: torch.Tensor, blob: torch.Tensor, precision: int, rows: torch.Tensor | None, activation_bits: int
) -> int:
    """Return how many rows of x go through one pass of the kernels: more where levels are made once for all."""
    header, highest = header_of(blob), precision if rows is None else int(rows.max())
    by_bytes = _by_bytes(header, highest, activation_bits) and (header.affine or highest <= CENTROID_PLANES)
    return LEVEL_PASS_ROWS if by_bytes or _by_bf16(x, header) or _by_words(header) else PASS_ROWS


def dense_product(
    x: torch.Tensor, blob: torch.Tensor, out_features: int, precision: int, rows: torch.Tensor | None
) -> torch.Tensor:
    """Dequantize slab after slab and multiply each with torch's GEMM, once per precision among the rows."""
    header = header_of(blob)
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


def _dense_into(y: torch.Tensor, x: torch.Tensor, blob: torch.Tensor, header: Header, precision: int) -> None:
    check_precision(precision, header.precisions)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    x = x.to(dtype)
    k, n = header.in_features, header.out_features
    tile = max(64, loaded().tile_rows(header.isa))
    # Odd multiples of a tile: columns a power of two apart would push each other out of the cache.
    count = ((max(1, SLAB_BYTES // (k * dtype.itemsize) // tile) - 1) | 1) * tile
    slab = torch.empty(k * min(count, n), dtype=dtype)
    source, to = (blob.data_ptr(), blob.numel(), precision), (DTYPES[dtype], slab.data_ptr(), torch.get_num_threads())
    for first in range(0, n, count):
        here = min(count, n - first)
        check(loaded().dequantize(*source, first, here, *to))
        flat = slab[: k * here]
        w_t = flat.view(k, here) if header.affine else flat.view(here, k).t()
        y[:, first : first + here] = x @ w_t


def dequantized(blob: torch.Tensor, header: Header, precision: int) -> torch.Tensor:
    """Return W_p.T as float32 `[K, N]`."""
    flat = torch.empty(header.in_features * header.out_features)
    where = (blob.data_ptr(), blob.numel(), precision, 0, header.out_features, DTYPES[torch.float32])
    check(loaded().dequantize(*where, flat.data_ptr(), torch.get_num_threads()))
    if header.affine:
        return flat.view(header.in_features, header.out_features)
    return flat.view(header.out_features, header.in_features).t()
