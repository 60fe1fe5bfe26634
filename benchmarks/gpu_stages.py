"""The measurements of benchmarks/gpu.py, which runs this in a process of its own and again behind what ended it."""

from __future__ import annotations

import argparse
import itertools
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import gpu
import gpu_report
import gpu_rivals
import torch
from gpu_run import Run, environment

from anybits.errors import AnybitsError
from anybits.evaluate import end_to_end_cuda
from anybits.evaluate import kernels_cuda as timing
from anybits.evaluate.kernels import SHAPES, random_weight
from anybits.kernels.cuda import backend as cuda
from anybits.kernels.cuda import gpu as gpus
from anybits.kernels.cuda import plan, toolchain
from anybits.kernels.cuda.layout import Shape
from anybits.weight import PlaneWeight

METHODS = ("anybcq", "any-precision")
MODEL = "llama-3.1-8b"
LARGE = SHAPES["llama-3.1-8b"] + SHAPES["llama-3.3-70b"]
CHECKED_SHAPE, MIXED_SHAPE = (4096, 4096), (8192, 28672)
TUNED_SHAPES = ((4096, 14336), (8192, 28672))
TUNINGS = [
    f"masks={masks},warps={warps},blocks={blocks}" + (f",stages={stages}" if stages else "")
    for masks, (warps, blocks), stages in itertools.product((1, 2, 4), ((16, 1), (8, 1), (8, 2), (4, 4)), (0, 3))
]


def compile_all(shapes: set, rows: tuple[int, ...], precisions: tuple[int, ...], tunings: list[plan.Tuning]) -> None:
    """Compile what a stage needs on all cores at once; the cache on disk keeps it."""
    kernels, gpu_ = set(), gpus.of(torch.cuda.current_device())
    for shape, m, p, tuning in itertools.product(shapes, rows, precisions, tunings):
        try:
            planned = plan.product(shape, m, 1, p, gpu_.device, tuning)
        except AnybitsError:
            continue  # a tuning that does not fit this shape
        kernels |= {planned.launch.kernel, planned.reduction(shape, m, 1).kernel}
        if p:
            kernels.add(plan.dequantization(shape, 1, p).kernel)
    toolchain.compile_ahead(kernels, gpu_.arch)


class Weights:
    """Random weights on the GPU and their rotating copies, one shape at a time."""

    def __init__(self) -> None:
        self._key: tuple | None = None

    def forget(self) -> None:
        """Let the memory go."""
        self._key, self._kept = None, None
        torch.cuda.empty_cache()

    def get(self, shape: tuple[int, int], method: str, precisions: tuple[int, ...]) -> tuple[PlaneWeight, list]:
        if self._key != (shape, method, precisions):
            self.forget()
            weight = random_weight(shape, method, precisions, device="cuda")
            self._kept = weight, timing.rotating(cuda.prepare(weight), weight.weight_bytes(precisions[0]))
            self._key = (shape, method, precisions)
        return self._kept


def seconds_of(copies: list, m: int, precision: int | torch.Tensor) -> float:
    x = torch.randn(m, copies[0].shape.in_features, dtype=torch.bfloat16, device="cuda")
    backend = cuda.CudaBackend()
    return timing.graph_seconds(lambda i: backend.matmul(x, copies[i], precision), len(copies), 5)


@dataclass(frozen=True)
class RateKernel:
    """A kernel of nothing but one tensor-core instruction: how fast it can be at all."""

    instruction: str
    width: int  # columns of the first operand
    registers: tuple[int, int]  # of the two operands
    float_sums: bool = False
    source: str = "rate.cu"
    entry: str = "rate"
    macros: tuple = ()

    def text(self) -> str:
        sums, first = ["%0", "%1", "%2", "%3"], [f"%{4 + i}" for i in range(self.registers[0])]
        second = [f"%{4 + self.registers[0] + i}" for i in range(self.registers[1])]
        operands = ", ".join("{" + ",".join(part) + "}" for part in (sums, first, second, sums))
        kind, letter = ("float", "f") if self.float_sums else ("int", "r")
        outputs = ", ".join(f'"+{letter}"(c[j][{i}])' for i in range(4))
        inputs = ", ".join(f'"r"(v[{i}])' for i in range(sum(self.registers)))
        return f"""extern "C" __global__ void rate(int *out) {{
            unsigned v[6];
            for (int i = 0; i < 6; i++) v[i] = threadIdx.x * 2654435761u >> i & 0x3c003c00u;
            {kind} c[8][4] = {{}};
            for (int n = 0; n < 1024; n++)
            #pragma unroll
                for (int j = 0; j < 8; j++) asm volatile("{self.instruction} {operands};" : {outputs} : {inputs});
            {kind} sum = 0;
            for (int j = 0; j < 8; j++) for (int i = 0; i < 4; i++) sum += c[j][i];
            out[blockIdx.x * blockDim.x + threadIdx.x] = (int)sum;
        }}"""


