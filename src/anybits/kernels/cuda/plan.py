"""Which CUDA kernel runs a product, with what macros, on how many blocks: arithmetic only, no GPU and no torch call.

The figures chosen here are estimates for Hopper until benchmarks/gpu.py has run on one; ANYBITS_CUDA_TUNING and
ANYBITS_CUDA_KERNEL try others.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path

from anybits.errors import AnybitsError
from anybits.kernels.cuda.layout import MAX_WALSH, STEP, TILE, Shape

FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
_PARTS = {
    "signs.cu": ("numbers.h", "common.h", "tile.h", "signs.cu"),
    "codebook.cu": ("numbers.h", "common.h", "tile.h", "codebook.cu"),
    "simple.cu": ("numbers.h", "common.h", "weights.h", "simple.cu"),
    "dequantize.cu": ("numbers.h", "common.h", "weights.h", "dequantize.cu"),
    "reduce.cu": ("numbers.h", "common.h", "reduce.cu"),
    "norm.cu": ("numbers.h", "norm.cu"),
    "gated.cu": ("numbers.h", "gated.cu"),
    "rotary.cu": ("numbers.h", "rotary.cu"),
}
ENTRIES = {
    "signs.cu": "multiply",
    "codebook.cu": "multiply",
    "simple.cu": "multiply",
    "dequantize.cu": "dequantize",
    "reduce.cu": "reduce",
    "norm.cu": "rms_norm",
    "gated.cu": "silu_mul",
    "rotary.cu": "rotate_into",
}
F32 = 2

MAX_COLUMN_TILES = 8
"""Products of 8 columns side by side in one pass; with 16 the registers of a thread would not do."""
NARROW_TILES = 4
"""The same where each column has levels of its own precision, or shared memory holds few activations."""
AMPLE_SHARED = 160 << 10
"""Bytes of shared memory from which MAX_COLUMN_TILES leaves a block warps enough."""

ACTIVATION_SHARE = 0.6
"""Share of shared memory that the quantized activations may take before the columns are split over blocks."""

DENSE_ROWS = {1: 128, 2: 128, 3: 128, 4: 128, 5: 96, 6: 96, 7: 64, 8: 64}
"""Precision -> rows of x from which dequantizing and cuBLAS take over. Estimated from bytes, not measured yet:
at 8192 x 28672 writing and reading the fp16 matrix takes about 220 us of an H200's bandwidth, and a pass of 32 rows
should take about 60."""
DENSE_ROWS_MIXED = 256
"""The same for rows of several precisions, where every stored precision costs a dense product."""


@dataclass(frozen=True)
class Device:
    """What of a GPU decides a launch: multiprocessors, and the bytes of shared memory that a block may have."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Tuning:
    """Choices that change speed but not results (masks changes the last digits); 0 means the default.

    warps of a block, stages of copies in flight, masks (signs.cu), blocks of a multiprocessor, splits of the
    columns; kernel: "" or "simple", "signs", "codebook".
    """

    warps: int = 0
    stages: int = 0
    masks: int = 0
    blocks: int = 0
    splits: int = 0
    kernel: str = ""


@dataclass(frozen=True)
class Kernel:
    """One compiled variant: a source and its macros."""

    source: str
    macros: tuple[tuple[str, int], ...]

    @property
    def entry(self) -> str:
        """The name of the function."""
        return ENTRIES[self.source]

    def text(self, device_header: str | None = None) -> str:
        """Return the whole source, beginning with csrc/cuda/device.h or with `device_header` in its place."""
        header = device_header if device_header is not None else source_text("device.h")
        defines = "".join(f"#define {name} {value}\n" for name, value in self.macros)
        return defines + header + "".join(source_text(part) for part in _PARTS[self.source])


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, and the numbers of common.h's Args that do not change from call to call."""

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    split_steps: int = 0

    def arguments(
        self,
        shape: Shape,
        rows: int,
        x_stride: int,
        pointers: tuple[int, int, int, int, int, int],
        steps: int = 0,
        more: Sequence[tuple[Shape, tuple[int, int, int, int]]] = (),
    ) -> bytes:
        """Return Args; pointers: x, planes, levels, wanted, row_scale, y; more: of further weights planes, levels,
        row_scale, y."""
        sizes = (x_stride, rows, shape.out_features, shape.in_features, shape.tiles, steps or shape.steps)
        groups = (self.split_steps, shape.groups, shape.group_units, shape.stored)
        tiles = shape.tiles + sum(part.tiles for part, _ in more)
        packed = struct.pack("<6Q11q", *pointers, *sizes, *groups, tiles)
        return packed + b"".join(struct.pack("<4Q2q", *at, part.out_features, part.tiles) for part, at in more)


@dataclass(frozen=True)
class Product:
    """How a product of up to `rows_at_once` rows runs; more rows are several passes."""

    launch: Launch
    rows_at_once: int
    splits: int
    walsh: bool

    def reduction(self, shape: Shape, rows: int, dtype: int) -> Launch:
        """Return the launch that adds the parts of a split product."""
        kernel = Kernel("reduce.cu", (("DTYPE", dtype),))
        return Launch(kernel, (ceil(rows * shape.out_features / 256), 1), 256, 0)


