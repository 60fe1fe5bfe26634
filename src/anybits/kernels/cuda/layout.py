"""A PlaneWeight as the CUDA kernels want it: planes in tiles, levels beside the tile that reads them.

Plain torch on any device; csrc/cuda/common.h says what a kernel sees. Everything here is a permutation, but for
`walsh_levels`, which writes a codebook as a sum of signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from anybits import bits
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, group_columns

TILE, STEP, UNIT = 16, 256, 128
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
MAX_WALSH = 3
"""Highest precision of a codebook that is also kept as a sum of signs: 2^p - 1 of them, so 3 for 2 bits, 7 for 3."""


@dataclass(frozen=True)
class Shape:
    """What a kernel must know of a weight besides its bytes; all ints, so that a torch operator can take it.

    codebook: 0 or 1; groups, group_units, subgroups, row_group: common.h's Args and signs.cu's macros;
    level_dtype: of DTYPES; offsets: 0 or 1; stored: bit p is set when precision p is stored.
    """

    out_features: int
    in_features: int
    codebook: int
    groups: int
    group_units: int
    subgroups: int
    row_group: int
    level_dtype: int
    offsets: int
    stored: int

    @property
    def tiles(self) -> int:
        """Tiles of 16 output rows; the last may be padded."""
        return ceil(self.out_features / TILE)

    @property
    def steps(self) -> int:
        """Steps of 256 columns; the last may be padded."""
        return ceil(self.in_features / STEP)

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored precisions, ascending."""
        return tuple(p for p in range(1, 9) if self.stored >> p & 1)

    def ints(self) -> list[int]:
        """Return the fields in order: Shape(*shape.ints()) is the same shape."""
        # Written out, because torch.compile follows this and not dataclasses.astuple.
        sizes = [self.out_features, self.in_features, self.codebook, self.groups, self.group_units, self.subgroups]
        return [*sizes, self.row_group, self.level_dtype, self.offsets, self.stored]


@dataclass(frozen=True, eq=False)
class CudaWeight:
    """A weight on one device.

    planes: uint8 `[P * tiles * steps * 512]`; levels: uint8, of signs.cu for affine levels, of codebook.cu otherwise;
    walsh: uint8, a codebook's precisions up to MAX_WALSH as signs.cu reads them, or empty; row_scale: float32
    `[16 * tiles]` for codebooks, else empty.
    """

    shape: Shape
    planes: torch.Tensor
    levels: torch.Tensor
    walsh: torch.Tensor
    row_scale: torch.Tensor


def prepare(weight: PlaneWeight) -> CudaWeight:
    """Return `weight` repacked on its own device; nothing in it refers to `weight`."""
    planes = tile_planes(weight.planes[: weight.max_precision], weight.in_features)
    stored = sum(1 << p for p in weight.precisions)
    levels = weight.levels
    none = planes.new_empty(0)
    if isinstance(levels, AffineLevels):
        shape, packed = _affine(levels.expanded(), weight.out_features, weight.in_features, stored)
        return CudaWeight(shape, planes, packed, none, none.float())
    shape = Shape(weight.out_features, weight.in_features, 1, 1, 1, 1, 1, DTYPES[torch.float32], 1, stored)
    packed, row_scale = _codebooks(levels, shape)
    return CudaWeight(shape, planes, packed, walsh_levels(levels, shape), row_scale)


def tile_planes(planes: torch.Tensor, in_features: int) -> torch.Tensor:
    """Reorder int32 `[P, N, ceil(K/32)]` into `[P][tiles][steps][lane 4r + t][unit, row r or r + 8]` words.

    Columns move inside a unit of 128: bit 8i + s of word t is column 32(s / 2) + 8t + 4(s % 2) + i.
    """
    count, rows, words = planes.shape
    tiles, steps = ceil(rows / TILE), ceil(in_features / STEP)
    padded = torch.nn.functional.pad(planes, (0, steps * 8 - words, 0, tiles * TILE - rows))
    out = torch.empty(count, tiles, steps, 32, 4, dtype=torch.int32, device=planes.device)
    for i, plane in enumerate(padded):  # one plane at a time: its bits take 8 times its bytes
        flat = bits.unpack(plane, steps * STEP).view(tiles * TILE, steps * 2, 4, 4, 2, 4)  # q, t, s % 2, i
        words_ = bits.pack(flat.permute(0, 1, 3, 5, 2, 4).reshape(tiles * TILE, steps * STEP))
        tiled = words_.view(tiles, 2, 8, steps, 2, 4)  # tile, half, r, step, unit, t
        out[i] = tiled.permute(0, 3, 2, 5, 4, 1).reshape(tiles, steps, 32, 4)
    return out.view(torch.uint8).flatten()


