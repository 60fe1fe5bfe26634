"""Which rows run next: sequences that decode, then prompts in pieces, as far as rows and KV blocks reach."""

from __future__ import annotations

from collections import deque

from anybits.config import Single, precision_order
from anybits.serve.blocks import BLOCK, BlockPool, blocks_for
from anybits.serve.prefixes import Prefixes
from anybits.serve.sequence import Chunk, Sequence


class Scheduler:
    """Keeps arrival order; when blocks run out, the youngest sequence gives its own back and starts again later.

    uniform: every step runs at one precision, for models whose layers cannot mix rows (fused experts); window: no
    layer sees further back than as many positions, its own included; reuse: whether prefixes are.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch: int,
        max_rows: int,
        uniform: bool = False,
        window: int | None = None,
        reuse: bool = True,
    ) -> None:
        self.pool, self.max_batch, self.max_rows, self.uniform = pool, max_batch, max_rows, uniform
        self.window, self.prefixes = window, Prefixes(pool, reuse)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.taken: list[int] = []
        """Blocks handed out by the last `schedule`, still with their former owners' numbers."""
        self._last_precision = (0.0, "")

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """Return the rows of the next step, in at most `max_rows` rows over at most `max_batch` sequences.

        Sequences that decode always have their row; what is left goes to prompts, the oldest first. A prompt whose
        next block an older one computes in this step waits for it.
        """
        self.taken = []
        self._admit()
        self.prefixes.begin()
        for sequence in self.running:
            self.prefixes.reuse(sequence)
        only = self._next_precision()
        room = self.max_rows - sum(s.pending == 1 for s in self.running)
        chunks: list[Chunk] = []
        index = 0
        while index < len(self.running):  # the list shrinks at its end when a sequence gives way
            sequence = self.running[index]
            index += 1
            rows = 1 if sequence.pending == 1 else min(sequence.pending, room)
            chunk = self._chunk(sequence, rows, only)
            if chunk is None or self.prefixes.waits(sequence) or not self._reserve(sequence, chunk.stop):
                continue
            self.prefixes.note(chunk)
            room -= len(chunk.precisions) if sequence.pending > 1 else 0
            chunks.append(chunk)
        return chunks

    def extend(self, sequence: Sequence, positions: int) -> None:
        """Give `sequence`, the only one that runs, blocks for `positions` that it may need in this step."""
        assert self.running == [sequence]
        self._reserve(sequence, positions)

    def filled(self, sequence: Sequence, precisions: list[Single]) -> None:
        """Take over that the next rows of `sequence` are in the KV cache, at `precisions`."""
        self.prefixes.keep(sequence, precisions)
        if self.window is None:
            return
        behind = min(max(sequence.computed - self.window + 1, 0) // BLOCK, len(sequence.blocks) - 1)
        if behind > sequence.behind:
            self.pool.give_back(sequence.blocks[sequence.behind : behind])
            sequence.blocks[:behind] = sequence.blocks[behind : behind + 1] * behind
            sequence.behind = behind

    def _chunk(self, sequence: Sequence, rows: int, only: Single | None) -> Chunk | None:
        precisions = sequence.row_precisions(sequence.computed, sequence.computed + rows)
        if only is not None:
            same = next((i for i, p in enumerate(precisions) if p != only), rows)
            precisions = precisions[:same]
        if not precisions:
            return None
        return Chunk(sequence, sequence.computed, sequence.computed + len(precisions), precisions)

    def _admit(self) -> None:
        """Start waiting sequences while there is a place, and blocks for all their present tokens."""
        promised = sum(max(blocks_for(len(s.tokens)) - len(s.blocks), 0) for s in self.running)
        while self.waiting and len(self.running) < self.max_batch:
            first = self.waiting[0]
            self.prefixes.reuse(first)
            promised += blocks_for(len(first.tokens)) - len(first.blocks)
            if promised > self.pool.free:
                self._release(first)
                return
            self.running.append(self.waiting.popleft())

    def _next_precision(self) -> Single | None:
        """Return the precision whose turn it is, going round those that running sequences need."""
        if not self.uniform or not self.running:
            return None
        needed = {s.row_precisions(s.computed, s.computed + 1)[0] for s in self.running}
        wanted = sorted(needed, key=precision_order)
        now = next((p for p in wanted if precision_order(p) > self._last_precision), wanted[0])
        self._last_precision = precision_order(now)
        return now

    def _reserve(self, sequence: Sequence, positions: int) -> bool:
        """Give `sequence` blocks for `positions`; return False when it had to give way itself."""
        missing = blocks_for(positions) - len(sequence.blocks)
        while missing > self.pool.free:
            youngest = self.running.pop()
            self._release(youngest)
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        new = self.pool.take(max(missing, 0))
        self.taken += new
        sequence.blocks += new
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks[sequence.behind :])
        sequence.restart()
