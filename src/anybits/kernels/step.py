"""What stands between the products of a decode step on the CPU (csrc/step.h): bfloat16 tensors, sums in float32.

A call costs its Python, and torch's several operators in the place of one call cost it several times. torch's product
of one bfloat16 row besides uses one thread: the output layer of 128,256 x 4096 took 55 ms on a Zen 4 that reads
36 GB/s, and takes 32 here with AVX512_BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from anybits.errors import AnybitsError
from anybits.kernels import cpu, many_rows, native

MAX_DENSE_ROWS = 8
"""Rows of x up to which `dense` is used: with more, torch's product is faster."""

_BF16 = 1


def usable(*tensors: torch.Tensor) -> bool:
    """Return whether these kernels take `tensors`: bfloat16 on the CPU, outside autograd and torch.compile."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or isa_number() is None:
        return False
    return all(t.dtype is torch.bfloat16 and t.is_cpu and type(t) in _PLAIN for t in tensors)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


@cache
def isa_number() -> int | None:
    """Return the number of the instruction set (ANYBITS_CPU_ISA or the best); None when the kernels were not built."""
    return None if native.library() is None else native.isa_number()


def few_rows(x: torch.Tensor, in_features: int) -> bool:
    """Return whether `products` takes x `[..., in_features]`: few enough rows for the plane kernels in any case."""
    return 0 < x.numel() < many_rows.LEAST_DENSE_ROWS * in_features and x.shape[-1] == in_features and usable(x)


def products(
    x: torch.Tensor, weights: Sequence[cpu.PackedWeight], precisions: Sequence[int], backend: cpu.CpuBackend
) -> list[torch.Tensor]:
    """Return x `[..., K]` @ W_p.T as `[..., N]` for each weight at its precision, as CpuBackend.matmul does.

    x: one for which `few_rows`; precisions: stored ones; backend: which prepared the weights.
    """
    x = x.contiguous()
    *leading, k = x.shape
    made: list[torch.Tensor] = []
    arguments: list[int] = []
    for weight, precision in zip(weights, precisions, strict=True):
        y = torch.empty(*leading, weight.out_features, dtype=torch.bfloat16)
        made.append(y)
        blob = weight.blob
        arguments += (blob.data_ptr(), blob.numel(), precision, y.data_ptr())
    bits, threads = backend.activation_bits(), torch.get_num_threads()
    _check(native.loaded().products(x.data_ptr(), _BF16, x.numel() // k, k, k, None, bits, threads, *arguments))
    return made


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two contiguous tensors of one size hold the same bytes."""
    return native.loaded().same_bytes(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size())


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x `[..., K]` @ weight.T + bias as `[..., N]`, for a contiguous weight `[N, K]`, bias `[N]` or None.

    A row's result does not depend on the other rows, nor on the number of threads. At most 64 rows.
    """
    n, k = weight.shape
    rows = x.reshape(-1, k).contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=torch.bfloat16)
    bias_at = None if bias is None else bias.data_ptr()
    _check(
        native.loaded().dense(
            isa_number(), weight.data_ptr(), bias_at, n, k, rows.data_ptr(), rows.shape[0], k, y.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight `[K]` * (x `[..., K]` / sqrt(mean(x²) + eps)); the fraction is rounded before it is multiplied."""
    x = x.contiguous()
    y = torch.empty_like(x)
    k = weight.shape[0]
    _check(
        native.loaded().rms_norm(
            isa_number(), x.data_ptr(), weight.data_ptr(), x.numel() // k, k, y.data_ptr(), torch.get_num_threads(), eps
        )
    )  # fmt: skip
    return y


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for tensors of one shape; silu(gate) is rounded before it is multiplied."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _check(
        native.loaded().silu_mul(
            isa_number(), gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr(), torch.get_num_threads()
        )
    )
    return y


def attention_fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether `attend` takes these shapes and strides."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    return (
        query.shape[2] == 1
        and dim % 16 == value_dim % 16 == 0
        and query.shape[1] % key.shape[1] == 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (query.stride(1) == dim or query.shape[1] == 1)
    )


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return softmax(query @ key.T * scaling) @ value as `[B, 1, H, Dv]`, each query head over its key head.

    query: `[B, H, 1, D]`, key: `[B, Hkv, L, D]`, value: `[B, Hkv, L, Dv]`, for which `attention_fits`. Every sum is
    taken in float32 and only the result is rounded.
    """
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1:3]
    out = torch.empty((batch, 1, heads, value.shape[3]), dtype=torch.bfloat16)
    _check(
        native.loaded().attend(
            isa_number(), torch.get_num_threads(),
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            batch, heads, kv_heads, length, dim, value.shape[3],
            query.stride(0), *key.stride()[:3], *value.stride()[:3], None, None, None, None, 0, scaling,
        )
    )  # fmt: skip
    return out


def attend_new(
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> torch.Tensor:
    """Rotate the new position's query and key, put key and value into the last place of the cache, and attend over it.

    new: query `[B, 1, H * D]`, key `[B, 1, Hkv * D]` and value `[B, 1, Hkv * Dv]`, contiguous; angles: cos and sin,
    `[1 or B, 1, D]`; cache: keys `[B, Hkv, L, D]` and values `[B, Hkv, L, Dv]`, whose last dimension is dense. D is a
    multiple of 32, Dv of 16. Returns `[B, 1, H * Dv]`. Rotations round as rotate_half in bfloat16 does:
    x * cos and rotate_half(x) * sin are rounded, then their sum.
    """
    (query, key, value), (cos, sin), (keys, values) = new, angles, cache
    batch, kv_heads, length, dim = keys.shape
    heads, value_dim = query.shape[2] // dim, values.shape[3]
    out = torch.empty((batch, 1, heads * value_dim), dtype=torch.bfloat16)
    _check(
        native.loaded().attend(
            isa_number(), torch.get_num_threads(),
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            batch, heads, kv_heads, length, dim, value_dim,
            heads * dim, *keys.stride()[:3], *values.stride()[:3],
            key.data_ptr(), value.data_ptr(), cos.data_ptr(), sin.data_ptr(), dim if cos.shape[0] > 1 else 0, scaling,
        )
    )  # fmt: skip
    return out


def _check(status: int) -> None:
    if status:
        raise AnybitsError(f"the CPU kernels of a decode step refused their arguments (status {status})")
