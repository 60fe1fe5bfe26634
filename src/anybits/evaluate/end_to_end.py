"""Times whole decode steps of a random-weight model: every precision beside bf16, in turn, in one run."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybits.config import parse_precisions
from anybits.errors import AnybitsError
from anybits.evaluate.kernels import TIMED, check_kernels, random_weight
from anybits.integrations import random_model
from anybits.linear import PlaneLinear
from anybits.precision import ModelPrecision
from anybits.precision import precision as scoped

MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 131072,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 131072,
    },
}  # fmt: skip
"""Sizes of the models whose decoding can be timed."""

USABLE_MEMORY = 0.6
"""Share of the machine's available memory that the two models may take."""

_GROUP = 128


@dataclass(frozen=True)
class DecodeTiming:
    """One line: precision 16 is the bf16 model; ms: median of a step; bytes: weights that a step reads.

    distinct_layers: layers with weights of their own; the others repeat them, because memory lacks.
    """

    model: str
    method: str
    precision: int
    context: int
    ms: float
    tokens_per_s: float
    bytes: int
    gb_per_s: float
    speedup_vs_bf16: float
    layers: int
    distinct_layers: int
    quantized_head: bool


def bench_decoding(
    model: str,
    precisions: str = "2-4",
    contexts: Sequence[int] = (512,),
    method: str = "anybcq",
    rounds: int = 5,
    quantize_head: bool = False,
    distinct: int | None = None,
    json_file: Path | None = None,
) -> Iterator[DecodeTiming]:
    """Yield decode timings of a random-weight model at each context and precision, batch 1; the body of `bench --e2e`.

    distinct: layers with weights of their own, None for as many as memory holds. Each round times one step of
    bf16 and of every precision. Raises AnybitsError when a kernel's result is wrong: then nothing is timed.
    """
    wanted, own = checked(model, precisions, contexts, method, rounds, distinct, available_memory())
    layers, lines = MODELS[model]["num_hidden_layers"], []
    with torch.inference_mode():
        dense, planes = random_models(MODELS[model], own, method, wanted, quantize_head)
        for context in contexts:
            seconds = _time(dense, planes, wanted, context, rounds)
            for p, taken in seconds.items():
                size = weight_bytes(dense if p == 16 else planes, p)
                timing = DecodeTiming(
                    model, method, p, context, round(taken * 1e3, 2), round(1 / taken, 2), size,
                    round(size / taken / 1e9, 2), round(seconds[16] / taken, 2), layers, own, quantize_head,
                )  # fmt: skip
                lines.append(json.dumps(asdict(timing)))
                yield timing
    if json_file is not None:
        json_file.write_text("\n".join(lines) + "\n")


def decoding_on(device: str) -> Callable[..., Iterator[DecodeTiming]]:
    """Return the benchmark of `device`, "cpu" or "cuda", raising AnybitsError for another."""
    if device == "cuda":
        from anybits.evaluate.end_to_end_cuda import bench_decoding_cuda

        return bench_decoding_cuda
    if device != "cpu":
        raise AnybitsError(f"device '{device}' is unknown: choose cpu or cuda")
    return bench_decoding


def checked(
    model: str,
    precisions: str,
    contexts: Sequence[int],
    method: str,
    rounds: int,
    distinct: int | None,
    memory: int,
) -> tuple[tuple[int, ...], int]:
    """Return precisions and distinct layers, as many as fit into bytes of `memory`; AnybitsError for what cannot be."""
    wanted = parse_precisions(precisions)
    if model not in MODELS:
        raise AnybitsError(f"shapes '{model}' have no end-to-end timing: choose {' or '.join(MODELS)}")
    if method not in TIMED:
        raise AnybitsError(f"method '{method}' is unknown: choose {' or '.join(TIMED)}")
    if not contexts or min(contexts) < 1 or rounds < 1:
        raise AnybitsError(f"contexts {list(contexts)} and rounds {rounds} must be at least 1")
    sizes = MODELS[model]
    return wanted, min(sizes["num_hidden_layers"], distinct or _layers_that_fit(sizes, wanted, memory))


