"""The tensors that hold keys and values, and the memory that their blocks take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from anybits.errors import AnybitsError
from anybits.serve.blocks import BLOCK


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a position: `heads` keys of `key_dim` numbers and values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """One pool of keys `[Hkv, blocks * BLOCK, D]` and one of values a layer.

    Heads come first, so that the positions of a sequence are gathered by one index_select and multiply
    without another copy.
    """

    def __init__(self, shapes: Mapping[int, LayerShape], blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        slots = blocks * BLOCK
        self.keys = {i: torch.zeros(s.heads, slots, s.key_dim, dtype=dtype, device=device) for i, s in shapes.items()}
        self.values = {
            i: torch.zeros(s.heads, slots, s.value_dim, dtype=dtype, device=device) for i, s in shapes.items()
        }

    def clear(self, blocks: list[int]) -> None:
        """Zero `blocks`: a former owner's NaN would reach the new one even through masked positions."""
        if not blocks:
            return
        start = torch.tensor(blocks)[:, None] * BLOCK
        slots = (start + torch.arange(BLOCK)).flatten().to(next(iter(self.keys.values())).device)
        for pool in (*self.keys.values(), *self.values.values()):
            pool.index_fill_(1, slots, 0.0)


def block_bytes(shapes: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Return the bytes of one block over all layers."""
    return BLOCK * dtype.itemsize * sum(s.heads * (s.key_dim + s.value_dim) for s in shapes.values())


def blocks_in(budget_bytes: float, shapes: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Return the blocks that fit into `budget_bytes`; raise AnybitsError when none does."""
    blocks = int(budget_bytes // block_bytes(shapes, dtype))
    if blocks < 1:
        raise AnybitsError(
            f"the KV cache of {budget_bytes / 1e9:.3g} GB is too small: "
            f"one block of {BLOCK} positions takes {block_bytes(shapes, dtype) / 1e9:.3g} GB"
        )
    return blocks
