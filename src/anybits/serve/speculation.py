"""Drafts for a sequence that runs alone: a step is then a round of drafts and their verification (docs/dynamic.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from anybits.config import Single, precision_order
from anybits.decode.choice import Choice
from anybits.decode.draft_length import MAX_DRAFT, AdaptiveLength, DraftLength
from anybits.decode.speculation import speculate
from anybits.decode.statistics import Statistics
from anybits.precision import Precision
from anybits.serve.sequence import Sequence

Forward = Callable[[Sequence, list[int], Precision], torch.Tensor]
"""(sequence, n tokens that follow its computed positions, precision) -> float32 logits [n, V] on the CPU."""


def can_draft(sequence: Sequence) -> bool:
    """Return whether the next token of `sequence` may come from a round of drafts.

    It asks for drafts below its present precision, it is decoding, and neither log probabilities nor a seed need the
    one pass a token that drafts do away with.
    """
    draft, sampling = sequence.draft, sequence.sampler.sampling
    if draft is None or precision_order(draft) >= precision_order(sequence.choice.precision):
        return False
    repeatable = sampling.temperature == 0 or sampling.seed is None
    return repeatable and sampling.logprobs is None and sequence.generated > 0 and sequence.pending == 1


def reach(sequence: Sequence) -> int:
    """Return the positions that a round may write to: the present tokens and the longest draft."""
    return min(len(sequence.tokens) + MAX_DRAFT, len(sequence.prompt) + sequence.max_tokens - 1)


@dataclass
class Drafting:
    """What was learned and counted at one precision with one draft precision, over all requests."""

    length: DraftLength
    statistics: Statistics = field(default_factory=Statistics)


class Speculation:
    """Runs rounds of drafts, each verified in one pass of at most `max_rows` rows."""

    def __init__(self, forward: Forward, max_rows: int) -> None:
        self._forward, self._max_rows = forward, max_rows
        self.length: Callable[[], DraftLength] = AdaptiveLength
        self.pairs: dict[tuple[Single, Single], Drafting] = {}
        """(precision, draft precision) -> what came of it."""

    @torch.inference_mode()
    def round(self, sequence: Sequence, precision: Single) -> list[int]:
        """Return the next tokens of `sequence`, at least one, without appending them.

        After it the first of them are in the KV cache at `precision`, and `computed` counts all but the last.
        """
        assert sequence.draft is not None
        pair = self.pairs.setdefault((precision, sequence.draft), Drafting(self.length()))
        tokens = list(sequence.tokens)
        limit = min(len(sequence.prompt) + sequence.max_tokens, len(tokens) + self._max_rows)
        stepper = _Paged(self._forward, sequence)
        rounds = speculate(
            stepper, _choice(sequence), tokens, precision, sequence.draft, pair.length, limit, pair.statistics
        )
        return next(rounds)


class _Paged:
    """One sequence of the engine, as anybits.decode wants it: what is dropped is overwritten by the next rows."""

    def __init__(self, forward: Forward, sequence: Sequence) -> None:
        self._forward, self._sequence = forward, sequence

    def forward(self, tokens: list[int], precision: Precision) -> torch.Tensor:
        """Append `tokens` to the cache at `precision` and return float32 logits `[len(tokens), V]`."""
        logits = self._forward(self._sequence, tokens, precision)
        self._sequence.computed += len(tokens)
        return logits

    def drop(self, count: int) -> None:
        """Forget the last `count` positions of the cache."""
        self._sequence.computed -= count


def _choice(sequence: Sequence) -> Choice:
    """Return how the sequence's sampler chooses, for tokens that are not yet appended."""
    sampler, prompt = sequence.sampler, len(sequence.prompt)
    if sampler.plain:
        return Choice()

    def processed(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return sampler.scores(logits[0], Counter(tokens[0, prompt:].tolist()))[None]

    return Choice(sampler.sampling.temperature > 0, processed)
