"""Times the kernels: correctness first, every figure beside the read bandwidth and the bf16 product of the same run."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anybits import bits
from anybits.config import parse_precisions
from anybits.errors import AnybitsError
from anybits.kernels import backend as kernels
from anybits.kernels import cpu, native
from anybits.quantize.steps import in_steps
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, group_count

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-3.1-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3.3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "qwen3-32b": ((8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600)),
    "llama-3.2-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "qwen3-4b": ((4096, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (2560, 9728)),
    "qwen3-0.6b": ((2048, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (1024, 3072)),
}
"""The linear layers `[N, K]` of a decoder block, each distinct shape once."""

METHODS = ("anybcq", "any-precision")
TIMED = (*METHODS, "anybcq-8bit")
"""What can be timed on the CPU: methods as they are stored by default, and AnyBCQ with scales in 8 bits."""
_BEYOND_CACHE = 128 << 20  # bytes of copies that are read in turn, so that none waits in a cache
_BANDWIDTH_BYTES = 256 << 20
_CHECKED_ROWS = 256
_LARGEST_ERROR = 2e-2


@dataclass(frozen=True)
class KernelTiming:
    """One line of the result: medians; bytes are planes and levels read, bandwidth_share of the same run's reading."""

    shape: tuple[int, int]
    m: int
    precision: int
    method: str
    backend: str
    us: float
    bytes: int
    gb_per_s: float
    bandwidth_share: float
    speedup_vs_bf16: float
    error: float
    activation_bits: int = 16


@dataclass(frozen=True)
class _Candidate:
    method: str
    precision: int
    backend: str
    bytes: int
    error: float
    run: Callable[[], Any]


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Read a name of SHAPES, or "4096x4096,1024x4096" as (N, K) pairs; raise AnybitsError otherwise."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        shapes = tuple((int(n), int(k)) for n, k in (part.split("x") for part in text.split(",")))
    except ValueError:
        shapes = ()
    if not shapes or any(n < 1 or k < 1 for n, k in shapes):
        raise AnybitsError(f"shapes '{text}' are unknown: choose {', '.join(SHAPES)}, or write NxK,NxK")
    return shapes


def bench_kernels(
    shapes: str = "llama-3.1-8b",
    precisions: str = "2-4",
    rows: Sequence[int] = (1,),
    methods: Sequence[str] = METHODS,
    group_size: int = 128,
    rounds: int = 5,
    json_file: Path | None = None,
) -> Iterator[KernelTiming]:
    """Yield timings of every shape, row count, method and precision on the CPU; the body of `anybits bench`.

    Each round measures the read bandwidth, torch's bf16 product and every kernel one after another, so that
    all ratios come from the same minutes of the same machine. A kernel whose result is wrong raises
    AnybitsError instead of being timed. json_file gets one JSON object a line.
    """
    wanted = parse_precisions(precisions)
    if unknown := sorted(set(methods) - set(TIMED)):
        raise AnybitsError(f"method '{unknown[0]}' is unknown: choose {' or '.join(TIMED)}")
    if not rows or min(rows) < 1 or rounds < 1:
        raise AnybitsError(f"rows {list(rows)} and rounds {rounds} must be at least 1")
    pairs = parse_shapes(shapes)
    lines = []
    with torch.inference_mode():
        memory = cpu.allocate(_BANDWIDTH_BYTES).zero_()
        for shape in pairs:
            weights = {method: random_weight(shape, method, wanted, group_size) for method in methods}
            for m in rows:
                for timing in _time_shape(shape, m, weights, wanted, rounds, memory):
                    lines.append(json.dumps(asdict(timing)))
                    yield timing
    if json_file is not None:
        json_file.write_text("\n".join(lines) + "\n")


def bench_on(device: str) -> Callable[..., Iterator[KernelTiming]]:
    """Return the benchmark of `device`, "cpu" or "cuda", raising AnybitsError for another."""
    if device == "cuda":
        from anybits.evaluate.kernels_cuda import bench_cuda_kernels

        return bench_cuda_kernels
    if device != "cpu":
        raise AnybitsError(f"device '{device}' is unknown: choose cpu or cuda")
    return bench_kernels


def random_weight(
    shape: tuple[int, int], method: str, precisions: Sequence[int], group_size: int = 128, device: str = "cpu"
) -> PlaneWeight:
    """Return random planes `[P, N, ceil(K/32)]` with levels for `precisions`; method: one of TIMED."""
    n, k = shape
    with torch.device(device):
        planes = torch.randint(-(2**31), 2**31 - 1, (max(precisions), n, bits.words(k)), dtype=torch.int32)
        if method == "any-precision":
            return PlaneWeight(planes, k, CodebookLevels({p: torch.randn(n, 2**p).half() for p in precisions}))
        groups = group_count(group_size, k)
        scales = {p: (torch.rand(p, n, groups) * 0.1).half() for p in precisions}
        levels = AffineLevels(group_size, scales, {p: (torch.randn(n, groups) * 0.05).half() for p in precisions})
    return PlaneWeight(planes, k, in_steps(levels) if method == "anybcq-8bit" else levels)


