"""Perplexity and, against a reference model, divergence: one pass over the text for all precisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from anybits.errors import AnybitsError

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Tokens int64 [1, T] -> float logits [1, T, V]."""


@dataclass
class Score:
    """Sums over predicted tokens: negative log-likelihood, KL divergence from the reference, equal top choices."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(
        self, logits: torch.Tensor, window: torch.Tensor, reference: torch.Tensor | None, fresh: int | None = None
    ) -> None:
        """Count the last `fresh` tokens of a window, None for all that it predicts.

        logits: `[1, T, V]`; reference: log-probabilities `[T-1, V]`.
        """
        skipped = 0 if fresh is None else window.shape[1] - 1 - fresh
        logp = log_probabilities(logits)[skipped:]
        wanted = window[0, 1 + skipped :, None].to(logp.device)
        reference = None if reference is None else reference[skipped:]
        self.tokens += wanted.numel()
        self.nll -= float(logp.gather(1, wanted).double().sum())
        if reference is not None:
            self.kl += float((reference.exp() * (reference - logp)).double().sum())
            self.agreed += int((reference.argmax(-1) == logp.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(min(self.nll / self.tokens, 700.0))

    @property
    def kl_divergence(self) -> float:
        """Mean KL(reference || this) a token, in nats."""
        return self.kl / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens where both models prefer the same next token."""
        return self.agreed / self.tokens


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return float32 log-probabilities `[T-1, V]` of the tokens that follow each but the last position."""
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)


def split_windows(ids: Sequence[int], seq_len: int, max_tokens: int | None) -> list[torch.Tensor]:
    """Return windows int64 `[1, seq_len]` without overlap; a last shorter one is left out unless it is the only one."""
    tokens = _tokens(ids, seq_len, max_tokens)
    windows = [w[None] for w in tokens.split(seq_len) if len(w) == seq_len]
    return windows or [tokens[None]]


def stride_windows(
    ids: Sequence[int], seq_len: int, stride: int, max_tokens: int | None
) -> tuple[list[torch.Tensor], list[int]]:
    """Return overlapping windows int64 `[1, <= seq_len]`, `stride` apart, and how many last tokens each is to count.

    Every token but the first of the text is counted once, with at least seq_len - stride tokens before it where
    the text has them. The last window ends with the text.
    """
    if not 1 <= stride < seq_len:
        raise AnybitsError(f"stride {stride} must be at least 1 and below the sequence length {seq_len}")
    tokens = _tokens(ids, seq_len, max_tokens)
    windows, fresh, counted = [], [], 1
    for start in range(0, len(tokens), stride):
        end = min(start + seq_len, len(tokens))
        windows.append(tokens[None, start:end])
        fresh.append(end - counted)
        counted = end
        if end == len(tokens):
            break
    return windows, fresh


def _tokens(ids: Sequence[int], seq_len: int, max_tokens: int | None) -> torch.Tensor:
    if seq_len < 2:
        raise AnybitsError(f"sequence length {seq_len} is too short: each window predicts all but its first token")
    tokens = torch.tensor(list(ids[:max_tokens]), dtype=torch.long)
    if len(tokens) < 2:
        raise AnybitsError(f"the text has {len(tokens)} tokens: at least 2 are needed to predict one")
    return tokens


@torch.no_grad()
def score(
    windows: Sequence[torch.Tensor],
    candidates: Sequence[Logits],
    reference: Logits | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    fresh: Sequence[int] | None = None,
) -> tuple[list[Score], Score | None]:
    """Return a Score for each candidate, in order, and the reference's own (or None without one).

    fresh: for each window, how many of its last tokens count; None for all that it predicts.
    """
    scores = [Score() for _ in candidates]
    own = Score() if reference is not None else None
    for index, window in enumerate(windows):
        wanted, last = None, None if fresh is None else fresh[index]
        if reference is not None and own is not None:
            logits = reference(window)
            own.add(logits, window, None, last)
            wanted = log_probabilities(logits)
        for candidate, counted in zip(candidates, scores, strict=True):
            counted.add(candidate(window), window, wanted, last)
        progress(index + 1, len(windows))
    return scores, own
