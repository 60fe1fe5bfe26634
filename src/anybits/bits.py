"""{0, 1} <-> 32-bit words: the only file that knows the bit order.

Bit j of word w is column 32*w + j, least significant bit first. Words are int32, stored little-endian,
so byte b of a plane row holds columns 8*b ... 8*b + 7 on every machine that anybits supports.
"""

from __future__ import annotations

import sys

import torch

from anybits.errors import AnybitsError

WORD = 32

# Multiplying eight 0/1 bytes (byte i at bit 8*i) by this puts byte i at bit 56 + i; no two partial
# products meet, so nothing carries.
_GATHER_BITS = 0x0102040810204080

if sys.byteorder != "little":
    raise ImportError("anybits needs a little-endian machine, and this one is big-endian")


def words(columns: int) -> int:
    """Return how many 32-bit words hold `columns` bits."""
    return (columns + WORD - 1) // WORD


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Pack {0, 1} uint8 or bool `[..., K]` into int32 `[..., ceil(K/32)]`; padding bits are 0."""
    if bits.dtype not in (torch.uint8, torch.bool):
        raise AnybitsError(f"bits to pack must be uint8 or bool, got {bits.dtype}")
    columns = bits.shape[-1]
    padding = words(columns) * WORD - columns
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, padding)).contiguous()
    # Flat, because a dimension of one element may keep a stride under which no wider view exists.
    gathered = padded.flatten().view(torch.int64).mul(_GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)
    return gathered.view(torch.int32).view(*bits.shape[:-1], words(columns))


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack int32 `[..., ceil(K/32)]` into {0, 1} uint8 `[..., K]` where K = `columns`."""
    if packed.dtype != torch.int32 or packed.shape[-1] != words(columns):
        raise AnybitsError(
            f"words of {columns} columns must be int32 with a last dimension of {words(columns)}, "
            f"got {packed.dtype} with {packed.shape[-1]}"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bytes_ = packed.contiguous().view(torch.uint8)
    bits = bytes_[..., None].bitwise_right_shift(shifts).bitwise_and_(1)
    return bits.flatten(-2)[..., :columns]


def codes_to_planes(codes: torch.Tensor, precision: int) -> torch.Tensor:
    """Split uint8 codes `[N, K]` below 2**precision into packed planes int32 `[precision, N, ceil(K/32)]`.

    Plane 0 is the most significant bit of a code.
    """
    planes = [pack(codes.bitwise_right_shift(precision - 1 - i).bitwise_and(1)) for i in range(precision)]
    return torch.stack(planes)


def planes_to_codes(planes: torch.Tensor, precision: int, columns: int) -> torch.Tensor:
    """Join the first `precision` planes of int32 `[P, N, ceil(K/32)]` into uint8 codes `[N, K]`."""
    codes = unpack(planes[0], columns)
    for plane in planes[1:precision]:
        codes = codes.bitwise_left_shift(1).bitwise_or_(unpack(plane, columns))
    return codes
