"""Whole decode steps beside llama.cpp's: Llama-3.1-8B's shape, random weights, batch 1, in the same minutes.

python benchmarks/decode_vs_llama_cpp.py BUILD --out benchmarks/results/decode-vs-llama-cpp.jsonl

BUILD is the folder of a llama.cpp build with shared libraries. 2 bits stand beside Q2_K and 4 beside Q4_K_M, as its own
quantizer mixes types (random_gguf.py). Each round times steps of ours and of theirs in turn, after a pause in which
the other's threads go to sleep. Models have few layers, in two sizes, so that a layer's time and the rest (embedding,
norm, output layer) come apart; `ms_32` is rest + 32 layers. A step appends one token at the same context each time.
Ours is what `from_pretrained` gives: transformers with bf16 activations, its output layer in bf16 ("head": "bf16") or
in planes of the same precision ("head": "planes"); llama.cpp's is Q6_K. Kernels are checked against float64 first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import LineProcess, about_run

from anybits.evaluate import end_to_end
from anybits.evaluate.kernels import read_bandwidth
from anybits.integrations import random_model
from anybits.kernels import cpu, native
from anybits.precision import precision as scoped

MIXES = {2: "q2_K", 4: "q4_K_M"}
LAYERS = 32
PAUSE = 0.1  # seconds after which a library's threads no longer wait actively
STEPS = 3  # of each model in a round
WARM = 3


class LlamaCpp(LineProcess):
    """A model that libllama runs in a process of its own."""

    def __init__(self, program: Path, model: Path, threads: int, context: int) -> None:
        super().__init__([str(program), str(model), str(threads), str(context)])

    def __call__(self, steps: int) -> list[float]:
        return [float(seconds) for seconds in self.ask(str(steps)).split()]


def compiled(build: Path, folder: Path) -> Path:
    """Build the program that times libllama; return its path."""
    cached = (build / "CMakeCache.txt").read_text().splitlines()
    source = Path(next(line.split("=", 1)[1] for line in cached if line.startswith("CMAKE_HOME_DIRECTORY")))
    library = next(build.rglob("libllama.so")).parent.resolve()
    program = folder / "llama_cpp_steps"
    subprocess.run(
        [
            "c++", "-O2", f"-I{source}/include", f"-I{source}/ggml/include",
            str(Path(__file__).parent / "llama_cpp_steps.cpp"), "-o", str(program),
            f"-L{library}", "-lllama", "-lggml", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{library}",
        ],
        check=True,
    )  # fmt: skip
    return program


def theirs(build: Path, folder: Path, layers: tuple[int, ...], context: int) -> dict[Any, Callable[[int], list[float]]]:
    """Return (layers, precision, "llama.cpp") -> a run of steps."""
    program, runs = compiled(build, folder), {}
    for count in layers:
        for p, mix in MIXES.items():
            file = folder / f"{mix}-{count}.gguf"
            writer = [sys.executable, str(Path(__file__).parent / "random_gguf.py"), str(build), str(file)]
            subprocess.run([*writer, "--mix", mix, "--layers", str(count)], check=True)
            runs[count, p, "llama.cpp"] = LlamaCpp(program, file, torch.get_num_threads(), context)
    return runs


def ours(layers: tuple[int, ...], context: int, method: str) -> dict[Any, Callable[[int], list[float]]]:
    """Return (layers, precision, head) -> a run of steps; the sizes share the planes of the layers that both have."""
    sizes = end_to_end.MODELS["llama-3.1-8b"]
    most = max(layers)
    model = random_model.llama(sizes, most)
    end_to_end.put_random_planes(model, method, list(MIXES))
    random_model.fill(model)
    dense = model.lm_head
    heads = {"bf16": dense, "planes": end_to_end._random_linear(dense, method, list(MIXES), "cpu")}
    cache, token = random_model.context_of(model, context), torch.tensor([[1]])
    own = list(model.model.layers)

    def run(count: int, p: int, head: str) -> Callable[[int], list[float]]:
        def steps(wanted: int) -> list[float]:
            model.lm_head, model.model.layers, taken = heads[head], torch.nn.ModuleList(own[:count]), []
            for _ in range(wanted):
                with scoped(p):
                    start = time.perf_counter()
                    logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                    taken.append(time.perf_counter() - start)
                for layer in cache.layers[:count]:
                    layer.crop(-1)
                if not torch.isfinite(logits).all():
                    raise SystemExit("logits are not finite")
            return taken

        return steps

    return {(count, p, head): run(count, p, head) for count in layers for p in MIXES for head in heads}


def lines(
    seconds: dict[Any, list[float]], sizes: tuple[int, int], context: int, scale_bits: int, bandwidth: float
) -> list[dict]:
    """Return a line for each precision and kind: milliseconds of a layer, of the rest, and of 32 layers with it."""
    few, many = sizes
    result, whole = [], {}
    for p in MIXES:
        for kind in ("llama.cpp", "bf16", "planes"):
            short, long = (statistics.median(seconds[count, p, kind]) * 1e3 for count in (few, many))
            layer = (long - short) / (many - few)
            whole[p, kind] = short + (LAYERS - few) * layer
            ratio = round(whole[p, "llama.cpp"] / whole[p, kind], 2)
            result.append(
                {
                    "table": "decode", "model": "llama-3.1-8b", "precision": p, "context": context,
                    "system": "llama.cpp" if kind == "llama.cpp" else "anybits",
                    "head": "q6_K" if kind == "llama.cpp" else kind, "type": MIXES[p],
                    "scale_bits": None if kind == "llama.cpp" else scale_bits,
                    "layers": f"{few},{many}", "ms_few": round(short, 2), "ms_many": round(long, 2),
                    "ms_layer": round(layer, 3), "ms_rest": round(short - few * layer, 2),
                    "ms_32": round(whole[p, kind], 1), "speedup": ratio, "read_gb_per_s": round(bandwidth / 1e9, 1),
                }
            )  # fmt: skip
    return result


def measure(runs: dict[Any, Callable[[int], list[float]]], rounds: int) -> tuple[dict[Any, list[float]], float]:
    """Return the seconds of steps, and the median read bandwidth of the rounds."""
    memory = cpu.allocate(256 << 20).zero_()
    for run in runs.values():
        run(WARM)
        time.sleep(PAUSE)
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    bandwidths = []
    for _ in range(rounds):
        bandwidths.append(max(read_bandwidth(memory) for _ in range(3)))
        for key, run in runs.items():
            seconds[key] += run(1 + STEPS)[1:]
            time.sleep(PAUSE)
    return seconds, statistics.median(bandwidths)


def main() -> None:
    """Measure, print and write."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--layers", default="2,8", help="the two sizes")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--scale-bits", type=int, choices=(16, 8), default=16, help="of our scales and offsets")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wait", type=Path, help="start to measure when this file is there")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    arguments = parser.parse_args()
    few, many = (int(count) for count in arguments.layers.split(","))
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        method = "anybcq" if arguments.scale_bits == 16 else "anybcq-8bit"
        runs = ours((few, many), arguments.context, method)
        runs |= theirs(arguments.build, Path(folder), (few, many), arguments.context)
        while arguments.wait and not arguments.wait.exists():
            time.sleep(0.1)
        seconds, bandwidth = measure(runs, arguments.rounds)
        for run in runs.values():
            if isinstance(run, LlamaCpp):
                run.close()
    made = lines(seconds, (few, many), arguments.context, arguments.scale_bits, bandwidth)
    isa = {"isa": native.ISAS[native.isa_number()]}
    for line in made:
        print(json.dumps(line), flush=True)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(line | isa | about_run()) + "\n" for line in made)


if __name__ == "__main__":
    main()