def _layers_that_fit(sizes: dict[str, Any], precisions: Sequence[int], memory: int) -> int:
    """Return how many layers of both models, planes twice (stored and repacked), fit into bytes of `memory`."""
    hidden, middle = sizes["hidden_size"], sizes["intermediate_size"]
    kv = sizes["num_key_value_heads"] * hidden // sizes["num_attention_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * middle
    levels = sum(p + 1 for p in precisions) * 16 / _GROUP
    layer = weights * (2 + 2 * (precisions[-1] + levels) / 8)
    rest = 3 * 2 * sizes["vocab_size"] * hidden
    fit = int((USABLE_MEMORY * memory - rest) / layer)
    if fit < 1:
        raise AnybitsError(f"one layer and the head take {(layer + rest) / 1e9:.1f} GB: more than memory has left")
    return fit


def available_memory() -> int:
    """Return bytes that can be taken without swapping, where the system tells; else half of what there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def random_models(
    sizes: dict[str, Any], own: int, method: str, precisions: Sequence[int], quantize_head: bool, device: str = "cpu"
) -> tuple[Any, Any]:
    """Return the bf16 model and the one of planes; what is not quantized they share."""
    dense = random_model.llama(sizes, own)
    planes = random_model.llama(sizes, own)
    random_model.fill(dense, device)
    planes.model.embed_tokens, planes.lm_head = dense.model.embed_tokens, dense.lm_head
    put_random_planes(planes, method, precisions, device)
    if quantize_head:
        planes.lm_head = _random_linear(dense.lm_head, method, precisions, device)
    random_model.fill(planes, device)
    for model in (dense, planes):
        random_model.repeat_layers(model, sizes["num_hidden_layers"])
    return dense, planes


def put_random_planes(model: Any, method: str, precisions: Sequence[int], device: str = "cpu") -> int:
    """Replace the linear layers of a Llama's blocks by random planes; return the number of their weights.

    Every shape's kernels are checked once; raises AnybitsError when they are wrong.
    """
    weights = 0
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, _random_linear(module, method, precisions, device))
                    weights += module.out_features * module.in_features
    return weights


_checked: set[tuple[int, int, str, str]] = set()


def _random_linear(like: nn.Linear, method: str, precisions: Sequence[int], device: str) -> PlaneLinear:
    shape = (like.out_features, like.in_features)
    weight = random_weight(shape, method, precisions, _GROUP, device)
    if (*shape, method, device) not in _checked:
        check_kernels(weight, method, precisions)
        _checked.add((*shape, method, device))
    group = None if method == "any-precision" else _GROUP
    made = PlaneLinear(shape[1], shape[0], group, ModelPrecision(precisions[-1]), dtype=torch.bfloat16)
    made.set_plane_weight(weight)
    return made.to(device)


def _time(dense: Any, planes: Any, precisions: Sequence[int], context: int, rounds: int) -> dict[int, float]:
    """Return precision -> median seconds of a step, 16 being bf16."""
    runs = {16: dense} | dict.fromkeys(precisions, planes)
    token = torch.tensor([[1]])
    seconds: dict[int, list[float]] = {p: [] for p in runs}
    cache = random_model.context_of(dense, context)
    for turn in range(rounds + 1):
        for p, model in runs.items():
            with scoped(precisions[-1] if p == 16 else p):
                started = time.perf_counter()
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                taken = time.perf_counter() - started
            cache.crop(-1)  # the next step sees the same context
            if not torch.isfinite(logits).all():
                raise AnybitsError(f"precision {p} gives logits that are not finite: nothing is timed")
            if turn:  # the first round repacks and warms up
                seconds[p].append(taken)
    return {p: statistics.median(times) for p, times in seconds.items()}


def weight_bytes(model: nn.Module, precision: int) -> int:
    """Return the bytes of weights that one decode step reads at `precision`, repeated layers each time."""
    total = 0
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PlaneLinear):
            total += module.plane_weight.weight_bytes(precision)
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
    return total
