"""Attention of one packed forward: each row sees the positions of its own sequence, read from KV blocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.nn import functional

from anybits.errors import AnybitsError
from anybits.serve.blocks import BLOCK, blocks_for
from anybits.serve.kv import KVCache, LayerShape
from anybits.serve.tiles import TILE_ROWS


def bucket(blocks: int) -> int:
    """Return the padded length in blocks, at most half as much again.

    Decode rows of one bucket attend together. It depends on the sequence alone, never on its neighbours,
    so a sequence is computed over the same padded length in every batch.
    """
    half = 1 << max(blocks - 1, 0).bit_length() - 1 if blocks > 1 else 1
    return next(size for size in (half, half + half // 2, 2 * half) if size >= blocks)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(cap(q @ k.T * scaling)) @ v `[..., Q, Dv]`; hidden: bool, broadcast to `[..., Q, L]`.

    sinks: `[..., Q, 1]`, the score of one more position, whose value is zero (gpt-oss, arXiv 2508.10925).
    In float32 the products have at least TILE_ROWS rows, so that a row's result does not depend on the others.
    """
    rows = query.shape[-2]
    padding = (0, 0, 0, max(TILE_ROWS - rows, 0) if query.dtype == torch.float32 else 0)
    scores = (functional.pad(query, padding) @ key.transpose(-1, -2))[..., :rows, :].float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        shares = scores.softmax(-1).to(value.dtype)
    else:
        beside = sinks.float().expand(*scores.shape[:-1], 1)
        shares = torch.cat((scores, beside), dim=-1).softmax(-1)[..., :-1].to(value.dtype)
    return (functional.pad(shares, padding) @ value)[..., :rows, :]


@dataclass(frozen=True)
class Span:
    """Rows `start ... stop - 1` of the packed batch: one sequence from position `first` on, in `blocks`."""

    start: int
    stop: int
    first: int
    blocks: list[int]


class _Part:
    """Sequences that attend together: `rows` `[B, Q]` of the batch over `blocks` `[B, L / BLOCK]` of the pools.

    distance `[B, Q, L]`: how far a place of the blocks lies before the row's position; negative is the future.
    """

    def __init__(self, rows: torch.Tensor, blocks: torch.Tensor, distance: torch.Tensor) -> None:
        self.rows, self.blocks = rows.flatten(), blocks.flatten()
        self.batch, self.rows_each = rows.shape
        self._distance = distance
        self._hidden: dict[tuple[int, int | None], torch.Tensor] = {}

    def hidden(self, shared: int, window: int | None) -> torch.Tensor:
        """Return bool `[B, shared * Q, L]`; made once for all layers of one kind."""
        kind = (shared, window)
        if kind not in self._hidden:
            hidden = self._distance < 0
            if window is not None:
                hidden |= self._distance >= window
            self._hidden[kind] = hidden.repeat(1, shared, 1)
        return self._hidden[kind]

    def gathered(self, pool: torch.Tensor) -> torch.Tensor:
        """Return `[Hkv, B, L, D]` from a pool `[Hkv, slots, D]`, in blocks: a fifth of the time of slots."""
        heads, _, dim = pool.shape
        chosen = pool.view(heads, -1, BLOCK * dim).index_select(1, self.blocks)
        return chosen.view(heads, self.batch, -1, dim)

    @classmethod
    def of(cls, spans: list[Span], length: int, device: torch.device) -> _Part:
        """Build for spans of equal numbers of rows, padded to `length` blocks."""
        # Padding repeats a sequence's own last block: no sequence ever touches the numbers of another.
        tables = [(s.blocks + s.blocks[-1:] * length)[:length] for s in spans]
        steps = torch.arange(spans[0].stop - spans[0].start)
        rows = torch.tensor([s.start for s in spans])[:, None] + steps
        positions = torch.tensor([s.first for s in spans])[:, None] + steps
        distance = positions[..., None] - torch.arange(length * BLOCK)
        return cls(rows.to(device), torch.tensor(tables).to(device), distance.to(device))


class PagedAttention:
    """Stores the keys and values of a batch and attends over them, for every layer of one forward."""

    def __init__(self, spans: list[Span], cache: KVCache, device: torch.device) -> None:
        self._cache = cache
        stored = [torch.arange(s.first, s.first + s.stop - s.start) for s in spans]
        slots = [torch.tensor(s.blocks)[p // BLOCK] * BLOCK + p % BLOCK for s, p in zip(spans, stored, strict=True)]
        self._new_slots = torch.cat(slots).to(device)
        together: dict[tuple[int, ...], list[Span]] = defaultdict(list)
        for span in spans:
            rows = span.stop - span.start
            length = bucket(blocks_for(span.first + rows))
            together[(length,) if rows == 1 else (length, span.start)].append(span)
        self._parts = [_Part.of(group, key[0], device) for key, group in together.items()]

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `[T, H, Dv]` for query `[H, T, D]`, key `[Hkv, T, D]` and value `[Hkv, T, Dv]`."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(1, self._new_slots, key)
        values.index_copy_(1, self._new_slots, value)
        heads, count, _ = query.shape
        out = query.new_empty(heads, count, value.shape[-1])
        for part in self._parts:
            attended = self._attend(part, query, keys, values, scaling, window, softcap, sinks)
            out[:, part.rows] = attended
        return out.transpose(0, 1)

    @staticmethod
    def _attend(
        part: _Part,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `[H, B * Q, Dv]`; the query heads that share a key head lie in one matrix product."""
        batch, rows = part.batch, part.rows_each
        kv_heads, shared = keys.shape[0], query.shape[0] // keys.shape[0]
        q = query.index_select(1, part.rows).view(kv_heads, shared, batch, rows, -1)
        q = q.transpose(1, 2).reshape(kv_heads, batch, shared * rows, -1)
        hidden = part.hidden(shared, window)
        if sinks is not None:
            sinks = sinks.view(kv_heads, 1, shared, 1).expand(-1, -1, -1, rows).reshape(kv_heads, 1, shared * rows, 1)
        out = attend(q, part.gathered(keys), part.gathered(values), hidden, scaling, softcap, sinks)
        out = out.reshape(kv_heads, batch, shared, rows, -1).transpose(1, 2)
        return out.reshape(query.shape[0], batch * rows, -1)


class ShapeProbe:
    """Records what every layer of a model keeps, from one forward of one row."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self._windows: list[int | None] = []

    @property
    def window(self) -> int | None:
        """How many positions the layer that sees furthest sees, its own included; None for all of them."""
        seen = [window for window in self._windows if window is not None]
        return max(seen) if seen and len(seen) == len(self._windows) else None

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return zeros `[T, H, Dv]` and remember the layer; AnybitsError for one that attends twice."""
        if layer in self.shapes:
            raise AnybitsError(f"layer {layer} attends more than once in a forward: such a model cannot be served")
        self.shapes[layer] = LayerShape(key.shape[0], key.shape[-1], value.shape[-1])
        self._windows.append(window)
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
