"""Every CUDA kernel variant that ordinary use can ask for, as the backend plans it: what the compile test compiles."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as product_of

from anybits.kernels.cuda.layout import Shape
from anybits.kernels.cuda.plan import Device, Kernel, Tuning, dequantization, product, together

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""sm_NN -> KiB of shared memory that a block may have."""


def affine(group: int = 128, offsets: int = 1, dtype: int = 0, n: int = 4096, k: int = 4096) -> Shape:
    if group == -1:
        return Shape(n, k, 0, 1, 1, 1, 1, dtype, offsets, 0x1FE)
    units, subgroups = max(1, group // 128), max(1, 128 // group)
    return Shape(n, k, 0, -(-k // group), units, subgroups, 0, dtype, offsets, 0x1FE)


def codebook(top: int = 8, n: int = 4096, k: int = 4096) -> Shape:
    return Shape(n, k, 1, 1, 1, 1, 1, 2, 1, (2 << top) - 4)


def smallest(arch: int) -> Iterator[Kernel]:
    """One of each source, quick to compile: that it compiles everywhere."""
    gpu, default = Device(132, SHARED[arch] << 10), Tuning()
    yield product(affine(), 1, 1, 2, gpu, default).launch.kernel
    yield product(codebook(), 1, 1, 2, gpu, Tuning(kernel="codebook")).launch.kernel
    yield product(affine(), 4, 1, 2, gpu, Tuning(kernel="simple")).launch.kernel
    yield dequantization(affine(), 1, 2).kernel
    yield product(affine(), 1, 1, 2, gpu, default).reduction(affine(), 1, 1).kernel
    yield together((affine(), affine(n=1024), affine(n=1024)), 1, 1, 0, gpu, default).launch.kernel
    yield Kernel("norm.cu", (("DTYPE", 1), ("THREADS", 512)))
    yield Kernel("gated.cu", (("DTYPE", 1),))
    yield Kernel("rotary.cu", (("DTYPE", 1),))


def representative(arch: int) -> Iterator[Kernel]:
    """One of each kind, the largest among them."""
    gpu = Device(132, SHARED[arch] << 10)
    default = Tuning()
    yield product(affine(), 1, 1, 2, gpu, default).launch.kernel
    yield product(affine(32, 0), 32, 0, 4, gpu, default).launch.kernel
    yield product(affine(-1, 1, 2), 16, 2, 0, gpu, default).launch.kernel
    yield product(codebook(), 1, 1, 3, gpu, default).launch.kernel
    yield product(codebook(), 64, 1, 8, gpu, default).launch.kernel
    yield product(codebook(), 16, 2, 0, gpu, default).launch.kernel
    yield product(affine(), 4, 1, 3, gpu, Tuning(kernel="simple")).launch.kernel
    yield dequantization(codebook(), 0, 5).kernel
    planned = product(affine(), 1, 1, 2, gpu, Tuning(splits=2))
    yield planned.launch.kernel
    yield planned.reduction(affine(), 1, 1).kernel
    yield together((affine(32, 0),) * 4, 32, 0, 4, gpu, default).launch.kernel
    yield together((affine(-1, 1, 2),) * 3, 16, 2, 0, gpu, default).launch.kernel
    yield together((codebook(),) * 3, 16, 2, 0, gpu, default).launch.kernel


def fused(arch: int) -> Iterator[Kernel]:
    """One launch for weights that share x."""
    gpu, default = Device(132, SHARED[arch] << 10), Tuning()
    for rows, p, parts in product_of((1, 4, 16, 32), range(9), (2, 3)):
        for group in (32, 128, -1) if p in (0, 2, 4) else (128,):
            yield together((affine(group),) * parts, rows, 1, p, gpu, default).launch.kernel
        if p != 1:
            yield together((codebook(),) * parts, rows, 1, p, gpu, default).launch.kernel


def every(arch: int) -> set[Kernel]:
    """All precisions, row counts and groups with bf16 x, and one precision with the other dtypes and tunings."""
    gpu, default = Device(132, SHARED[arch] << 10), Tuning()
    kernels = set(representative(arch)) | set(fused(arch))
    for rows in (1, 4, 8, 16, 32):
        for p in range(9):
            for group in (32, 64, 128, -1) if p in (0, 2, 4, 8) else (128,):
                kernels.add(product(affine(group), rows, 1, p, gpu, default).launch.kernel)
            if p != 1:
                kernels.add(product(codebook(), rows, 1, p, gpu, default).launch.kernel)
                kernels.add(product(codebook(3 if p < 4 else 8), rows, 1, p, gpu, default).launch.kernel)
    for p in range(1, 9):
        kernels.add(dequantization(affine(), 1, p).kernel)
        kernels.add(dequantization(codebook(), 1, max(p, 2)).kernel)
    for dtype in (0, 2):
        kernels.add(product(affine(), 1, dtype, 3, gpu, default).launch.kernel)
        kernels.add(product(codebook(), 1, dtype, 4, gpu, default).launch.kernel)
    for masks in (1, 2, 4):
        for blocks in (1, 2):
            kernels.add(product(affine(), 1, 1, 3, gpu, Tuning(masks=masks, blocks=blocks)).launch.kernel)
    return kernels
