"""Quantize a random-weight Llama from its files: weights a second and peak resident memory, as one JSON line.

python benchmarks/quantize.py --parameters 100 --preset fast --precisions 2-4
python benchmarks/quantize.py --parameters 1500 --kill 10

With --kill N the run is killed (SIGKILL) at N random moments and resumed each time, and every file of the result
is compared with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import about_run
from transformers import LlamaConfig, LlamaForCausalLM

from anybits.config import METHODS, PRESETS

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32000
BLOCK = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * INTERMEDIATE
SHARDS = 8

# Runs in a process of its own, so that its peak is the quantizer's and nobody else's.
CHILD = """
import json, resource, sys, time
import torch
from anybits import Recipe
from anybits.config import parse_precisions
from anybits.integrations.quantizing import quantize_model
from anybits.quantize.pipeline import Progress
source, out, method, preset, precisions, calibration, samples, seq_len, stop = sys.argv[1:]
recipe = Recipe(method=method, preset=preset, precisions=parse_precisions(precisions), samples=int(samples),
                seq_len=int(seq_len))
class Enough(Exception): pass
def done(report):
    if int(stop) and report.index + 1 == int(stop): raise Enough
started = time.perf_counter()
try:
    quantize_model(source, out, recipe, calibration or None, progress=Progress(block_done=done))
except Enough:
    pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}))
"""


def save_random_llama(folder: Path, parameters: int) -> tuple[int, int]:
    """Save a bfloat16 Llama of about `parameters` million weights; return its parameters and those in its blocks."""
    blocks = max(1, round((parameters * 1e6 - 2 * VOCABULARY * HIDDEN) / BLOCK))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=KEY_VALUE * 32 // HIDDEN,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    noise = torch.randn(1 << 24).mul_(0.02).bfloat16()  # drawn once: what is timed does not depend on the values
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(
                noise[: len(part)].roll(int(torch.randint(len(noise), (1,)))) if parameter.ndim > 1 else noise[:1] + 1
            )
    model.save_pretrained(folder, max_shard_size=f"{max(1, 2 * parameters // SHARDS)}MB")
    _tokenizer().save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()), blocks * BLOCK


def _tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def command(arguments: argparse.Namespace, source: Path, out: Path, text: Path) -> list[str]:
    """Return the command line of one run."""
    calibration = "" if arguments.preset == "fast" else str(text)
    settings = (arguments.method, arguments.preset, arguments.precisions, calibration)
    numbers = (arguments.samples, arguments.seq_len, arguments.blocks)
    return [sys.executable, "-c", CHILD, str(source), str(out), *settings, *map(str, numbers)]


def run(line: list[str]) -> dict[str, float]:
    """Run to the end and return what the child measured."""
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def killed_and_resumed(line: list[str], seconds: float, kills: int, seed: int) -> dict[str, object]:
    """Kill the run at random moments until it was killed `kills` times, then let it end."""
    moments, at = random.Random(seed), []
    for _ in range(kills):
        child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        wait = moments.uniform(0, 1.6 * seconds / kills)
        try:
            child.wait(wait)
            break
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            at.append(round(wait, 1))
    last = run(line) if len(at) == kills else {"peak": 0.0}
    return {
        "kills": len(at),
        "killed_after_seconds": " ".join(map(str, at)),
        "peak_of_the_last_run_gb": round(last["peak"], 2),
    }


def differing_files(one: Path, other: Path) -> list[str]:
    """Return the files that are not the same in both folders."""
    names = {str(p.relative_to(f)) for f in (one, other) for p in f.rglob("*") if p.is_file()}
    _, differing, missing = filecmp.cmpfiles(one, other, sorted(names), shallow=False)
    return differing + missing


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=200, help="million weights, embeddings included")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    parser.add_argument("--precisions", default="2-4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=0, help="stop after so many blocks: enough for the peak")
    parser.add_argument("--kill", type=int, default=0, help="also kill a second run so many times and compare")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    parser.add_argument("--folder", type=Path, help="keep the model and the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        line = json.dumps({"table": "quantize"} | measure(arguments, folder) | about_run())
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return the figures of one setting."""
    source, text = folder / "float", folder / "text.txt"
    counts = folder / "counts.json"
    if not counts.exists():
        source.mkdir(parents=True, exist_ok=True)
        counts.write_text(json.dumps(save_random_llama(source, arguments.parameters)))
    total, weights = json.loads(counts.read_text())
    moments = random.Random(0)
    text.write_text(" ".join(f"w{moments.randrange(1, VOCABULARY)}" for _ in range(200_000)))
    whole, disturbed = folder / "whole" / "model", folder / "killed" / "model"
    figures = run(command(arguments, source, whole, text))
    seconds = figures["seconds"]
    result: dict[str, object] = {
        "model_parameters": total,
        "quantized_weights": weights,
        "method": arguments.method,
        "preset": arguments.preset,
        "precisions": arguments.precisions,
        "samples": arguments.samples,
        "seq_len": arguments.seq_len,
        "blocks": arguments.blocks or weights // BLOCK,
        "seconds": round(seconds, 1),
        "weights_per_second": round((arguments.blocks * BLOCK or weights) / seconds),
        "peak_resident_gb": round(figures["peak"], 2),
    }
    if arguments.kill:
        result |= killed_and_resumed(
            command(arguments, source, disturbed, text), seconds, arguments.kill, arguments.seed
        )
        differing = differing_files(whole, disturbed)
        print("not the same in both runs:", *differing or ["nothing"], file=sys.stderr)
        result["differing_files"] = len(differing)
    return result


if __name__ == "__main__":
    main()
