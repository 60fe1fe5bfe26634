"""The compiled CPU kernels (csrc/): finding the library, its instruction sets, what a packed weight says of itself."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from anybits.errors import AnybitsError

ISAS = ("portable", "avx2", "avx512", "neon", "amx")
"""Instruction sets by the number that csrc/anybits.h gives them."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of activations by the number that csrc/anybits.h gives them."""

AFFINE, CODEBOOK = 0, 1
"""Kinds of levels, likewise."""


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


def check(status: int) -> None:
    """Raise AnybitsError unless `status` is 0."""
    if status:
        raise AnybitsError(f"the CPU kernels refused a weight or its shape (status {status})")


@dataclass(frozen=True)
class Header:
    """The first fields of csrc/blob.h's Header that Python needs."""

    isa: int
    affine: bool
    out_features: int
    in_features: int
    whole_blocks: bool  # affine: 128 columns share a scale of the activations
    precisions: tuple[int, ...]


def header_of(blob: torch.Tensor) -> Header:
    """Return what packed weight `blob` (uint8) says of itself."""
    if blob.numel() < 64:
        raise AnybitsError(f"a packed weight of {blob.numel()} bytes cannot be one")
    fields = struct.unpack("<Q4i3qiI", blob[:56].numpy().tobytes())
    _, isa, levels, _, _, n, k, group, planes, mask = fields
    whole = group % 128 == 0 or group % 32 != 0
    return Header(isa, levels == AFFINE, n, k, whole, tuple(p for p in range(1, planes + 1) if mask >> p & 1))
