"""Time the quantization of a random-weight Llama: weights a second and peak resident memory, as one JSON line.

python benchmarks/quantize.py --parameters 100 --preset fast --precisions 2-4
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anybits import Recipe, __version__
from anybits.config import METHODS, PRESETS, parse_precisions
from anybits.integrations.transformers import load_model, weight_facts
from anybits.quantize import pipeline


def random_llama(parameters: int) -> LlamaForCausalLM:
    """Return a bfloat16 Llama of about `parameters` million weights in its blocks."""
    hidden, intermediate = 1024, 2816
    per_block = 2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * intermediate
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=max(1, round(parameters * 1e6 / per_block)),
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="million weights")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    parser.add_argument("--precisions", default="2-4")
    arguments = parser.parse_args()
    recipe = Recipe(method=arguments.method, preset=arguments.preset, precisions=parse_precisions(arguments.precisions))
    model = random_llama(arguments.parameters)
    total = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        pipeline.quantize(model, model.config.to_dict(), recipe, None, Path(folder), __version__)
        seconds = time.perf_counter() - started
        model.config.architectures = ["LlamaForCausalLM"]
        weights = next(iter(weight_facts(load_model(folder)).values()))[1]
    result = {
        "model_parameters": total,
        "quantized_weights": weights,
        "method": recipe.method,
        "preset": recipe.preset,
        "precisions": list(recipe.precisions),
        "seconds": round(seconds, 1),
        "weights_per_second": round(weights / seconds),
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "anybits": __version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
