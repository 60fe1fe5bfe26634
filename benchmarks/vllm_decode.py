"""Decode speed in vLLM on this machine: a model in bf16 against the same shapes as planes, batch 1, one run.

    python benchmarks/vllm_decode.py --folder /tmp/decode          # prints JSON; --help for the size of the model

Both models are made here, with random weights (or random planes), in the environment that docs/vllm.md describes.
Both engines are alive at once and take turns, one round of decoding each, so that other work on the machine
disturbs both alike; the ratio is of the medians.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from anybits.checkpoint import CheckpointWriter, write_json
from anybits.config import StoredConfig

STORED = StoredConfig(
    "anybcq",
    (2, 3, 4),
    tuple(f"model.layers.*.self_attn.{n}_proj" for n in "qkvo")
    + tuple(f"model.layers.*.mlp.{n}_proj" for n in ("gate", "up", "down")),
    128,
    False,
)


def llama(args: argparse.Namespace) -> dict[str, Any]:
    """Return config.json of a Llama of the wanted size."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": args.hidden,
        "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 256,
        "head_dim": 64,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the linear layers of one block: name -> (N, K)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def matrix(name: str, n: int, k: int, quantized: bool) -> dict[str, torch.Tensor]:
    """Return random tensors of one linear layer."""
    if not quantized:
        return {f"{name}.weight": torch.empty(n, k, dtype=torch.bfloat16).normal_(std=0.02)}
    planes = torch.randint(-(2**31), 2**31 - 1, (STORED.precisions[-1], n, k // 32), dtype=torch.int32)
    tensors = {f"{name}.planes": planes, f"{name}.weight": torch.empty(0, dtype=torch.bfloat16)}
    for p in STORED.precisions:
        tensors[f"{name}.scales_{p}"] = torch.full((p, n, k // 128), 0.02 / p, dtype=torch.float16)
        tensors[f"{name}.offsets_{p}"] = torch.zeros(n, k // 128, dtype=torch.float16)
    return tensors


def build(folder: Path, config: dict[str, Any], quantized: bool) -> int:
    """Write a model whose blocks are all the same random one; return the number of weights in linear layers."""
    writer, hidden = CheckpointWriter(folder), config["hidden_size"]
    block: dict[str, torch.Tensor] = {}
    for name, (n, k) in shapes(config).items():
        block |= matrix(name, n, k, quantized)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block[f"{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    shards = [f"block-{i:05d}" for i in range(config["num_hidden_layers"])]
    for i, shard in enumerate(shards):
        if not writer.has_shard(shard):
            writer.write_shard(shard, {f"model.layers.{i}.{name}": t for name, t in block.items()})
    embedding = torch.empty(config["vocab_size"], hidden, dtype=torch.bfloat16).normal_(std=0.02)
    rest = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    writer.write_shard("rest", rest)
    writer.finish([*shards, "rest"], STORED, config)
    if not quantized:
        write_json(folder / "config.json", config)
    return config["num_hidden_layers"] * sum(n * k for n, k in shapes(config).values())


def serve(folder: str, precision: int | None, compiled: bool) -> None:
    """Be one engine: for each number of tokens on standard input, print the seconds and processor seconds it took."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=1,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    extra = None if precision is None else {"precision": precision}
    print("ready", flush=True)
    for line in sys.stdin:
        params = SamplingParams(
            temperature=0, max_tokens=int(line), ignore_eos=True, detokenize=False, extra_args=extra
        )
        started, used = time.perf_counter(), time.process_time()
        llm.generate([{"prompt_token_ids": [1, 2, 3, 4]}], params, use_tqdm=False)
        print("took", time.perf_counter() - started, time.process_time() - used, flush=True)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, folder: Path, precision: int | None, compiled: bool) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [sys.executable, __file__, "--serve", str(folder), "--precision", str(precision or 0)]
        command += ["--compile"] if compiled else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read("ready")

    def _read(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise SystemExit(f"the engine ended before it said '{word}'")

    def seconds(self, tokens: int) -> tuple[float, float]:
        """Return the seconds, and the processor seconds of all threads, that an answer of `tokens` tokens took."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        wall, processor = self._read("took").split()[1:]
        return float(wall), float(processor)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one run."""
    config = llama(args)
    count = build(args.folder / "bf16", config, quantized=False)
    build(args.folder / "planes", config, quantized=True)
    engines = {
        "bf16": Engine(args.folder / "bf16", None, args.compile),
        f"{args.precision} bits": Engine(args.folder / "planes", args.precision, args.compile),
    }
    for engine in engines.values():
        engine.seconds(4)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():  # the first token pays for the prompt: take it away
            many, one = engine.seconds(args.tokens + 1), engine.seconds(1)
            taken[name].append(((many[0] - one[0]) / args.tokens, (many[1] - one[1]) / args.tokens))
    for engine in engines.values():
        engine.stop()
    wall = {name: statistics.median(w for w, _ in values) for name, values in taken.items()}
    processor = {name: statistics.median(c for _, c in values) for name, values in taken.items()}
    return {
        "parameters_in_linear_layers": count,
        "torch_compile": args.compile,
        "threads": torch.get_num_threads(),
        "ms_per_token": {name: round(1000 * value, 2) for name, value in wall.items()},
        "processor_ms_per_token": {name: round(1000 * value, 2) for name, value in processor.items()},
        "tokens_per_s": {name: round(1 / value, 2) for name, value in wall.items()},
        "speedup_over_bf16": round(operator.truediv(*wall.values()), 3),
        "speedup_in_processor_time": round(operator.truediv(*processor.values()), 3),
    }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("vllm-decode"), help="where the two models are kept")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=18, help="18 layers of 2048 are 1.1 billion weights")
    parser.add_argument("--precision", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="tokens timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, as vLLM's default is")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    if options.serve:
        serve(options.serve, options.precision or None, options.compile)
    else:
        print(json.dumps(measure(options), indent=2))
