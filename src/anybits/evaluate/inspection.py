"""What a checkpoint stores, read from headers alone: what `anybits inspect` shows."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from anybits.bits import WORD
from anybits.checkpoint import CheckpointReader, checkpoint_files, read_stored_config


def inspect_checkpoint(folder: str) -> dict[str, Any]:
    """Return method, precisions with the bytes each reads, and stored bytes by kind, as a JSON object."""
    path = Path(folder)
    stored = read_stored_config(path)
    reader = CheckpointReader(checkpoint_files(path), stored)
    sizes: Counter[str] = Counter()
    for name in reader.names():
        kind = re.search(r"\.(planes|scales_\d|offsets_\d|centroids_\d)$", name)
        sizes[kind.group(1) if kind else "not quantized"] += reader.stored_bytes(name)
    padded = sum(WORD * _weights(reader.shape(f"{m}.planes")) for m in reader.modules())
    planes = stored.precisions[-1]
    rows = []
    for p in stored.precisions:
        levels = sum(size for kind, size in sizes.items() if kind.endswith(f"_{p}"))
        size = sizes["planes"] * p // planes + levels
        rows.append({"precision": p, "weight_bytes": size, "bits_per_weight": round(8 * size / max(padded, 1), 4)})
    return {
        "model": folder,
        "method": stored.method,
        "format_version": stored.format_version,
        "group_size": stored.group_size,
        "symmetric": stored.symmetric,
        "precisions": rows,
        "quantized_modules": len(reader.modules()),
        "quantized_weights": padded,
        "stored_bytes": dict(sorted(sizes.items())),
        "recipe": dict(stored.recipe),
    }


def _weights(planes: tuple[int, ...]) -> int:
    """Return the words of one plane."""
    return planes[1] * planes[2]