@cache
def source_text(name: str) -> str:
    """Return a file of csrc/cuda without its include guard."""
    return (FOLDER / name).read_text("utf-8").replace("#pragma once\n", "")


@cache
def tuning_from_environment(text: str, kernel: str) -> Tuning:
    """Read "warps=8,masks=1" and a kernel's name; raise AnybitsError naming what is unknown."""
    values = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in ("warps", "stages", "masks", "blocks", "splits") or not value.isdigit():
            raise AnybitsError(
                f"ANYBITS_CUDA_TUNING '{part}' is unknown: write warps, stages, masks, blocks or splits, = and a number"
            )
        values[name] = int(value)
    if values.get("masks", 0) not in (0, 1, 2, 4):
        raise AnybitsError(f"ANYBITS_CUDA_TUNING masks={values['masks']} is unknown: choose 1, 2 or 4")
    if kernel not in ("", "simple", "signs", "codebook"):
        raise AnybitsError(f"ANYBITS_CUDA_KERNEL={kernel} is unknown: choose simple, signs or codebook")
    return Tuning(**values, kernel=kernel)


def active_tuning() -> Tuning:
    """Return what ANYBITS_CUDA_TUNING and ANYBITS_CUDA_KERNEL ask for."""
    return tuning_from_environment(os.environ.get("ANYBITS_CUDA_TUNING", ""), os.environ.get("ANYBITS_CUDA_KERNEL", ""))


MAX_PARTS = 4
"""Weights that one launch multiplies x by."""


@cache
def together(
    shapes: tuple[Shape, ...], rows: int, dtype: int, precision: int, device: Device, tuning: Tuning
) -> Product:
    """Plan one launch for weights that share x; AnybitsError unless they are alike but for their rows."""
    first = shapes[0]
    if not 1 < len(shapes) <= MAX_PARTS or any(replace(s, out_features=first.out_features) != first for s in shapes):
        raise AnybitsError(f"one launch multiplies x by 2 to {MAX_PARTS} weights that differ in their rows alone")
    planned = product(first, rows, dtype, precision, device, tuning)
    launch, kernel = planned.launch, planned.launch.kernel
    if kernel.source == "simple.cu":
        raise AnybitsError("the plain kernel multiplies x by one weight")
    blocks = dict(kernel.macros)["BLOCKS"]
    grid = (_across(sum(s.tiles for s in shapes), device, blocks, planned.splits), planned.splits)
    fused = replace(kernel, macros=(*kernel.macros, ("PARTS", len(shapes))))
    return replace(planned, launch=replace(launch, kernel=fused, grid=grid))


@cache
def product(shape: Shape, rows: int, dtype: int, precision: int, device: Device, tuning: Tuning) -> Product:
    """Plan x `[rows, K]` @ W.T; dtype: of layout.DTYPES; precision 0: one for each row, read on the device."""
    top = precision or shape.precisions[-1]
    walsh = bool(shape.codebook) and top <= MAX_WALSH and tuning.kernel != "codebook"
    if tuning.kernel == "simple":
        return _simple(shape, rows, dtype, precision)
    if shape.codebook and not walsh:
        if tuning.kernel == "signs":
            raise AnybitsError(f"ANYBITS_CUDA_KERNEL=signs serves codebooks up to {MAX_WALSH} bits, not {top}")
        return _codebook(shape, rows, dtype, precision, device, tuning)
    return _signs(shape, rows, dtype, precision, device, tuning, walsh)


def _simple(shape: Shape, rows: int, dtype: int, precision: int) -> Product:
    macros = (("DTYPE", dtype), ("PLANES", precision), ("MIXED", int(not precision)), *_weight_macros(shape))
    launch = Launch(Kernel("simple.cu", macros), (ceil(rows * shape.out_features / 256), 1), 256, 0)
    return Product(launch, rows, 1, walsh=False)


def _weight_macros(shape: Shape) -> tuple[tuple[str, int], ...]:
    return (
        ("CODEBOOK", shape.codebook),
        ("LEVELS", shape.level_dtype),
        ("OFFSETS", shape.offsets),
        ("SUBGROUPS", shape.subgroups),
    )


def _column_tiles(columns: int, mixed: bool, device: Device) -> int:
    tiles, most = 1, NARROW_TILES if mixed or device.shared_bytes < AMPLE_SHARED else MAX_COLUMN_TILES
    while 8 * tiles < columns and tiles < most:
        tiles *= 2
    return tiles


