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

    def add(self, logits: torch.Tensor, window: torch.Tensor, reference: torch.Tensor | None) -> None:
        """Count one window: log-probabilities from logits `[1, T, V]`; reference: log-probabilities `[T-1, V]`."""
        logp = log_probabilities(logits)
        wanted = window[0, 1:, None].to(logp.device)
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
    if seq_len < 2:
        raise AnybitsError(f"sequence length {seq_len} is too short: each window predicts all but its first token")
    tokens = torch.tensor(list(ids[:max_tokens]), dtype=torch.long)
    if len(tokens) < 2:
        raise AnybitsError(f"the text has {len(tokens)} tokens: at least 2 are needed to predict one")
    windows = [w[None] for w in tokens.split(seq_len) if len(w) == seq_len]
    return windows or [tokens[None]]


@torch.no_grad()
def score(
    windows: Sequence[torch.Tensor],
    candidates: Sequence[Logits],
    reference: Logits | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Score], Score | None]:
    """Return a Score for each candidate, in order, and the reference's own (or None without one)."""
    scores = [Score() for _ in candidates]
    own = Score() if reference is not None else None
    for index, window in enumerate(windows):
        wanted = None
        if reference is not None and own is not None:
            logits = reference(window)
            own.add(logits, window, None)
            wanted = log_probabilities(logits)
        for candidate, counted in zip(candidates, scores, strict=True):
            counted.add(candidate(window), window, wanted)
        progress(index + 1, len(windows))
    return scores, own
