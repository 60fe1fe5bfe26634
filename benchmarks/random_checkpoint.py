"""Write a checkpoint of random planes with another model's tokenizer: as slow as a model of its size, for load tests.

python benchmarks/random_checkpoint.py OUT --tokenizer MODEL --hidden 2048 --intermediate 8192 --layers 5

Its text means nothing, its kernels read what a trained model's would: a server of it shows times, never quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import anybits
from anybits.checkpoint import CheckpointWriter
from anybits.config import StoredConfig
from anybits.evaluate.kernels import random_weight
from anybits.integrations import random_model
from anybits.integrations import transformers as hf
from anybits.quantize.targets import find_targets

GROUP = 128


def write(args: argparse.Namespace) -> int:
    """Write the checkpoint, one layer at a time, and return the number of its quantized weights."""
    tokenizer = hf.load_tokenizer(args.tokenizer)
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256), head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = random_model.llama(sizes, args.layers)
    targets = find_targets(model.model.layers[0])
    writer, shards, weights = CheckpointWriter(args.out), [], 0
    for index in range(args.layers):
        tensors: dict[str, torch.Tensor] = {}
        for target in targets:
            module = f"model.layers.{index}.{target.module}"
            made = random_weight((target.out_features, target.in_features), "anybcq", args.precisions, GROUP)
            weights += target.out_features * target.in_features
            tensors[f"{module}.weight"] = torch.empty(0, dtype=torch.bfloat16)
            tensors |= {f"{module}.{name}": tensor for name, tensor in made.tensors().items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(args.hidden, dtype=torch.bfloat16)
        shards.append(f"block-{index:05d}")
        writer.write_shard(shards[-1], tensors)
    embedding = (torch.randn(len(tokenizer), args.hidden) * 0.02).bfloat16()
    norm = torch.ones(args.hidden, dtype=torch.bfloat16)
    writer.write_shard("rest", {"model.embed_tokens.weight": embedding, "model.norm.weight": norm})
    tokenizer.save_pretrained(args.out)
    recipe = {"random": True, "anybits_version": anybits.__version__}
    patterns = tuple(f"model.layers.*.{target.module}" for target in targets)
    stored = StoredConfig("anybcq", tuple(args.precisions), patterns, GROUP, False, recipe=recipe)
    writer.finish([*shards, "rest"], stored, hf.plain_config(model))
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, help="model folder whose tokenizer is copied")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--precisions", type=lambda text: [int(p) for p in text.split(",")], default=[2, 3, 4])
    options = parser.parse_args()
    print(f"{write(options) / 1e6:.0f} M quantized weights in {options.out}")
