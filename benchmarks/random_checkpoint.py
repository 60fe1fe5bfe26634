"""Write a checkpoint of random planes with another model's tokenizer: as slow as a model of its size, for load tests.

python benchmarks/random_checkpoint.py OUT --tokenizer MODEL --hidden 2048 --intermediate 8192 --layers 5

Its text means nothing, its kernels read what a trained model's would: a server of it shows times, never quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import anybits
from anybits.checkpoint import CheckpointWriter
from anybits.config import StoredConfig, parse_precisions
from anybits.evaluate.kernels import random_weight
from anybits.integrations import random_model
from anybits.integrations import transformers as hf
from anybits.quantize.source import Source
from anybits.quantize.targets import find_targets, target_patterns


def write(folder: Path, sizes: dict[str, Any], precisions: tuple[int, ...], method: str = "anybcq") -> int:
    """Write a Llama of random planes, one layer at a time, and return the number of its quantized weights.

    sizes: arguments of LlamaConfig. Norms are ones, all other matrices that are not quantized random.
    """
    source = Source(random_model.llama(sizes, sizes["num_hidden_layers"]))
    writer, names, weights = CheckpointWriter(folder), [], 0
    for index, block in enumerate(source.blocks):
        where = f"{source.prefix}.{index}"
        targets = {t.parameter: t for t in find_targets(block)}
        plain = {name: p for name, p in block.named_parameters() if name not in targets}
        tensors = {f"{where}.{name}": _random(p.shape) for name, p in plain.items()}
        for target in targets.values():
            made = random_weight((target.out_features, target.in_features), method, precisions)
            weights += target.out_features * target.in_features
            tensors[f"{where}.{target.module}.weight"] = torch.empty(0, dtype=torch.bfloat16)
            tensors |= {f"{where}.{target.module}.{name}": tensor for name, tensor in made.tensors().items()}
        names.append(f"block-{index:05d}")
        writer.write_shard(names[-1], tensors)
    tied = set(getattr(source.model, "all_tied_weights_keys", None) or {})
    rest = [name for name in source.rest_names() if name not in tied]
    writer.write_shard("rest", {name: _random(source.tensors[name].shape) for name in rest})
    group, symmetric = (128, False) if method == "anybcq" else (None, None)
    recipe = {"random": True, "anybits_version": anybits.__version__}
    patterns = target_patterns(source.model)
    stored = StoredConfig(method, precisions, patterns, group, symmetric, recipe=recipe)
    writer.finish([*names, "rest"], stored, hf.plain_config(source.model))
    return weights


def _random(shape: torch.Size) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16)
    return values.fill_(1) if len(shape) == 1 else values.normal_(std=0.02)


def main() -> None:
    """Read the arguments, write the model and copy the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, help="model folder whose tokenizer is copied")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--precisions", default="2-4")
    args = parser.parse_args()
    tokenizer = hf.load_tokenizer(args.tokenizer)
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256), head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = write(args.out, sizes, parse_precisions(args.precisions))
    tokenizer.save_pretrained(args.out)
    print(f"{weights / 1e6:.0f} M quantized weights in {args.out}")


if __name__ == "__main__":
    main()
