"""The CPU kernels beside llama.cpp's: the same shapes, rows, threads and minutes of one machine.

python benchmarks/vs_llama_cpp.py BUILD --out benchmarks/results/vs-llama-cpp.jsonl
ANYBITS_CPU_ISA=avx2 python benchmarks/vs_llama_cpp.py BUILD_FOR_AVX2 --out benchmarks/results/vs-llama-cpp.jsonl

BUILD is a folder with llama.cpp's shared libraries. 2, 3 and 4 bits stand beside Q2_K, Q3_K and Q4_K, in plain buffers
and in repacked ones where it has them: the faster counts. Every line has the read bandwidth of its moment. A wrong
product ends the run: ours against float64, ggml's against its own dequantized weights. Nothing waits in a cache: copies
of 128 MiB and more are read in turn. Here that means:

- ours: one call from Python for each product, and x changes from call to call, so that no table is used twice;
- ggml: one graph multiplies all copies, so that threads are started once for many products, as in a whole token.

Ours run with activations of 16 bits, and again with 8 as ggml's have ("activation_bits"). Lines with "n": 0 are a
decoder block of Llama-3.1-8B, q + k + v + o + gate + up + down, added up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import LineProcess, about_run

from anybits.evaluate.kernels import METHODS, SHAPES, copies_beyond_cache, random_weight, read_bandwidth, times_of
from anybits.kernels import cpu, native

RIVALS = {2: "q2_K", 3: "q3_K", 4: "q4_K"}
IN_A_BLOCK = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
LARGEST_ERROR = {16: 5e-3, 8: 2e-2, "theirs": 5e-2}  # bf16 results; ggml rounds activations to 8 bits
PAUSE = 0.1  # seconds after which a library's threads no longer wait actively, so that the other's can work
_BANDWIDTH_BYTES = 256 << 20


class Ggml(LineProcess):
    """ggml_products.py in a process of its own."""

    def __init__(self, build: Path, threads: int) -> None:
        super().__init__([sys.executable, str(Path(__file__).parent / "ggml_products.py"), str(build), str(threads)])

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        return dict(json.loads(self.ask(json.dumps({"do": do, **arguments}))))


Kind = tuple[str, int, int]  # method, bits of activations, precision


def ours(shape: tuple[int, int], method: str, rows: Sequence[int]) -> Iterator[tuple[Kind, int, int, float, Callable]]:
    """Yield (kind, m, bytes, error, run) of products; runs share the copies of one weight."""
    weight = random_weight(shape, method, list(RIVALS))
    backends = {bits: cpu.CpuBackend(activation_bits=bits) for bits in (16, 8)}
    copies = [backends[16].prepare(weight) for _ in range(copies_beyond_cache(weight.weight_bytes(min(RIVALS))))]
    for m, p, (bits, backend) in itertools.product(rows, RIVALS, backends.items()):
        xs = [torch.randn(m, shape[1]).bfloat16() for _ in range(2)]
        checked = weight.rows(0, min(256, shape[0]))
        wanted = xs[0].double() @ checked.dequantize(p).double().t()
        got = backend.matmul(xs[0], copies[0], p)[:, : checked.out_features].double()
        error = float((got - wanted).norm() / wanted.norm())
        turn = itertools.count()

        def run(
            p: int = p, backend: cpu.CpuBackend = backend, xs: list[torch.Tensor] = xs, turn: Iterator[int] = turn
        ) -> torch.Tensor:
            i = next(turn)
            return backend.matmul(xs[i % 2], copies[i % len(copies)], p)

        yield (method, bits, p), m, weight.weight_bytes(p), error, run


def loaded(ggml: Ggml, shape: tuple[int, int]) -> dict[tuple[int, str], tuple[str, int]]:
    """Return (precision, buffer) -> name and bytes of ggml's weights of `shape`, made now."""
    rivals = {}
    for p, kind in RIVALS.items():
        for buffer in ggml("about")["buffers"]:
            made = ggml("load", key=f"{kind} {buffer}", kind=kind, buffer=buffer, n=shape[0], k=shape[1])
            if made["bytes"]:
                rivals[p, buffer] = f"{kind} {buffer}", made["bytes"]
    return rivals


