"""What decoding needs of a model: rows through it at a precision, and a KV cache that can be shortened."""

from __future__ import annotations

from typing import Protocol

import torch

from anybits.precision import Precision


class Stepper(Protocol):
    """One sequence in one KV cache, whose entries may come from any precision."""

    def forward(self, tokens: list[int], precision: Precision) -> torch.Tensor:
        """Append `tokens` to the cache at `precision` and return float32 logits `[len(tokens), V]`."""

    def drop(self, count: int) -> None:
        """Forget the last `count` positions of the cache."""
