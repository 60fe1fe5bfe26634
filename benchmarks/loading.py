"""Load a random checkpoint of Llama-3.1-8B's shapes: seconds until ready, and resident memory, as one JSON line.

python benchmarks/loading.py                       # 32 layers, precisions 2 to 4: about 4 GB of planes and levels
python benchmarks/loading.py --layers 8            # a quarter of it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from anybits.checkpoint import CheckpointWriter
from anybits.config import StoredConfig, parse_precisions
from anybits.evaluate.end_to_end import MODELS
from anybits.evaluate.kernels import random_weight
from anybits.integrations import random_model
from anybits.integrations import transformers as hf
from anybits.quantize.source import Source
from anybits.quantize.targets import find_targets, target_patterns

# Runs in a process of its own; RssAnon is memory that is nobody else's, RssFile pages of mapped files.
CHILD = """
import json, sys, time
import torch
from anybits.integrations import transformers as hf

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: round(int(lines[name].split()[0]) / 1e6, 2) for name in ("RssAnon", "RssFile", "VmHWM")}

found = {"before": resident()}
started, spent = time.perf_counter(), time.process_time()
model = hf.load_model(sys.argv[1])
found |= {"load_seconds": round(time.perf_counter() - started, 2)}
found |= {"load_cpu_seconds": round(time.process_time() - spent, 2), "loaded": resident()}
token = torch.tensor([[1]])
with torch.inference_mode():
    for name in ("first", "second"):
        started = time.perf_counter()
        model(input_ids=token, use_cache=False)
        found[f"{name}_step_seconds"] = round(time.perf_counter() - started, 2)
found["after_the_first_step"] = resident()
print(json.dumps(found))
"""


def save_random(folder: Path, layers: int, precisions: tuple[int, ...], method: str) -> int:
    """Write a checkpoint of random planes; return the bytes of its files."""
    sizes = MODELS["llama-3.1-8b"] | {"num_hidden_layers": layers}
    source = Source(random_model.llama(sizes, layers))
    writer, names = CheckpointWriter(folder), []
    group = 128 if method == "anybcq" else None
    for index, block in enumerate(source.blocks):
        where = f"{source.prefix}.{index}"
        targets = {t.parameter: t for t in find_targets(block)}
        tensors = {
            f"{where}.{name}": torch.ones(p.shape, dtype=p.dtype)
            for name, p in block.named_parameters()
            if name not in targets
        }
        for target in targets.values():
            weight = random_weight((target.out_features, target.in_features), method, precisions)
            tensors[f"{where}.{target.module}.weight"] = torch.empty(0, dtype=torch.bfloat16)
            tensors |= {f"{where}.{target.module}.{key}": value for key, value in weight.tensors().items()}
        names.append(f"block-{index:05d}")
        writer.write_shard(names[-1], tensors)
    rest = {
        name: torch.full(source.tensors[name].shape, 0.01, dtype=torch.bfloat16)
        for name in source.rest_names()
        if not source.tensors[name].is_floating_point() or source.tensors[name].dtype == torch.bfloat16
    }
    writer.write_shard("rest", rest)
    stored = StoredConfig(method, precisions, target_patterns(source.model), group, None if group is None else False)
    writer.finish([*names, "rest"], stored, hf.plain_config(source.model))
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    """Measure one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--precisions", default="2-4")
    parser.add_argument("--method", default="anybcq")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = save_random(folder, arguments.layers, parse_precisions(arguments.precisions), arguments.method)
        line = [sys.executable, "-c", CHILD, str(folder)]
        found = json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    print(json.dumps({"checkpoint_gb": round(size / 1e9, 2), "threads": torch.get_num_threads()} | found))


if __name__ == "__main__":
    main()