def measured(
    runs: dict[Any, Callable], rivals: dict[Any, tuple[str, int]], m: int, rounds: int, ggml: Ggml, budget: float
) -> tuple[float, dict[Any, float], dict[Any, float]]:
    """Return the read bandwidth and the median seconds of ours and of theirs; raise SystemExit for a wrong product."""
    memory = cpu.allocate(_BANDWIDTH_BYTES).zero_()
    seconds: dict[Any, list[float]] = {place: [] for place in (*runs, *rivals)}
    bandwidths = []
    for _ in range(rounds):
        bandwidths.append(max(read_bandwidth(memory) for _ in range(3)))
        for place, run in runs.items():
            seconds[place] += times_of(run, budget=budget)
        time.sleep(PAUSE)
        for place, (key, _) in rivals.items():
            timed = ggml("time", key=key, m=m, budget=budget)
            if not timed["error"] < LARGEST_ERROR["theirs"]:
                raise SystemExit(f"ggml's product of {m} rows with {key} is wrong by {timed['error']:.3g}")
            seconds[place] += timed["seconds"]
        time.sleep(PAUSE)
    medians = {place: statistics.median(times) for place, times in seconds.items()}
    return statistics.median(bandwidths), {p: medians[p] for p in runs}, {p: medians[p] for p in rivals}


def compare(
    shape: tuple[int, int], rows: Sequence[int], rounds: int, ggml: Ggml, budget: float
) -> Iterator[dict[str, Any]]:
    """Yield one line for each m and kind; raise SystemExit when a product is wrong."""
    kernels = [found for method in METHODS for found in ours(shape, method, rows)]
    for kind, m, _, error, _ in kernels:
        if not error < LARGEST_ERROR[kind[1]]:
            raise SystemExit(f"our product of {m} rows, {kind}, {shape}, is wrong by {error:.3g}")
    rivals = loaded(ggml, shape)
    for m in rows:
        runs = {kind: run for kind, here, _, _, run in kernels if here == m}
        bandwidth, mine, theirs = measured(runs, rivals, m, rounds, ggml, budget)
        for kind, here, size, error, _ in kernels:
            if here != m:
                continue
            method, bits, p = kind
            best = min((place for place in theirs if place[0] == p), key=theirs.__getitem__)
            us, rival, their_size = mine[kind] * 1e6, theirs[best] * 1e6, rivals[best][1]
            yield {
                "table": "products", "n": shape[0], "k": shape[1], "m": m, "precision": p, "method": method,
                "activation_bits": bits,
                "us": round(us, 1), "llama_cpp_us": round(rival, 1), "speedup": round(rival / us, 2),
                "read_gb_per_s": round(bandwidth / 1e9, 1),
                "gb_per_s": round(size / us / 1e3, 1), "share": round(size / us * 1e6 / bandwidth, 2),
                "llama_cpp_gb_per_s": round(their_size / rival / 1e3, 1),
                "llama_cpp_share": round(their_size / rival * 1e6 / bandwidth, 2),
                "bytes": size, "llama_cpp_bytes": their_size, "type": RIVALS[p], "buffer": best[1],
                "error": round(error, 5),
            }  # fmt: skip
    for key, _ in rivals.values():
        ggml("drop", key=key)


def blocks(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a decoder block's sum for each m and kind that has every shape."""
    names = ("m", "precision", "method", "activation_bits")
    for m, p, method, bits in dict.fromkeys(tuple(line[name] for name in names) for line in lines):
        here = {(x["n"], x["k"]): x for x in lines if tuple(x[name] for name in names) == (m, p, method, bits)}
        if set(here) != set(IN_A_BLOCK):
            continue
        us, rival = (sum(times * here[s][name] for s, times in IN_A_BLOCK.items()) for name in ("us", "llama_cpp_us"))
        yield {
            "table": "block", "n": 0, "k": 0, "m": m, "precision": p, "method": method, "activation_bits": bits,
            "us": round(us, 1), "llama_cpp_us": round(rival, 1), "speedup": round(rival / us, 2), "type": RIVALS[p],
        }  # fmt: skip


def main() -> None:
    """Measure, print and write."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--shapes", default="", help="NxK,NxK; default: all of llama-3.1-8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of each kernel in a round")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in arguments.shapes.split(",") if s] or SHAPES["llama-3.1-8b"]
    rows = [int(m) for m in arguments.rows.split(",")]
    ggml = Ggml(arguments.build, torch.get_num_threads())
    facts = ggml("about")
    name = native.ISAS[native.isa_number()]
    facts = {"isa": name, "ggml": facts["ggml"], "ggml_features": " ".join(facts["features"])} | about_run()
    lines = []
    with torch.inference_mode():
        for shape in shapes:
            for line in compare(shape, rows, arguments.rounds, ggml, arguments.budget):
                lines.append(line)
                print(json.dumps(line), flush=True)
    lines += blocks(lines)
    ggml.close()
    if arguments.out:
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(line | facts) + "\n" for line in lines)


if __name__ == "__main__":
    main()
