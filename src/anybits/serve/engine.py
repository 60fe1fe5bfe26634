"""The engine: one forward a step over rows of many requests, each row at its own precision. No HTTP here."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anybits.config import Single
from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.integrations.attention import packed_attention, use_packed_attention
from anybits.linear import PlaneStack
from anybits.precision import Precision, precision
from anybits.serve.attention import PagedAttention, ShapeProbe, Span
from anybits.serve.blocks import BLOCK, BlockPool, blocks_for
from anybits.serve.kv import KVCache, blocks_in
from anybits.serve.scheduler import Scheduler
from anybits.serve.sequence import Chunk, Sequence, Token
from anybits.serve.speculation import Speculation, can_draft, reach
from anybits.serve.tiles import tile_linears

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the engine may use: sequences and rows of one step, positions of one sequence, bytes of KV.

    max_model_len None: what the model was made for, as far as the KV cache holds it; reuse_prefixes: whether what
    one request computed serves others that begin with the same tokens at the same precisions.
    """

    max_batch: int = 32
    max_rows: int = 512
    max_model_len: int | None = None
    kv_cache_bytes: float = 2e9
    reuse_prefixes: bool = True


class Engine:
    """Continuous batching over one model; not thread-safe: one thread adds, steps and cancels."""

    def __init__(self, model: Any, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        use_packed_attention(model)
        tile_linears(model)
        self.model, self.device = model, next(model.parameters()).device
        self.precisions: tuple[int, ...] = tuple(model.precisions)
        self.profiles: tuple[str, ...] = tuple(model.profiles)
        probe = ShapeProbe()
        self._run([0], [0], self.precisions[-1], [0], probe)
        if not probe.shapes:
            raise AnybitsError(f"{type(model).__name__} has no attention layer that can be served")
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 4096)
        wanted = limits.max_model_len or longest
        if wanted > longest:
            raise AnybitsError(
                f"max-model-len {wanted} is more than the {longest} positions that the model was made for"
            )
        useful = limits.max_batch * blocks_for(wanted)
        blocks = min(blocks_in(limits.kv_cache_bytes, probe.shapes, dtype), useful)
        if limits.max_model_len and blocks < blocks_for(wanted):
            raise AnybitsError(f"max-model-len {wanted} needs a larger KV cache: it holds {blocks * BLOCK} positions")
        self.max_model_len = min(wanted, blocks * BLOCK)
        self.cache = KVCache(probe.shapes, blocks, dtype, self.device)
        mixes = not any(isinstance(m, PlaneStack) for m in model.modules())
        self.failed: list[Sequence] = []
        """Sequences that broke the last step; they are out of the batch, and their blocks are free."""
        max_rows = max(limits.max_rows, limits.max_batch)
        pool, reuse = BlockPool(blocks), limits.reuse_prefixes
        self.scheduler = Scheduler(pool, limits.max_batch, max_rows, not mixes, probe.window, reuse)
        self.speculation = Speculation(self._rows, max_rows)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raise AnybitsError when it can never run."""
        if not sequence.prompt:
            raise AnybitsError("the prompt is empty: give at least one token")
        if len(sequence.prompt) + sequence.max_tokens > self.max_model_len:
            raise AnybitsError(
                f"the prompt has {len(sequence.prompt)} tokens and max_tokens is {sequence.max_tokens}: "
                f"together they may be at most {self.max_model_len}"
            )
        self.scheduler.add(sequence)

    def step(self) -> list[Token]:
        """Run one forward and return the tokens that it brought; an idle engine returns none."""
        self.failed = []
        chunks = self.scheduler.schedule()
        alone = chunks[0].sequence if len(self.scheduler.running) == len(chunks) == 1 else None
        if alone is not None and can_draft(alone):
            return self._speculate(alone)
        self.cache.clear(self.scheduler.taken)
        return [token for part, logits in self._forwards(chunks) for token in self.advance(part, logits)]

    def _speculate(self, sequence: Sequence) -> list[Token]:
        """Run one round of drafts and return the tokens that stand, up to the one that ends the sequence."""
        self.scheduler.extend(sequence, reach(sequence))
        self.cache.clear(self.scheduler.taken)
        now = sequence.choice.precision
        try:
            new = self.speculation.round(sequence, now)
        except Exception:
            self._fail(sequence)
            return []
        tokens = []
        for token in new:
            sequence.append(token, now)
            tokens.append(Token(sequence, token, now, None, sequence.finish))
            if sequence.finish is not None:
                break
        stand = min(sequence.computed, len(sequence.tokens)) - len(sequence.computed_at)
        self.scheduler.filled(sequence, [now] * stand)
        if sequence.finish is not None:
            self.scheduler.remove(sequence)
        return tokens

    def _forwards(self, chunks: list[Chunk]) -> Iterator[tuple[list[Chunk], torch.Tensor]]:
        """Yield all chunks with their logits; where the forward fails, its halves, until the culprits are alone.

        Running a chunk again is harmless: it writes the same keys and values to the same places.
        """
        if not chunks:
            return
        try:
            logits = self.forward(chunks)
        except Exception:
            if len(chunks) == 1:
                self._fail(chunks[0].sequence)
            else:
                yield from self._forwards(chunks[: len(chunks) // 2])
                yield from self._forwards(chunks[len(chunks) // 2 :])
        else:
            yield chunks, logits

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence whose rows or whose sampling raise, from within the handler of its exception."""
        logger.exception("a request failed alone; the others of its step go on")
        self.cancel(sequence, "error")
        self.failed.append(sequence)

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """End a sequence now: its slot and blocks are free for the next step."""
        sequence.finish = sequence.finish or reason
        self.scheduler.remove(sequence)

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Return float32 logits `[C, V]`, one row for each complete chunk."""
        ids = [t for c in chunks for t in c.sequence.tokens[c.start : c.stop]]
        positions = [p for c in chunks for p in range(c.start, c.stop)]
        precisions = [p for c in chunks for p in c.precisions]
        spans, keep, row = [], [], 0
        for chunk in chunks:
            rows = chunk.stop - chunk.start
            spans.append(Span(row, row + rows, chunk.start, chunk.sequence.blocks))
            row += rows
            keep += [row - 1] * chunk.complete
        same = len(set(precisions)) == 1
        mixed = precisions[0] if same else self.model.precision_codes(precisions).to(self.device)
        return self._run(ids, positions, mixed, keep, PagedAttention(spans, self.cache, self.device))

    def _rows(self, sequence: Sequence, tokens: list[int], rows: Precision) -> torch.Tensor:
        """Return float32 logits `[n, V]` of n tokens after the computed ones, each attending as if it ran alone."""
        positions = list(range(sequence.computed, sequence.computed + len(tokens)))
        spans = [Span(row, row + 1, position, sequence.blocks) for row, position in enumerate(positions)]
        attention = PagedAttention(spans, self.cache, self.device)
        return self._run(tokens, positions, rows, list(range(len(tokens))), attention).cpu()

    @torch.inference_mode()
    def _run(
        self, ids: list[int], positions: list[int], rows: Precision, keep: list[int], attention: Any
    ) -> torch.Tensor:
        on_device = [torch.tensor(t, dtype=torch.long, device=self.device) for t in (ids, positions, keep)]
        with precision(rows), packed_attention(attention):
            out = self.model(
                input_ids=on_device[0][None],
                position_ids=on_device[1][None],
                logits_to_keep=on_device[2],
                use_cache=False,
            )
        return out.logits[0].float()

    def advance(self, chunks: list[Chunk], logits: torch.Tensor) -> list[Token]:
        """Choose a token for every complete chunk, and free the sequences that end with it."""
        for chunk in chunks:
            self.scheduler.filled(chunk.sequence, chunk.precisions)
        complete = [c for c in chunks if c.complete]
        likeliest = logits.argmax(-1).tolist()
        tokens = []
        for row, chunk in enumerate(complete):
            sequence, logprobs, token = chunk.sequence, None, likeliest[row]
            try:
                if not sequence.sampler.plain:
                    token, logprobs = sequence.sampler.choose(logits[row].cpu(), sequence.counts)
            except Exception:
                self._fail(sequence)
                continue
            sequence.append(token, chunk.precisions[-1])
            if sequence.finish is not None:
                self.scheduler.remove(sequence)
            tokens.append(Token(sequence, token, chunk.precisions[-1], logprobs, sequence.finish))
        return tokens

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    def kv_positions(self) -> Counter[Single]:
        """Return precision -> positions of KV in use by sequences that now run at it; shared blocks count once."""
        held: dict[Single, set[int]] = defaultdict(set)
        for sequence in list(self.scheduler.running):
            held[sequence.choice.precision].update(sequence.blocks)
        return Counter({precision: len(blocks) * BLOCK for precision, blocks in held.items()})


def load_engine(
    path: str | Path, limits: Limits, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Engine, Any, frozenset[int]]:
    """Return an engine for the model at `path`, its tokenizer, and the tokens that end a text."""
    model = hf.load_model(path, None, **({} if dtype is None else {"dtype": dtype})).to(device).eval()
    tokenizer = hf.load_tokenizer(path)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    stops = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return Engine(model, limits), tokenizer, stops