def _signs(shape: Shape, rows: int, dtype: int, precision: int, device: Device, tuning: Tuning, walsh: bool) -> Product:
    mixed, top = not precision, precision or shape.precisions[-1]
    alike = mixed and rows == 1  # one row has one precision, if only the GPU knows it: levels travel with the planes
    masks = tuning.masks or (4 if rows <= 2 else 1)
    slices = 4 if masks == 4 else 2
    tiles = _column_tiles(rows * slices, mixed, device)
    rows = min(rows, 8 * tiles // slices)
    terms = (1 << top) - 1 if walsh else top
    in_ring = (alike or not mixed) and not shape.row_group
    level_bytes = (terms + shape.offsets) * (TILE << (1 + (shape.level_dtype == F32))) if in_ring else 0
    stage = top * TILE * STEP // 8 + 2 * shape.subgroups * level_bytes
    unit = rows * slices * (128 + 8 * shape.subgroups)
    wide = tiles <= 2 and tiles * terms * (1 if shape.subgroups == 1 else 2) <= 4 - shape.row_group
    room = _room(shape, device, tuning, stage, 2 * unit, rows, 0, wide)
    macros = (
        ("DTYPE", dtype), ("LEVELS", shape.level_dtype), ("OFFSETS", shape.offsets), ("PLANES", top),
        ("MIXED", int(mixed)), ("WALSH", int(walsh)), ("CODEBOOK", 0), ("COLUMN_TILES", tiles), ("SLICES", slices),
        ("MASKS", masks), ("SUBGROUPS", shape.subgroups), ("ROW_GROUP", shape.row_group), ("ALIKE", int(alike)),
        *room.macros(),
    )  # fmt: skip
    return room.product(Kernel("signs.cu", macros), shape, device, rows, walsh)


def _codebook(shape: Shape, rows: int, dtype: int, precision: int, device: Device, tuning: Tuning) -> Product:
    mixed, top = not precision, precision or shape.precisions[-1]
    slices = 2 if dtype == F32 else 1
    tiles = _column_tiles(rows * slices, mixed, device)
    rows = min(rows, 8 * tiles // slices)
    columns = rows * slices
    unit = columns * 256 + ceil(columns * 4 / 16) * 16
    table = 2 * (32 * shape.stored if mixed else 32 << top)
    stage = top * TILE * STEP // 8
    room = _room(shape, device, tuning, stage, 2 * unit, rows, table, wide=tiles <= 2 and top <= 4)
    macros = (
        ("DTYPE", dtype), ("PLANES", top), ("MIXED", int(mixed)), ("CODEBOOK", 1), ("COLUMN_TILES", tiles),
        ("SLICES", slices), *room.macros(),
    )  # fmt: skip
    return room.product(Kernel("codebook.cu", macros), shape, device, rows, walsh=False)


def _across(tiles: int, device: Device, blocks: int, splits: int) -> int:
    """Return the blocks that share `tiles`."""
    return min(tiles, max(1, ceil(device.multiprocessors * blocks / splits)))


@dataclass(frozen=True)
class _Room:
    """How the shared memory of a block is used."""

    warps: int
    stages: int
    blocks: int
    splits: int
    split_steps: int
    shared_bytes: int

    def macros(self) -> tuple[tuple[str, int], ...]:
        split = int(self.splits > 1)
        return (("WARPS", self.warps), ("BLOCKS", self.blocks), ("STAGES", self.stages), ("SPLIT", split))

    def product(self, kernel: Kernel, shape: Shape, device: Device, rows: int, walsh: bool) -> Product:
        grid = (_across(shape.tiles, device, self.blocks, self.splits), self.splits)
        launch = Launch(kernel, grid, self.warps * 32, self.shared_bytes, self.split_steps)
        return Product(launch, rows, self.splits, walsh)


def _room(
    shape: Shape, device: Device, tuning: Tuning, stage: int, step: int, rows: int, table: int, wide: bool
) -> _Room:
    """Divide a block's shared memory.

    stage: bytes of a warp's stage; step: bytes of a step's activations; table: bytes that are there in any case;
    wide: 16 warps have registers enough.
    """
    blocks = tuning.blocks or 1
    limit = device.shared_bytes // blocks - 1024 * (blocks > 1)  # 1 KB of every block is the system's
    splits = max(tuning.splits, ceil(step * shape.steps / (ACTIVATION_SHARE * limit)), 1)
    for parts in range(min(splits, shape.steps), shape.steps + 1):
        split_steps = ceil(shape.steps / parts)
        warps = tuning.warps or (16 if wide and blocks == 1 else 8)
        while warps > 1 and not tuning.warps and warps >= 2 * split_steps:
            warps //= 2
        while warps:
            fixed = split_steps * step + table + 2 * warps * rows * TILE * 4
            stages = tuning.stages or min(6, (limit - fixed) // (warps * stage))
            if stages >= (3 if warps > 4 else 2) and fixed + stages * warps * stage <= limit:
                return _Room(
                    warps, stages, blocks, ceil(shape.steps / split_steps), split_steps, fixed + stages * warps * stage
                )
            warps = 0 if tuning.warps or warps <= min(4, split_steps) else warps // 2
    raise AnybitsError(f"a product of {rows} rows does not fit into {limit} bytes of shared memory with this tuning")


@cache
def dequantization(shape: Shape, dtype: int, precision: int) -> Launch:
    """Plan W_p as `[N, K]` in dtype."""
    kernel = Kernel("dequantize.cu", (("DTYPE", dtype), ("PLANES", precision), *_weight_macros(shape)))
    return Launch(kernel, (ceil(shape.tiles * shape.steps / 8), 1), 256, 0)
