"""Prefix reuse: full blocks of keys and values outlive their request, and no later one computes them again.

A block is found under a key over its tokens, the precision of each, and all before it (`block_key`), so a prefix is
reused only by rows that would have computed it at the very same precisions. Paged blocks with chained hashes are
those of vLLM (arXiv 2309.06180, its automatic prefix caching); to compute a shared prefix once, sequences that arrive
together wait for the first of them.
"""

from __future__ import annotations

from anybits.config import Single
from anybits.serve.blocks import BLOCK, BlockPool, block_key
from anybits.serve.sequence import Chunk, Sequence


class Prefixes:
    """Finds blocks that a sequence need not compute, and keeps those that it has computed; `on` False does neither."""

    def __init__(self, pool: BlockPool, on: bool = True) -> None:
        self._pool, self._on = pool, on
        self._coming: set[bytes] = set()

    def reuse(self, sequence: Sequence) -> None:
        """Give `sequence` all kept blocks that its next rows would fill; its last token always stays to compute."""
        while (found := self._next(sequence)) is not None:
            key, precisions = found
            block = self._pool.find(key)
            if block is None:
                return
            sequence.blocks.append(block)
            sequence.keys.append(key)
            sequence.fill(precisions)
            if not sequence.generated:
                sequence.reused.update(precisions)

    def begin(self) -> None:
        """Start a step: no block is coming yet."""
        self._coming = set()

    def waits(self, sequence: Sequence) -> bool:
        """Return whether the next block of `sequence` is filled in this step by another one, so that it may wait."""
        found = self._next(sequence) if self._coming else None
        return found is not None and found[0] in self._coming

    def note(self, chunk: Chunk) -> None:
        """Take into account that `chunk` runs in this step."""
        if len(chunk.precisions) > 1:
            self._coming.update(self._keys(chunk.sequence, chunk.precisions))

    def keep(self, sequence: Sequence, precisions: list[Single]) -> None:
        """Take over rows of `sequence` that are in the cache now, at `precisions`, and keep the blocks they fill."""
        keys = self._keys(sequence, precisions)
        for block, key in zip(sequence.blocks[len(sequence.keys) :], keys, strict=False):
            self._pool.keep(block, key)
        sequence.keys += keys
        sequence.fill(precisions)

    def _next(self, sequence: Sequence) -> tuple[bytes, list[Single]] | None:
        """Return key and precisions of the block that `sequence` fills next, None where it would not begin one."""
        start, stop = sequence.computed, sequence.computed + BLOCK
        if not self._on or start % BLOCK or stop >= len(sequence.tokens) or len(sequence.blocks) * BLOCK != start:
            return None
        precisions = sequence.row_precisions(start, stop)
        return block_key(sequence.keys[-1] if start else b"", sequence.tokens[start:stop], precisions), precisions

    def _keys(self, sequence: Sequence, precisions: list[Single]) -> list[bytes]:
        """Return the keys of the blocks that are full once the next rows have been computed at `precisions`."""
        if not self._on:
            return []
        full = (len(sequence.computed_at) + len(precisions)) // BLOCK  # after a round of drafts `computed` is ahead
        if full == len(sequence.keys):
            return []
        start, before, keys = len(sequence.keys) * BLOCK, sequence.keys[-1] if sequence.keys else b"", []
        at = sequence.computed_at[start:] + precisions
        for first in range(0, full * BLOCK - start, BLOCK):
            tokens = sequence.tokens[start + first : start + first + BLOCK]
            before = block_key(before, tokens, at[first : first + BLOCK])
            keys.append(before)
        return keys
