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
from random_checkpoint import write

from anybits.config import parse_precisions
from anybits.evaluate.end_to_end import MODELS

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


def main() -> None:
    """Measure one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--precisions", default="2-4")
    parser.add_argument("--method", default="anybcq")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = MODELS["llama-3.1-8b"] | {"num_hidden_layers": arguments.layers}
        write(folder, sizes, parse_precisions(arguments.precisions), arguments.method)
        size = sum(file.stat().st_size for file in folder.iterdir())
        line = [sys.executable, "-c", CHILD, str(folder)]
        found = json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    print(json.dumps({"checkpoint_gb": round(size / 1e9, 2), "threads": torch.get_num_threads()} | found))


if __name__ == "__main__":
    main()
