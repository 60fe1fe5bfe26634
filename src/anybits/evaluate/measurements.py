"""What a report measures: memory from shapes and headers, speed of decoding, time of one product."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from anybits import bits
from anybits.checkpoint import CheckpointReader, checkpoint_files, read_stored_config
from anybits.evaluate.kernels import bench_kernels, copies_beyond_cache, times_of
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.precision import precision as scoped
from anybits.weight import group_count

# (rows, columns) of a block's matrices, blocks, and float16 bytes outside of blocks, from the models' configs.
LLAMA_31_8B = ([(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)], 32, 4 * 128256 * 4096)
LLAMA_2_7B = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32, 4 * 32000 * 4096)
PUBLISHED = (
    {"paper": "AnyBCQ", "model": "Llama-3.1-8B", "precisions": [2, 3, 4], "separate_gb": 9.85, "one_store_gb": 4.99},
    {"paper": "Any-Precision", "model": "Llama-2-7B", "precisions": [3, 4, 5, 6, 7, 8], "separate_gb": 29.9,
     "one_store_gb": 8.4},
)  # fmt: skip


def _level_bytes(rows: int, columns: int, precision: int, group_size: int | None) -> int:
    """Return the bytes of float16 levels: scales without offsets, or a codebook when group_size is None."""
    return 2 * rows * (2**precision if group_size is None else precision * group_count(group_size, columns))


def published_memory() -> list[dict[str, Any]]:
    """Return the papers' memory tables beside the same models' matrices in anybits' format, from shapes alone."""
    rows = []
    for facts, (shapes, blocks, _), group_size in zip(PUBLISHED, (LLAMA_31_8B, LLAMA_2_7B), (128, None), strict=True):
        precisions: list[int] = facts["precisions"]  # type: ignore[assignment]
        planes = blocks * sum(rows_ * bits.words(columns) * 4 for rows_, columns in shapes)
        levels = {p: blocks * sum(_level_bytes(n, k, p, group_size) for n, k in shapes) for p in precisions}
        separate = sum(p * planes + levels[p] for p in precisions)
        one = precisions[-1] * planes + sum(levels.values())
        ours = {"separate_bytes": separate, "one_store_bytes": one, "factor": separate / one}
        theirs = facts["separate_gb"] / facts["one_store_gb"]  # type: ignore[operator]
        rows.append(dict(facts) | {"published_factor": theirs, "anybits": ours})
    return rows


def memory(folder: str) -> dict[str, Any]:
    """Return the bytes of one store against separate models of its precisions, from the files' headers alone."""
    path = Path(folder)
    stored = read_stored_config(path)
    reader = CheckpointReader(checkpoint_files(path), stored)
    planes = {name for name in reader.names() if name.endswith(".planes")}
    levels = {p: sum(reader.stored_bytes(n) for n in reader.names() if n.endswith(f"s_{p}")) for p in stored.precisions}
    plane = sum(reader.stored_bytes(name) for name in planes) // stored.precisions[-1]
    rest = sum(reader.stored_bytes(name) for name in reader.names()) - plane * stored.precisions[-1]
    rest -= sum(levels.values())
    alone = {p: p * plane + levels[p] for p in stored.precisions}
    one = plane * stored.precisions[-1] + sum(levels.values())
    return {
        "precisions": list(stored.precisions),
        "alone_bytes": {str(p): size for p, size in alone.items()},
        "separate_bytes": sum(alone.values()),
        "one_store_bytes": one,
        "not_quantized_bytes": rest,
        "factor": sum(alone.values()) / one,
        "factor_with_not_quantized": (sum(alone.values()) + rest * len(alone)) / (one + rest),
    }


def bandwidth() -> float:
    """Return the bytes a second at which this machine's torch reads a tensor far larger than its caches."""
    tensor = torch.ones(1 << 26, dtype=torch.float32)
    return tensor.numel() * 4 / _seconds(lambda: tensor.sum(), 5)


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of a call, after a first that is not counted: others may share the machine."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def decoding_speed(model: Any, tokenizer: Any, prompt: str, tokens: int, repeats: int = 3) -> float:
    """Return greedy tokens a second of batch 1 at the active precision."""

    def run() -> int:
        return hf.generate_text(model, tokenizer, prompt, tokens)[1]

    return run() / _seconds(run, repeats)


def speeds(folder: str, precisions: Sequence[int], prompt: str, tokens: int, read: float) -> list[dict[str, Any]]:
    """Return tokens a second at each precision, and the share of `read` bytes a second that the planes make up."""
    model = hf.load_model(folder, dtype=torch.float32)
    tokenizer = hf.load_tokenizer(folder)
    facts = swapping.weight_facts(model)
    rows = []
    for p in precisions:
        with scoped(p):
            speed = decoding_speed(model, tokenizer, prompt, tokens)
        rows.append({"precision": p, "tokens_per_second": speed, "bandwidth_share": speed * facts[p][0] / read})
    return rows


def product_times(sizes: Sequence[int], precisions: str) -> list[dict[str, Any]]:
    """Return the timings of x `[1, K]` @ W.T for square matrices that wait in memory, not in a cache."""
    shapes = ",".join(f"{size}x{size}" for size in sizes)
    return [asdict(timing) | {"size": timing.shape[0]} for timing in bench_kernels(shapes, precisions, rounds=3)]


def layout_costs(size: int) -> list[dict[str, Any]]:
    """Return seconds and bytes of one product: planes at 2, 4, 8 bits against torch's own bit-packed matrices."""
    rows: list[dict[str, Any]] = []
    for timing in bench_kernels(f"{size}x{size}", "2,4,8", methods=("anybcq",), rounds=3):
        rows.append({"layout": f"planes ({timing.backend})", "precision": timing.precision})
        rows[-1] |= {"seconds": timing.us / 1e6, "bytes": timing.bytes}
    return [{"size": size} | row for row in (*rows, *_packed_products(size))]


def _packed_products(size: int) -> list[dict[str, Any]]:
    """Time torch's int4 and int8 products, each call with another copy so that none waits in a cache."""
    ops, x, rows = torch.ops.aten, torch.randn(1, size).bfloat16(), []
    if hasattr(ops, "_weight_int4pack_mm_for_cpu"):
        codes = torch.randint(0, 16, (size, size), dtype=torch.int32)
        packed = ops._convert_weight_to_int4pack_for_cpu(codes, 1)
        levels = torch.rand(max(size // 128, 1), size, 2).bfloat16()
        copies = itertools.cycle([packed.clone() for _ in range(copies_beyond_cache(packed.numel()))])
        group = min(size, 128)
        seconds = median(times_of(lambda: ops._weight_int4pack_mm_for_cpu(x, next(copies), group, levels)))
        rows.append({"layout": "bit-packed (torch int4)", "precision": 4, "seconds": seconds})
        rows[-1]["bytes"] = packed.numel() + levels.numel() * 2
    if hasattr(ops, "_weight_int8pack_mm"):
        whole, scales = torch.randint(-128, 127, (size, size), dtype=torch.int8), torch.rand(size).bfloat16()
        turns = itertools.cycle([whole.clone() for _ in range(copies_beyond_cache(whole.numel()))])
        seconds = median(times_of(lambda: ops._weight_int8pack_mm(x, next(turns), scales)))
        rows.append({"layout": "bit-packed (torch int8)", "precision": 8, "seconds": seconds})
        rows[-1]["bytes"] = whole.numel() + scales.numel() * 2
    return rows
