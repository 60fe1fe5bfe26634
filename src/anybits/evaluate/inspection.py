"""What a checkpoint stores, read from headers alone: what `anybits inspect` shows."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from anybits.bits import WORD
from anybits.checkpoint import CheckpointReader, checkpoint_files, read_stored_config
from anybits.config import StoredConfig
from anybits.quantize.allocation import effective_bits, total_bytes
from anybits.weight import LEVEL_KINDS


def inspect_checkpoint(folder: str) -> dict[str, Any]:
    """Return method, precisions and profiles with the bytes each reads, and stored bytes by kind, as a JSON object."""
    path = Path(folder)
    stored = read_stored_config(path)
    reader = CheckpointReader(checkpoint_files(path), stored)
    stored.check_modules(reader.modules())
    kinds: Counter[str] = Counter()
    for name in reader.names():
        kind = re.search(rf"\.(planes|({'|'.join(LEVEL_KINDS)})_\d)$", name)
        kinds[kind.group(1) if kind else "not quantized"] += reader.stored_bytes(name)
    padded = sum(WORD * _weights(reader.shape(f"{m}.planes")) for m in reader.modules())
    sizes = module_bytes(reader)
    rows = []
    for p in stored.precisions:
        size = total_bytes(dict.fromkeys(sizes, p), sizes)
        rows.append({"precision": p, "weight_bytes": size, "bits_per_weight": round(8 * size / max(padded, 1), 4)})
    return {
        "model": folder,
        "method": stored.method,
        "format_version": stored.format_version,
        "group_size": stored.group_size,
        "symmetric": stored.symmetric,
        "scale_bits": stored.scale_bits if stored.group_size is not None else None,
        "precisions": rows,
        "profiles": _profiles(stored, sizes, padded),
        "quantized_modules": len(reader.modules()),
        "quantized_weights": padded,
        "stored_bytes": dict(sorted(kinds.items())),
        "recipe": dict(stored.recipe),
    }


def module_bytes(reader: CheckpointReader) -> dict[str, dict[int, int]]:
    """Return quantized module -> precision -> bytes of the planes and levels that it reads."""
    stored, known = reader.stored, set(reader.names())
    sizes: dict[str, dict[int, int]] = {}
    for module in reader.modules():
        plane = reader.stored_bytes(f"{module}.planes") // stored.precisions[-1]
        sizes[module] = {}
        for p in stored.precisions:
            levels = known & {f"{module}.{kind}_{p}" for kind in LEVEL_KINDS}
            sizes[module][p] = p * plane + sum(map(reader.stored_bytes, levels))
    return sizes


def _profiles(stored: StoredConfig, sizes: dict[str, dict[int, int]], weights: int) -> list[dict[str, Any]]:
    rows = []
    for name, profile in stored.profiles.items():
        size = total_bytes(profile, sizes)
        rows.append(
            {
                "profile": name,
                "weight_bytes": size,
                "bits_per_weight": round(8 * size / max(weights, 1), 4),
                "effective_bits": round(effective_bits(size, sizes), 4),
                "matrices": {str(p): count for p, count in sorted(Counter(profile.values()).items())},
            }
        )
    return rows


def _weights(planes: tuple[int, ...]) -> int:
    """Return the words of one plane."""
    return planes[1] * planes[2]
