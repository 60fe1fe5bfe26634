"""Writes a random-weight Llama in llama.cpp's file format, with the types that its own quantizer would choose.

python benchmarks/random_gguf.py BUILD FILE --mix q4_K_M --layers 4

BUILD is a folder with llama.cpp's shared libraries, which quantize. Sizes are Llama-3.1-8B's but for the number of
layers. Every matrix repeats a few distinct rows: the time of a product does not depend on the values.
"""

from __future__ import annotations

import argparse
import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ggml_products import Library

HIDDEN, MIDDLE, HEADS, KV_HEADS, VOCABULARY, POSITIONS = 4096, 14336, 32, 8, 128256, 131072
KV = HIDDEN // HEADS * KV_HEADS
TYPES = {"f32": 0, "q2_K": 10, "q3_K": 11, "q4_K": 12, "q6_K": 14}
"""Numbers of enum ggml_type."""

MIXES = ("q2_K", "q4_K_M")
_DISTINCT_ROWS = 32
_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8


def more_bits(layer: int, layers: int) -> bool:
    """Return whether llama.cpp's mixes give this layer's sensitive matrices more bits: half of the layers."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensors(mix: str, layers: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (name, type, shape [rows, columns] or [columns]) as llama.cpp's quantizer leaves them."""
    base, value, out, down = {
        "q2_K": ("q2_K", "q4_K", "q3_K", "q3_K"),
        "q4_K_M": ("q4_K", "q6_K", "q4_K", "q6_K"),
    }[mix]
    yield "token_embd.weight", base, (VOCABULARY, HIDDEN)
    for layer in range(layers):
        more = mix == "q2_K" or more_bits(layer, layers)
        block = {
            "attn_q": (base, (HIDDEN, HIDDEN)),
            "attn_k": (base, (KV, HIDDEN)),
            "attn_v": (value if more else base, (KV, HIDDEN)),
            "attn_output": (out, (HIDDEN, HIDDEN)),
            "ffn_gate": (base, (MIDDLE, HIDDEN)),
            "ffn_up": (base, (MIDDLE, HIDDEN)),
            "ffn_down": (down if more else base, (HIDDEN, MIDDLE)),
            "attn_norm": ("f32", (HIDDEN,)),
            "ffn_norm": ("f32", (HIDDEN,)),
        }
        for name, (kind, shape) in block.items():
            yield f"blk.{layer}.{name}.weight", kind, shape
    yield "output_norm.weight", "f32", (HIDDEN,)
    yield "output.weight", "q6_K", (VOCABULARY, HIDDEN)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _entry(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    kind = _FLOAT32 if isinstance(value, float) else _UINT32
    return _string(key) + struct.pack("<If" if kind == _FLOAT32 else "<II", kind, value)


def header(listed: list[tuple[str, str, tuple[int, ...], int]], layers: int) -> bytes:
    """Return all of the file that stands before the tensors; listed: name, type, shape and bytes."""
    facts = {
        "general.architecture": "llama", "llama.block_count": layers, "llama.context_length": POSITIONS,
        "llama.embedding_length": HIDDEN, "llama.feed_forward_length": MIDDLE, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HIDDEN // HEADS, "llama.rope.freq_base": 5e5, "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(listed), len(facts)), *(_entry(*fact) for fact in facts.items())]
    offset = 0
    for name, kind, shape, size in listed:
        dims = shape[::-1]
        parts.append(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[kind], offset))
        offset += size + -size % _ALIGNMENT
    whole = b"".join(parts)
    return whole + b"\0" * (-len(whole) % _ALIGNMENT)


def write(file: BinaryIO, ggml: Library, mix: str, layers: int) -> None:
    """Write the whole model."""
    rng = np.random.default_rng(5)
    rows: dict[tuple[str, int], np.ndarray] = {}
    listed = []
    for name, kind, shape in tensors(mix, layers):
        columns = shape[-1]
        if (kind, columns) not in rows:
            rows[kind, columns] = _packed(ggml, rng, kind, columns)
        count = shape[0] if len(shape) == 2 else 1
        listed.append((name, kind, shape, count * rows[kind, columns].shape[1]))
    file.write(header(listed, layers))
    for _, kind, shape, size in listed:
        distinct = rows[kind, shape[-1]]
        whole, rest = divmod(size, distinct.nbytes)
        for _ in range(whole):
            file.write(distinct.tobytes())
        file.write(distinct.tobytes()[:rest] + b"\0" * (-size % _ALIGNMENT))


def _packed(ggml: Library, rng: np.random.Generator, kind: str, columns: int) -> np.ndarray:
    """Return distinct rows `[_DISTINCT_ROWS, bytes]` of a type."""
    if kind == "f32":
        return np.ones((1, columns), np.float32).view(np.uint8)
    floats = (rng.standard_normal((_DISTINCT_ROWS, columns)) * 0.02).astype(np.float32)
    size = ggml("ggml_row_size", ctypes.c_int(TYPES[kind]), ctypes.c_int64(columns))
    packed = np.empty((_DISTINCT_ROWS, size), np.uint8)
    ggml(
        "ggml_quantize_chunk", ctypes.c_int(TYPES[kind]), floats.ctypes.data, packed.ctypes.data,
        ctypes.c_int64(0), ctypes.c_int64(_DISTINCT_ROWS), ctypes.c_int64(columns), None,
    )  # fmt: skip
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--mix", choices=MIXES, default="q4_K_M")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    with arguments.file.open("wb") as file:
        write(file, Library(arguments.build), arguments.mix, arguments.layers)


if __name__ == "__main__":
    main()
