"""The two papers' own kernels, where their extensions are installed: the same weights, in their layouts, and checked.

Both launch on CUDA's default stream, which a graph cannot capture. So they are timed, and ours again beside them, as a
queue of launches that waits behind a pause on the GPU: Python's calls are over before the first of them starts.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from anybits import bits
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight

PAUSE = 40_000_000  # clock cycles: some 20 ms, longer than the calls of one measurement take
MOST_CALLS = 400  # the GPU's queue holds about a thousand launches
LARGEST_ERROR = 2e-2  # both add in fp16


@dataclass(frozen=True)
class Rival:
    """A published kernel: its extension module, what it multiplies, and how to get it."""

    name: str
    module: str
    method: str
    most_rows: int
    get: str
    pack: Callable[[PlaneWeight], dict[int, tuple[torch.Tensor, ...]]]
    run: Callable[[ModuleType, torch.Tensor, tuple[torch.Tensor, ...], int], torch.Tensor]

    def found(self) -> ModuleType | str:
        """Return the extension, or one line that says it was not found and how to get it."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.name}'s kernels were not found ({error}): {self.get}"


def permute(words: torch.Tensor) -> torch.Tensor:
    """Turn our int32 words `[N, K/32]` of one plane into Any-Precision's: docs/interop.md has the order to the bit."""
    rows, count = words.shape
    columns = bits.unpack(words, count * 32).view(rows, count * 4, 8)
    octets = (columns << torch.arange(7, -1, -1, dtype=torch.uint8, device=words.device)).sum(-1).to(torch.uint8)
    parts = []
    for start in range(0, count, 32):
        threads = min(32, count - start)
        dealt = octets[:, 4 * start : 4 * (start + threads)].view(rows, 4, threads)  # byte 3 - q of thread t's word
        parts.append(dealt.transpose(1, 2).flip(-1).reshape(rows, -1))
    return torch.cat(parts, 1).contiguous().view(torch.int32)


def pack_any_precision(weight: PlaneWeight) -> dict[int, tuple[torch.Tensor, ...]]:
    """Return precision -> (planes int32 `[P, N, K/32]`, centroids fp16 `[N, 2^p]`)."""
    assert isinstance(weight.levels, CodebookLevels)
    planes = torch.stack([permute(plane) for plane in weight.planes])
    return {p: (planes, centroids.half().contiguous()) for p, centroids in weight.levels.centroids.items()}


def run_any_precision(module: ModuleType, x: torch.Tensor, packed: tuple[torch.Tensor, ...], p: int) -> torch.Tensor:
    return module.matmul_kbit(x, *packed, p)


def pack_anybcq(weight: PlaneWeight) -> dict[int, tuple[torch.Tensor, ...]]:
    """Return precision -> (planes int32 `[K/32, P, N]`, scales fp16 `[K/g, p, N]`, offsets `[K/g, N]`, an output)."""
    levels = weight.levels
    assert isinstance(levels, AffineLevels)
    assert levels.offsets is not None
    planes = weight.planes.permute(2, 0, 1).contiguous()
    output = torch.zeros(1, 1, weight.out_features, dtype=torch.float16, device=planes.device)
    return {
        p: (planes, scales.half().permute(2, 0, 1).contiguous(), levels.offsets[p].half().t().contiguous(), output)
        for p, scales in levels.scales.items()
    }


def run_anybcq(module: ModuleType, x: torch.Tensor, packed: tuple[torch.Tensor, ...], p: int) -> torch.Tensor:
    """The kernel adds to its output, so clearing that is part of a product."""
    planes, scales, offsets, output = packed
    output.zero_()
    group = 32 * planes.shape[0] // scales.shape[0]
    module.anybcq_gemv(x.view(1, 1, -1), output, planes, scales, offsets, p, planes.shape[1], group)
    return output.view(1, -1)


RIVALS = (
    Rival(
        "Any-Precision", "any_precision_ext", "any-precision", 8,
        "clone github.com/SNU-ARC/any-precision-llm and run pip install . in any_precision/modules/kernels",
        pack_any_precision, run_any_precision,
    ),
    Rival(
        "AnyBCQ", "custom_kernel", "anybcq", 1,
        "clone github.com/naver-aics/anybcq and build the extension of anybcq/inference/plugin as its README says",
        pack_anybcq, run_anybcq,
    ),
)  # fmt: skip


def copies_of(packed: tuple[torch.Tensor, ...], count: int) -> list[tuple[torch.Tensor, ...]]:
    """Return `packed` and clones of it, `count` in all."""
    return [packed, *(tuple(t.clone() for t in packed) for _ in range(count - 1))]


def queued_seconds(run: Callable[[int], Any], copies: int, rounds: int = 5) -> float:
    """Return the median seconds of one call of `run(copy)` on the default stream, from launches that were queued."""
    calls = copies * max(1, math.ceil(64 / copies))
    calls = min(calls, MOST_CALLS)
    for i in range(min(copies, 3)):
        run(i)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE)
        begin.record()
        for i in range(calls):
            run(i % copies)
        waited = not begin.query()
        end.record()
        end.synchronize()
        if waited:  # else Python was slower than the pause, and its calls were timed
            times.append(begin.elapsed_time(end) / 1e3 / calls)
    if not times:
        raise RuntimeError("launches were slower than the pause before them: nothing is timed")
    return statistics.median(times)


def relative_error(y: torch.Tensor, x: torch.Tensor, weight: PlaneWeight, precision: int) -> float:
    """Return the relative L2 error of `y` `[M, N]` in the first 256 outputs against float64."""
    part = weight.rows(0, min(256, weight.out_features))
    wanted = x.double() @ part.dequantize(precision).double().t()
    return float((y[:, : part.out_features].double() - wanted).norm() / wanted.norm())


def time_rival(
    rival: Rival, module: ModuleType, weight: PlaneWeight, m: int, precision: int, count: int, seconds: Any
) -> dict[str, Any]:
    """Return error and microseconds of a product of `m` fp16 rows; a wrong one is not timed.

    count: copies of the weight to go through; seconds: `queued_seconds`, or what a test puts in its place.
    """
    packed = rival.pack(weight)[precision]
    x = torch.randn(m, weight.in_features, dtype=torch.float16, device=weight.planes.device)
    error = relative_error(rival.run(module, x, packed, precision), x, weight, precision)
    if not error < LARGEST_ERROR:
        return {"error": error, "ok": False, "us": None}
    copies: Sequence[tuple[torch.Tensor, ...]] = copies_of(packed, count)
    us = seconds(lambda i: rival.run(module, x, copies[i], precision), count) * 1e6
    return {"error": error, "ok": True, "us": us}