def _affine(levels: AffineLevels, rows: int, columns: int, stored: int) -> tuple[Shape, torch.Tensor]:
    group = group_columns(levels.group_size, columns)
    units, subgroups, whole, fine = 1, 1, int(group >= columns), group
    if not whole and group % UNIT == 0:
        units = group // UNIT
    elif not whole:  # a group that is no part or multiple of a unit repeats its scales for parts that are
        fine = 64 if group % 64 == 0 else 32
        subgroups = UNIT // fine
    groups = 1 if whole else ceil(columns / fine)
    dtypes = {t.dtype for p in levels.precisions for t in levels.tensors(p).values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    offsets = int(levels.offsets is not None)
    shape = Shape(rows, columns, 0, groups, units, subgroups, whole, DTYPES[dtype], offsets, stored)
    blocks = {}
    for p in levels.precisions:
        slots = torch.cat([levels.scales[p], *([levels.offsets[p][None]] if levels.offsets is not None else [])])
        if fine != group:
            slots = slots[..., torch.arange(groups, device=slots.device) * fine // group]
        blocks[p] = _by_tile(slots.to(dtype), shape.tiles)
    return shape, _with_table(blocks)


def _by_tile(slots: torch.Tensor, tiles: int) -> torch.Tensor:
    """Reorder `[slots, N, G]` into `[tiles, G, slots, r, half]`, padding rows being 0."""
    count, rows, groups = slots.shape
    padded = torch.nn.functional.pad(slots, (0, 0, 0, tiles * TILE - rows))
    return padded.view(count, tiles, 2, 8, groups).permute(1, 4, 0, 3, 2).contiguous()


def _with_table(blocks: dict[int, torch.Tensor]) -> torch.Tensor:
    """Join blocks by precision behind int64 `[16]`, the byte where each begins; each begins at a multiple of 128."""
    table, parts, at = [0] * 16, [], 128
    device = next(iter(blocks.values())).device
    for p, block in blocks.items():
        table[p] = at
        flat = block.flatten().view(torch.uint8)
        parts.append(torch.nn.functional.pad(flat, (0, -flat.numel() % 128)))
        at += parts[-1].numel()
    return torch.cat([torch.tensor(table, dtype=torch.int64, device=device).view(torch.uint8), *parts])


def _codebooks(levels: CodebookLevels, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[tiles][stored p ascending][16 rows][2^p]` in fp16, and what each row is to be multiplied by.

    fp16 centroids stay as they are; others are divided by a power of two that puts a row's largest below 2.
    """
    rows = shape.tiles * TILE
    scale = torch.ones(rows, device=levels.centroids[shape.precisions[0]].device)
    if any(t.dtype != torch.float16 for t in levels.centroids.values()):
        peak = torch.stack([t.float().abs().amax(1) for t in levels.centroids.values()]).amax(0)
        scale[: shape.out_features] = torch.exp2(peak.clamp_min(1e-30).log2().floor())
    tables = []
    for p in shape.precisions:
        values = torch.nn.functional.pad(levels.centroids[p].float(), (0, 0, 0, rows - shape.out_features))
        tables.append((values / scale[:, None]).half().view(shape.tiles, TILE << p))
    return torch.cat(tables, 1).view(torch.uint8).flatten(), scale


def walsh_levels(levels: CodebookLevels, shape: Shape) -> torch.Tensor:
    """Return the codebooks of precisions up to MAX_WALSH as scales of signs, `_with_table`; empty when none is stored.

    A function of p signs b is sum_v c_v * prod_{i in v} b_i over all sets v of planes, c its Walsh-Hadamard
    transform. A kernel has the product's sign as the xor x of the planes' bits: prod = (-1)^(|v| + 1) * (2x - 1).
    """
    blocks = {}
    for p in shape.precisions:
        if p > MAX_WALSH:
            continue
        codes = torch.arange(1 << p)
        signs = [(codes >> (p - 1 - i) & 1) * 2.0 - 1 for i in range(p)]
        basis = torch.stack([_product(signs, v, p) for v in [*range(1, 1 << p), 0]])
        flips = torch.tensor([1.0 if v == 0 or v.bit_count() % 2 else -1.0 for v in [*range(1, 1 << p), 0]])
        centroids = levels.centroids[p]
        transform = (basis * flips[:, None] / (1 << p)).double().to(centroids.device)
        slots = (transform @ centroids.double().t()).float()
        blocks[p] = _by_tile(slots[..., None], shape.tiles)
    if not blocks:
        return torch.empty(0, dtype=torch.uint8, device=levels.centroids[shape.precisions[0]].device)
    return _with_table(blocks)


def _product(signs: Sequence[torch.Tensor], v: int, p: int) -> torch.Tensor:
    out = torch.ones(1 << p)
    for i, sign in enumerate(signs):
        if v >> i & 1:
            out = out * sign
    return out