RATES = {
    "8-bit": RateKernel("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", 32, (4, 2)),
    "1-bit": RateKernel("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc", 128, (2, 1)),
    "1-bit, wide": RateKernel("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc", 256, (4, 2)),
    "fp16": RateKernel("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 16, (4, 2), float_sums=True),
}


def rates(run: Run, weights: Weights) -> None:
    """Products a second of each instruction: 16 x 8 x width multiply-adds each."""
    gpu = gpus.of(torch.cuda.current_device())
    blocks, threads = 2 * gpu.device.multiprocessors, 512
    out = torch.zeros(blocks * threads, dtype=torch.int32, device="cuda")
    for name, kernel in RATES.items():
        if run.have(stage="rates", name=name) or run.late():
            continue
        with run.doing(stage="rates", name=name):
            launch = plan.Launch(kernel, (blocks, 1), threads, 0)
            arguments = struct.pack("<Q", out.data_ptr())
            us = timing.graph_seconds(lambda _, at=launch, a=arguments: gpus.launch(gpu, at, a), 1, 5) * 1e6
            products = blocks * threads / 32 * 8 * 1024 / us * 1e6
            bits = products * 16 * kernel.width  # plane bits that meet 8 columns
            run.add(stage="rates", name=name, us=us, tera_multiply_adds=products * 128 * kernel.width / 1e12,
                    tera_bits_at_8_columns=bits / 1e12)  # fmt: skip


def check(run: Run, weights: Weights) -> None:
    """Errors against float64 at a large shape; the plain kernel tells a wrong kernel from a wrong layout."""
    precisions, rows = tuple(range(2, 9)), (1, 4, 16, 64)
    for method in METHODS:
        wanted = list(itertools.product(rows, (*precisions, 0)))
        keys = [{"stage": "check", "method": method, "m": m, "precision": p} for m, p in wanted]
        if run.late() or all(run.have(**key) for key in keys):
            continue
        with run.doing(stage="check", method=method):
            weight, copies = weights.get(CHECKED_SHAPE, method, precisions)
            compile_all({copies[0].shape}, rows, (0, *precisions), [plan.Tuning()])
            for key, (m, p) in zip(keys, wanted, strict=True):
                if not run.have(**key) and not run.late():
                    with run.doing(**key):
                        run.add(**key, **checked(weight, copies[0], precisions, m, p))


def checked(weight: PlaneWeight, prepared: Any, precisions: tuple[int, ...], m: int, p: int) -> dict[str, Any]:
    backend = cuda.CudaBackend()
    x = torch.randn(m, weight.in_features, dtype=torch.bfloat16, device="cuda")
    wanted = p or torch.tensor([precisions[i % 7] for i in range(m)], dtype=torch.int32, device="cuda")
    y = backend.matmul(x, prepared, wanted)
    same = all(torch.equal(backend.matmul(x, prepared, wanted), y) for _ in range(9))
    error = timing.relative_error(y, x, weight, wanted)
    line = {"error": error, "ten_runs_equal": same, "ok": error < timing.LARGEST_ERROR and same}
    if not line["ok"]:
        with environment(ANYBITS_CUDA_KERNEL="simple"):
            y = backend.matmul(x, prepared, wanted)
        line["simple_error"] = timing.relative_error(y, x, weight, wanted)
        print("WRONG", m, p, line, flush=True)
    return line


def timed(run: Run, weights: Weights, stage: str, shapes: tuple, rows: tuple[int, ...], precisions: tuple) -> None:
    """Products against cuBLAS and the copy bandwidth, correctness first."""
    for shape, method in itertools.product(shapes, METHODS):
        wanted = [(m, p) for m in rows for p in precisions]
        keys = [{"stage": stage, "shape": shape, "method": method, "m": m, "precision": p} for m, p in wanted]
        if run.late() or all(run.have(**key) for key in keys):
            continue
        with run.doing(stage=stage, shape=shape, method=method):
            weight, copies = weights.get(shape, method, precisions)
            compile_all({copies[0].shape}, rows, precisions, [plan.Tuning()])
            for key in keys:
                if not run.have(**key) and not run.late():
                    with run.doing(**key):
                        run.add(**key, **time_one(run, weight, copies, key))


def time_one(run: Run, weight: PlaneWeight, copies: list, key: dict[str, Any]) -> dict[str, Any]:
    shape, method, m, p = key["shape"], key["method"], key["m"], key["precision"]
    kernel = "codebook" if method == METHODS[1] and p > 3 else "signs"
    # In "rows" past the cross-over too, where the default would take the dense path.
    with environment(ANYBITS_CUDA_KERNEL=kernel) if key["stage"] == "rows" else nullcontext():
        found = timing.time_product(weight, copies, m, p, method, 5)
    dense = cublas(run, shape, m)
    share = found.bytes / found.us * 1e6 / run.bandwidth
    line = {"us": found.us, "bytes": found.bytes, "bandwidth_share": round(share, 3)}
    line |= {"speedup_vs_bf16": round(dense / found.us, 2), "error": found.error}
    if m > 1:  # what dequantizing and cuBLAS would have taken
        line["dense_path_us"] = dense_path(copies, m, p) * 1e6
    return line


def cublas(run: Run, shape: tuple[int, int], m: int) -> float:
    """Microseconds of the bf16 product."""
    key = {"stage": "cublas", "shape": shape, "m": m}
    if not run.have(**key):
        run.add(**key, us=timing.dense_seconds(shape, m, 5) * 1e6)
    return run.have(**key)["us"]


def dense_path(copies: list, m: int, p: int) -> float:
    x = torch.randn(m, copies[0].shape.in_features, dtype=torch.bfloat16, device="cuda")
    return timing.graph_seconds(lambda i: cuda._dense(x, copies[i], p, None), min(len(copies), 8), 5)


def mixed(run: Run, weights: Weights) -> None:
    """A batch of mixed precisions against the same batch at its highest."""
    for method, m in itertools.product(METHODS, (4, 8, 16)):
        key = {"stage": "mixed", "shape": MIXED_SHAPE, "method": method, "m": m}
        if run.have(**key) or run.late():
            continue
        with run.doing(**key):
            _, copies = weights.get(MIXED_SHAPE, method, (2, 3, 4))
            compile_all({copies[0].shape}, (m,), (0, 4), [plan.Tuning()])
            rows = torch.tensor([2 + i % 3 for i in range(m)], dtype=torch.int32, device="cuda")
            us, highest = seconds_of(copies, m, rows) * 1e6, seconds_of(copies, m, 4) * 1e6
            run.add(**key, us=us, highest_us=highest, ratio=round(us / highest, 3))


def tune(run: Run, weights: Weights) -> None:
    """Every tuning of signs.cu at one row."""
    for shape, p in itertools.product(TUNED_SHAPES, (2, 3, 4)):
        group = {"stage": "tune", "shape": shape, "precision": p}
        names = [name for name in TUNINGS if not run.have(**group, tuning=name)]
        if not names or run.late():
            continue
        with run.doing(**group):
            _, copies = weights.get(shape, "anybcq", (2, 3, 4))
            sizes = copies[0].shape
            compile_all({sizes}, (1,), (p,), [plan.tuning_from_environment(name, "") for name in names])
            for name in names:
                if run.late():
                    return
                with run.doing(**group, tuning=name), environment(ANYBITS_CUDA_TUNING=name):
                    us = None if (why := does_not_fit(sizes, p)) else seconds_of(copies, 1, p) * 1e6
                    share = us and round(sizes.tiles * 16 * shape[1] * p / 8 / us * 1e6 / run.bandwidth, 3)
                    run.add(**group, tuning=name, us=us, plane_share=share, why=why)


def does_not_fit(sizes: Shape, p: int) -> str | None:
    """Return why a tuning cannot run one row."""
    try:
        device = gpus.of(torch.cuda.current_device()).device
        plan.product(sizes, 1, 1, p, device, plan.active_tuning())
    except AnybitsError as error:
        return str(error)
    return None


GROUPS = {"query, key, value": ((4096, 4096), (1024, 4096), (1024, 4096)), "gate, up": ((14336, 4096), (14336, 4096))}


def together(run: Run, weights: Weights) -> None:
    """Weights that share x in one launch against a launch each, at one precision and at one for each row."""
    weights.forget()
    for (name, shapes), method in itertools.product(GROUPS.items(), METHODS):
        wanted = [(m, p) for m in (1, 4, 16) for p in (2, 4, 0)]
        keys = [{"stage": "together", "name": name, "method": method, "m": m, "precision": p} for m, p in wanted]
        if run.late() or all(run.have(**key) for key in keys):
            continue
        with run.doing(stage="together", name=name, method=method):
            made = [random_weight(shape, method, (2, 3, 4), device="cuda") for shape in shapes]
            least = sum(weight.weight_bytes(2) for weight in made)
            copies = list(zip(*(timing.rotating(cuda.prepare(weight), least) for weight in made), strict=True))
            compile_together(tuple(one.shape for one in copies[0]), wanted)
            for key, (m, p) in zip(keys, wanted, strict=True):
                if not run.have(**key) and not run.late():
                    with run.doing(**key):
                        run.add(**key, **together_and_apart(copies, m, p))


def compile_together(shapes: tuple[Shape, ...], wanted: list[tuple[int, int]]) -> None:
    gpu_ = gpus.of(torch.cuda.current_device())
    compile_all(set(shapes), tuple({m for m, _ in wanted}), tuple({p for _, p in wanted}), [plan.Tuning()])
    kernels = {plan.together(shapes, m, 1, p, gpu_.device, plan.Tuning()).launch.kernel for m, p in wanted}
    toolchain.compile_ahead(kernels, gpu_.arch)


def together_and_apart(copies: list, m: int, p: int) -> dict[str, Any]:
    backend = cuda.CudaBackend()
    x = torch.randn(m, copies[0][0].shape.in_features, dtype=torch.bfloat16, device="cuda")
    at = p or torch.tensor([2 + i % 3 for i in range(m)], dtype=torch.int32, device="cuda")
    apart = [backend.matmul(x, one, at) for one in copies[0]]
    same = all(torch.equal(a, b) for a, b in zip(backend.products(x, copies[0], at), apart, strict=True))
    if not same:
        raise AnybitsError("one launch and separate ones give other bits: nothing is timed")
    one = timing.graph_seconds(lambda i: backend.products(x, copies[i], at), len(copies), 5)
    each = timing.graph_seconds(lambda i: [backend.matmul(x, weight, at) for weight in copies[i]], len(copies), 5)
    return {"us": one * 1e6, "apart_us": each * 1e6, "ratio": round(one / each, 3), "same_bits": same}


def end_to_end(run: Run, weights: Weights) -> None:
    """Whole decode steps of an 8B model of random weights, beside the same model in bf16, all captured."""
    weights.forget()
    precisions = (2, 3, 4)
    for method in METHODS:
        key = {"stage": "e2e", "model": MODEL, "method": method, "context": 512}
        last = {"precision": 0, "graph": "shared"}  # the line that is written last
        if run.have(**key, **last) or run.late():
            continue
        with run.doing(**key):
            for step in end_to_end_cuda.bench_decoding_cuda(
                key["model"], ",".join(map(str, precisions)), (512,), method, facts={}, bandwidth=run.bandwidth
            ):
                run.add(stage="e2e", **asdict(step))
        torch.cuda.empty_cache()


def rivals(run: Run, weights: Weights) -> None:
    """The papers' own kernels and ours on fp16 rows, the launches of each queued behind a pause."""
    for rival in gpu_rivals.RIVALS:
        module = rival.found()
        if isinstance(module, str):
            print(module, flush=True)
            continue
        for shape, p in itertools.product(LARGE, (2, 3, 4)):
            for m in (m for m in (1, 4, 8) if m <= rival.most_rows):
                key = {"stage": "rivals", "name": rival.name, "shape": shape, "m": m, "precision": p}
                if run.have(**key) or run.late():
                    continue
                with run.doing(**key):
                    weight, copies = weights.get(shape, rival.method, (2, 3, 4))
                    count = min(len(copies), gpu_rivals.MOST_CALLS // 2)
                    line = gpu_rivals.time_rival(rival, module, weight, m, p, count, gpu_rivals.queued_seconds)
                    ours = queued_ours(copies, m, p, count)
                    line |= {"our_us": ours * 1e6, "our_gain": line["us"] and round(line["us"] / ours / 1e6, 3)}
                    run.add(**key, **line)


def queued_ours(copies: list, m: int, p: int, count: int) -> float:
    x = torch.randn(m, copies[0].shape.in_features, dtype=torch.float16, device="cuda")
    backend = cuda.CudaBackend()
    return gpu_rivals.queued_seconds(lambda i: backend.matmul(x, copies[i], p), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="*", choices=gpu.STAGES, default=gpu.STAGES)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none here")
    why = toolchain.unsupported(torch.cuda.get_device_capability())
    if why:
        sys.exit(f"the CUDA backend cannot run here: {why}")
    run = Run(arguments.out, arguments.minutes, arguments.commit)
    print({**run.facts, "copy_gb_per_s": round(run.bandwidth / 1e9)}, flush=True)
    with torch.inference_mode():
        run_stages(run, arguments.stages)


def run_stages(run: Run, names: Sequence[str]) -> None:
    weights = Weights()
    stages = {
        "check": lambda: check(run, weights),
        "time": lambda: timed(run, weights, "time", LARGE, (1,), (2, 3, 4)),
        "e2e": lambda: end_to_end(run, weights),
        "rivals": lambda: rivals(run, weights),
        "mixed": lambda: mixed(run, weights),
        "rows": lambda: timed(run, weights, "rows", TUNED_SHAPES, (2, 4, 8, 16, 32, 64, 128), (2, 4)),
        "together": lambda: together(run, weights),
        "rates": lambda: rates(run, weights),
        "tune": lambda: tune(run, weights),
    }
    for name in names:
        began, before = time.monotonic(), len(run.lines)
        stages[name]()
        if len(run.lines) > before:
            print("\n" + gpu_report.text_table(run.lines[before:]), flush=True)
        print(f"stage {name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
