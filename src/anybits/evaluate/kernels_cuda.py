"""Times the CUDA kernels: graph replays over rotating copies, beside the copy bandwidth and cuBLAS of the same run."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from anybits.config import parse_precisions
from anybits.errors import AnybitsError
from anybits.evaluate.kernels import METHODS, KernelTiming, parse_shapes, random_weight
from anybits.kernels.cuda.backend import CudaBackend
from anybits.kernels.cuda.layout import CudaWeight
from anybits.weight import PlaneWeight

_BEYOND_CACHE = 512 << 20  # bytes that go by before a copy is read again; the largest L2 today holds 126 MB
_COPIED = 1 << 30
_CHECKED_ROWS = 256
LARGEST_ERROR = 4e-3  # bf16 results are rounded by 1.6e-3


def bench_cuda_kernels(
    shapes: str = "llama-3.1-8b",
    precisions: str = "2-4",
    rows: Sequence[int] = (1,),
    methods: Sequence[str] = METHODS,
    group_size: int = 128,
    rounds: int = 5,
    json_file: Path | None = None,
) -> Iterator[KernelTiming]:
    """Yield timings on the current GPU, as `bench_kernels` does on the CPU; bandwidth is that of a large copy.

    Every product is captured in a CUDA graph that goes through copies of the weight, and the graph is replayed:
    launch gaps and the L2 cache flatter or spoil nothing. json_file gets one JSON object a line, with the device.
    """
    wanted = parse_precisions(precisions)
    if unknown := sorted(set(methods) - set(METHODS)):
        raise AnybitsError(f"method '{unknown[0]}' is unknown: choose {' or '.join(METHODS)}")
    if not rows or min(rows) < 1 or rounds < 1:
        raise AnybitsError(f"rows {list(rows)} and rounds {rounds} must be at least 1")
    if not torch.cuda.is_available():
        raise AnybitsError("no NVIDIA GPU was found: choose --device cpu")
    facts, lines = environment(), []
    with torch.inference_mode():
        for shape in parse_shapes(shapes):
            bandwidth = copy_bandwidth()
            dense = {m: dense_seconds(shape, m, rounds) for m in rows}
            for method in methods:
                weight = random_weight(shape, method, wanted, group_size).to("cuda")
                copies = rotating(CudaBackend().prepare(weight), weight.weight_bytes(wanted[0]))
                for m in rows:
                    for p in wanted:
                        timing = time_product(weight, copies, m, p, method, rounds)
                        rate = timing.bytes / timing.us * 1e6
                        share, speedup = rate / bandwidth, dense[m] * 1e6 / timing.us
                        timing = replace(timing, bandwidth_share=round(share, 3), speedup_vs_bf16=round(speedup, 2))
                        copied = {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
                        lines.append(json.dumps(asdict(timing) | copied | facts))
                        yield timing
    if json_file is not None:
        json_file.write_text("\n".join(lines) + "\n")


def environment() -> dict[str, Any]:
    """Return what a figure depends on: device, driver, versions, commit."""
    from anybits.kernels.cuda import toolchain

    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _output(smi).split("\n")[0],
        "torch": torch.__version__,
        "nvrtc": ".".join(map(str, toolchain.compiler_version())),
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]),
    }


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def rotating(prepared: CudaWeight, least_bytes: int) -> list[CudaWeight]:
    """Return `prepared` and so many clones that reading `least_bytes` of each passes any cache."""
    count = max(2, min(256, math.ceil(_BEYOND_CACHE / least_bytes)))
    names = ("planes", "levels", "walsh", "row_scale")
    clones = [replace(prepared, **{n: getattr(prepared, n).clone() for n in names}) for _ in range(count - 1)]
    return [prepared, *clones]


def graph_seconds(run: Callable[[int], Any], copies: int, rounds: int) -> float:
    """Return the median seconds of one call of `run(copy)`, from replays of a graph that calls it for every copy."""
    calls = copies * math.ceil(16 / copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(copies, 3)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % copies)
    graph.replay()
    times = []
    for _ in range(max(rounds, 5)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Return bytes read and written a second by a copy on the GPU that no cache holds."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device="cuda").random_()
    to = torch.empty_like(source)
    return 2 * _COPIED / graph_seconds(lambda _: to.copy_(source), 1, 5)


def dense_seconds(shape: tuple[int, int], m: int, rounds: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return seconds of cuBLAS's product of m rows, weights rotating."""
    count = max(2, math.ceil(_BEYOND_CACHE / (2 * shape[0] * shape[1])))
    weights = [torch.randn(shape, dtype=dtype, device="cuda") for _ in range(count)]
    x = torch.randn(m, shape[1], dtype=dtype, device="cuda")
    return graph_seconds(lambda i: torch.nn.functional.linear(x, weights[i]), count, rounds)


def relative_error(y: torch.Tensor, x: torch.Tensor, weight: PlaneWeight, precision: int | torch.Tensor) -> float:
    """Return the relative L2 error of the first output rows against float64."""
    part = weight.rows(0, min(_CHECKED_ROWS, weight.out_features))
    rows = torch.full((x.shape[0],), precision) if isinstance(precision, int) else precision.cpu()
    wanted = x.new_empty(x.shape[0], part.out_features, dtype=torch.float64)
    for p in rows.unique().tolist():
        chosen = (rows == p).nonzero()[:, 0].to(x.device)
        wanted[chosen] = x[chosen].double() @ part.dequantize(p).double().t()
    return float((y[:, : part.out_features].double() - wanted).norm() / wanted.norm())


def time_product(
    weight: PlaneWeight, copies: Sequence[CudaWeight], m: int, precision: int, method: str, rounds: int
) -> KernelTiming:
    """Check, then time one product; shares of the bandwidth and of cuBLAS are left at 0 for the caller."""
    backend = CudaBackend()
    x = torch.randn(m, weight.in_features, dtype=torch.bfloat16, device="cuda")
    error = relative_error(backend.matmul(x, copies[0], precision), x, weight, precision)
    shape = (weight.out_features, weight.in_features)
    if not error < LARGEST_ERROR:
        raise AnybitsError(
            f"backend cuda is wrong by {error:.3g} at precision {precision} of {method} for "
            f"{shape[0]} x {shape[1]} and {m} rows: nothing is timed"
        )
    seconds = graph_seconds(lambda i: backend.matmul(x, copies[i], precision), len(copies), rounds)
    size = weight.weight_bytes(precision)
    return KernelTiming(
        shape, m, precision, method, backend.name, round(seconds * 1e6, 2), size, round(size / seconds / 1e9, 1),
        0.0, 0.0, error,
    )  # fmt: skip
