"""Blocks of KV positions by number: who holds them, and which free ones still hold a prefix worth reusing."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from anybits.config import Single

BLOCK = 16
"""Positions of a block: small enough to waste little on the last block of a sequence."""


def blocks_for(positions: int) -> int:
    """Return the blocks that `positions` need."""
    return -(-positions // BLOCK)


def block_key(before: bytes, tokens: Sequence[int], precisions: Sequence[Single]) -> bytes:
    """Return 32 bytes that stand for everything a full block of keys and values was computed from.

    before: key of the block before it, empty for the first; tokens, precisions: of the block's BLOCK positions. Blocks
    of one key hold the same numbers, since a position's depend on the tokens up to it and on the precision of each.
    """
    key = blake2b(before, digest_size=32)
    key.update(array("q", tokens).tobytes())
    key.update(repr(list(precisions)).encode())  # 2 and the profile "2" are not the same
    return key.digest()


class BlockPool:
    """Hands out block numbers and counts their holders; knows nothing of tensors.

    A block that was kept under a key outlives its last holder: it is free, yet found again under that key until its
    place is needed, the one that was held last going last.
    """

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._empty = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds, cached ones among them."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that are found under their key."""
        return len(self._cached)

    def take(self, count: int) -> list[int]:
        """Return `count` blocks, each with one holder; the caller has checked that as many are free."""
        assert count <= self.free
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def keep(self, block: int, key: bytes) -> None:
        """Let `block`, which is held and full, be found under `key`; where another block is already, that one stays."""
        if key not in self._block_of:
            self._block_of[key], self._key_of[block] = block, key

    def find(self, key: bytes) -> int | None:
        """Return the block that is kept under `key`, with one holder more, or None."""
        block = self._block_of.get(key)
        if block is not None:
            self._holders[block] += 1
            self._cached.pop(block, None)
        return block

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take one holder from each of `blocks`, of one sequence in order: what stands last in it is evicted first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._empty.append(block)