def read_bandwidth(memory: torch.Tensor) -> float:
    """Return bytes a second of reading `memory`, uint8, with torch's number of threads."""
    library = native.library()
    if library is None:
        start = time.perf_counter()
        memory.view(torch.int64).sum()
        return memory.numel() / (time.perf_counter() - start)
    return memory.numel() / float(library.read_seconds(memory.data_ptr(), memory.numel(), torch.get_num_threads()))


def _time_shape(
    shape: tuple[int, int],
    m: int,
    weights: dict[str, PlaneWeight],
    precisions: Sequence[int],
    rounds: int,
    memory: torch.Tensor,
) -> Iterator[KernelTiming]:
    x = torch.randn(m, shape[1]).bfloat16()
    candidates = [c for method, weight in weights.items() for c in _candidates(method, weight, x, precisions)]
    dense = [torch.randn(shape).bfloat16() for _ in range(copies_beyond_cache(2 * shape[0] * shape[1]))]
    turn = iter(range(1 << 62))
    bf16 = [lambda: torch.nn.functional.linear(x, dense[next(turn) % len(dense)])]
    runs = bf16 + [c.run for c in candidates]
    seconds: list[list[float]] = [[] for _ in runs]
    bandwidths = []
    for _ in range(rounds):
        bandwidths.append(read_bandwidth(memory))
        for run, times in zip(runs, seconds, strict=True):
            times += times_of(run)
    bandwidth, reference = statistics.median(bandwidths), statistics.median(seconds[0])
    for c, times in zip(candidates, seconds[1:], strict=True):
        median = statistics.median(times)
        rate = c.bytes / median
        yield KernelTiming(
            shape, m, c.precision, c.method, c.backend, round(median * 1e6, 1), c.bytes, round(rate / 1e9, 2),
            round(rate / bandwidth, 3), round(reference / median, 2), c.error,
            cpu.CpuBackend().activation_bits(),
        )  # fmt: skip


def check_kernels(weight: PlaneWeight, method: str, precisions: Sequence[int]) -> None:
    """Raise AnybitsError when a product of one bfloat16 row with `weight`, on its device, is wrong at any precision."""
    x = torch.randn(1, weight.in_features, device=weight.planes.device).bfloat16()
    for _ in _candidates(method, weight, x, precisions, 1):
        pass


def _candidates(
    method: str, weight: PlaneWeight, x: torch.Tensor, precisions: Sequence[int], count: int | None = None
) -> Iterator[_Candidate]:
    """Yield what to time at each precision; count: copies to read in turn, None for as many as exceed the caches.

    Products at a precision for each row, which decode steps on a GPU run, must be right as well.
    """
    backend = kernels.choose(weight, x.device)
    count = count or copies_beyond_cache(weight.weight_bytes(precisions[-1]))
    copies = [backend.prepare(weight) for _ in range(count)]
    for p in precisions:
        rows = torch.full((x.shape[0],), p, dtype=torch.int32, device=x.device)
        error = max(_error(backend.matmul(x, copies[0], q), x, weight, p) for q in (p, rows))
        if not error < _LARGEST_ERROR:
            raise AnybitsError(
                f"backend {backend.name} is wrong by {error:.3g} at precision {p} of {method} for "
                f"{weight.out_features} x {weight.in_features}: nothing is timed"
            )
        turn = iter(range(1 << 62))

        def run(p: int = p, turn: Iterator[int] = turn) -> torch.Tensor:
            return backend.matmul(x, copies[next(turn) % len(copies)], p)

        yield _Candidate(method, p, backend.name, weight.weight_bytes(p), error, run)


def _error(y: torch.Tensor, x: torch.Tensor, weight: PlaneWeight, precision: int) -> float:
    """Return the relative L2 error of the first output rows against float64."""
    rows = weight.rows(0, min(_CHECKED_ROWS, weight.out_features))
    wanted = x.double() @ rows.dequantize(precision).double().t()
    return float((y[:, : rows.out_features].double() - wanted).norm() / wanted.norm())


def copies_beyond_cache(size: int) -> int:
    """Return how many copies of `size` bytes to read in turn so that none waits in a cache."""
    return min(1024, math.ceil(_BEYOND_CACHE / size))


def times_of(run: Callable[[], Any], least: int = 5, budget: float = 0.05) -> list[float]:
    """Return seconds of single calls: one to warm up, then at least `least` and about `budget` seconds' worth."""
    times: list[float] = []
    run()
    while len(times) < least or (sum(times) < budget and len(times) < 100):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times
