"""What stands between the products of a captured decode step: norms, gated activations, rotations and the cache.

In transformers these are some thirty kernels a layer, and a node of a CUDA graph costs more than its bytes do at one
row. The counterpart for the CPU is kernels/step.py. They run only inside `small_kernels`: a decoder that captures steps
compares its first one with the same step without them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import ceil

import torch

from anybits.kernels.cuda import gpu as gpus
from anybits.kernels.cuda.layout import DTYPES
from anybits.kernels.cuda.plan import Kernel, Launch

_on: ContextVar[bool] = ContextVar("anybits_small_cuda_kernels", default=False)


@contextmanager
def small_kernels(wanted: bool = True) -> Iterator[None]:
    """Let modules that know these kernels use them in the body."""
    token = _on.set(wanted)
    try:
        yield
    finally:
        _on.reset(token)


def usable(*tensors: torch.Tensor) -> bool:
    """Return whether these kernels take `tensors`: inside `small_kernels`, on an NVIDIA GPU, one dtype, no autograd."""
    if not _on.get() or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    first = tensors[0].dtype
    return first in DTYPES and all(t.device.type == "cuda" and t.dtype is first for t in tensors)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight `[K]` * (x `[..., K]` / sqrt(mean(x²) + eps)); the fraction is rounded before it is multiplied."""
    x = x.contiguous()
    y = torch.empty_like(x)
    columns = weight.shape[0]
    threads = min(1024, 32 * ceil(columns / 256))  # 8 columns a thread
    kernel = Kernel("norm.cu", (("DTYPE", DTYPES[x.dtype]), ("THREADS", threads)))
    launch = Launch(kernel, (x.numel() // columns, 1), threads, 4 * threads // 32)
    _run(launch, x, struct.pack("<3Qqd", x.data_ptr(), weight.data_ptr(), y.data_ptr(), columns, eps))
    return y


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for tensors of one shape; silu(gate) is rounded before it is multiplied."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    launch = Launch(Kernel("gated.cu", (("DTYPE", DTYPES[gate.dtype]),)), (ceil(y.numel() / 256), 1), 256, 0)
    _run(launch, gate, struct.pack("<3Qq", gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel()))
    return y


def rotate_into(
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys of M new positions, put keys and values into their slots, return the rotated queries.

    new: query `[B, M, H * D]`, key `[B, M, Hkv * D]`, value `[B, M, Hkv * Dv]`; angles: cos and sin `[1 or B, M, D]`;
    cache: contiguous keys `[B, Hkv, size, D]` and values `[B, Hkv, size, Dv]`; slots: int64 `[M]`. Returns
    `[B, H, M, D]`. Rounds as rotate_half in the tensors' dtype does.
    """
    query, key, value = (t.contiguous() for t in new)
    cos, sin = (t.contiguous() for t in angles)
    keys, values = cache
    batch, kv_heads, size, dim = keys.shape
    rows, value_dim = query.shape[1], values.shape[3]
    heads = query.shape[2] // dim
    rotated = torch.empty_like(query)
    items = (heads + kv_heads) * dim // 2 + kv_heads * value_dim
    grid = (ceil(batch * rows * items / 256), 1)
    tensors = (query, key, value, cos, sin, slots, rotated, keys, values)
    sizes = (batch, rows, heads, kv_heads, dim, value_dim, size, rows * dim if cos.shape[0] > 1 else 0)
    launch = Launch(Kernel("rotary.cu", (("DTYPE", DTYPES[query.dtype]),)), grid, 256, 0)
    _run(launch, query, struct.pack("<9Q8q", *(t.data_ptr() for t in tensors), *sizes))
    return rotated.view(batch, rows, heads, dim).transpose(1, 2)


def _run(launch: Launch, x: torch.Tensor, arguments: bytes) -> None:
    gpus.launch(gpus.of(x.device.index), launch, arguments)
