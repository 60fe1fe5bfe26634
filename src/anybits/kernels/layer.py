"""One new position of each sequence through a whole decoder layer, in one call (csrc/layer.cpp), on the CPU."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anybits.errors import AnybitsError
from anybits.kernels import cpu, native, step

MAX_ROWS = 11
"""Sequences that a call takes: with one more, products could become dense (many_rows.LEAST_DENSE_ROWS)."""

_LAYER = struct.Struct("QqqQ" * 7 + "4Q5d6q")
"""ab_layer of csrc/anybits.h."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the last dimension: weight `[K]` * x / sqrt(mean(x²) + eps)."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Sizes:
    """Numbers of a layer: columns of x and of the gated activation, query heads, key heads, and a head's dimension."""

    hidden: int
    middle: int
    heads: int
    kv_heads: int
    dim: int


def fits(sizes: Sizes, shapes: Sequence[tuple[int, int]]) -> bool:
    """Return whether matrices of `shapes`, rows and columns of each in the order of `packed`, make such a layer."""
    s, heads, kv = sizes, sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
    wanted = [(heads, s.hidden), (kv, s.hidden), (kv, s.hidden), (s.hidden, heads)]
    wanted += [(s.middle, s.hidden), (s.middle, s.hidden), (s.hidden, s.middle)]
    return list(shapes) == wanted and s.dim % 32 == 0 and s.kv_heads > 0 and s.heads % s.kv_heads == 0


def packed(
    matrices: Sequence[tuple[cpu.PackedWeight, int, torch.Tensor | None]],
    norms: Sequence[Norm | None],
    sizes: Sizes,
    scaling: float,
    activation_bits: int,
) -> bytes:
    """Return a layer as `run` takes it. It holds addresses: the caller keeps all tensors alive.

    matrices: weight, precision and bias (bfloat16 `[N]` or None) of query, key, value, output, gate, up and down;
    norms: of the layer's input and the MLP's, then of each query head and of each key head, or None for these.
    """
    numbers: list[int] = []
    for weight, precision, bias in matrices:
        numbers += (weight.blob.data_ptr(), weight.blob.numel(), precision, 0 if bias is None else bias.data_ptr())
    addresses = [0 if norm is None else norm.weight.data_ptr() for norm in norms]
    epsilons = [0.0 if norm is None else norm.eps for norm in norms]
    s = sizes
    return _LAYER.pack(
        *numbers, *addresses, *epsilons, scaling, s.hidden, s.middle, s.heads, s.kv_heads, s.dim, activation_bits
    )


def run(
    layer: bytes,
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    length: int,
    address: tuple[int, ...],
) -> torch.Tensor:
    """Return the layer's output `[B, 1, hidden]` for contiguous x `[B, 1, hidden]`, B at most MAX_ROWS.

    angles: cos and sin, contiguous `[1 or B, 1, D]`; length: positions of the cache with the new one, whose keys and
    values are written; address: of keys and of values `[B, Hkv, capacity, D]`, then three strides of each. Bits are
    those of the layer's parts in `anybits.kernels.step`, called one after another.
    """
    y = torch.empty_like(x)
    cos, sin = angles
    turn = cos.shape[2] if cos.shape[0] > 1 else 0
    status = native.loaded().layer_step(
        layer, step.isa_number(), torch.get_num_threads(), x.data_ptr(), y.data_ptr(), x.shape[0], length,
        cos.data_ptr(), sin.data_ptr(), turn, *address,
    )  # fmt: skip
    if status:
        raise AnybitsError(f"the CPU kernels of a decoder layer refused their arguments (status {status})")
    return y
