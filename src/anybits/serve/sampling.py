"""From a row of logits to a token: greedy, temperature, top-k, top-p, penalties, and the log probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

LEAST = -9999.0
"""Log probability of a token that cannot come: JSON has no minus infinity, and OpenAI uses this number."""


@dataclass(frozen=True)
class Sampling:
    """How one request chooses tokens; temperature 0 is greedy, top_k 0 means all, logprobs None means none."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None


@dataclass(frozen=True)
class Logprobs:
    """Log probability of the chosen token, and the most likely tokens with theirs, before temperature."""

    chosen: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request; its random numbers depend on its seed alone, not on the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the token is simply the most likely one, so that a batch can choose in one operation."""
        s = self.sampling
        penalties = s.frequency_penalty or s.presence_penalty
        return s.temperature == 0 and s.logprobs is None and not penalties

    def choose(self, logits: torch.Tensor, counts: Mapping[int, int]) -> tuple[int, Logprobs | None]:
        """Return a token and its Logprobs for float32 logits `[V]`; counts: generated token -> times so far."""
        s = self.sampling
        scores = self._penalised(logits, counts)
        token = int(scores.argmax()) if s.temperature == 0 else self._draw(scores / s.temperature)
        return token, None if s.logprobs is None else _logprobs(logits, token, s.logprobs)

    def scores(self, logits: torch.Tensor, counts: Mapping[int, int]) -> torch.Tensor:
        """Return float32 scores `[V]` for logits `[V]`, whose argmax, or softmax, is how `choose` chooses."""
        s = self.sampling
        scores = self._penalised(logits, counts)
        if s.temperature == 0:
            return scores
        shares, tokens = self._shares(scores / s.temperature)
        logs = shares.log()
        return logs if tokens is None else torch.full_like(logits, -torch.inf).scatter(0, tokens, logs)

    def _penalised(self, logits: torch.Tensor, counts: Mapping[int, int]) -> torch.Tensor:
        s = self.sampling
        if not counts or not (s.frequency_penalty or s.presence_penalty):
            return logits
        seen = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=logits.dtype)
        return logits.index_add(0, seen, -(s.frequency_penalty * times + s.presence_penalty))

    def _draw(self, scores: torch.Tensor) -> int:
        shares, tokens = self._shares(scores)
        drawn = torch.multinomial(shares, 1, generator=self._generator)
        return int(drawn if tokens is None else tokens[drawn])

    def _shares(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weights that need not add up to 1, and the tokens that they belong to; None is all in order."""
        s = self.sampling
        tokens = None
        if 0 < s.top_k < scores.numel():
            scores, tokens = scores.topk(s.top_k)
        elif s.top_p < 1:
            scores, tokens = scores.sort(descending=True)
        shares = scores.softmax(-1)
        if s.top_p < 1:
            kept = shares.cumsum(-1) - shares < s.top_p  # those before it hold less than top_p
            kept[0] = True  # a top_p too small for float32 compares as 0
            shares = shares * kept
        return shares, tokens


def _logprobs(logits: torch.Tensor, token: int, count: int) -> Logprobs:
    logs = logits.log_softmax(-1)
    logs = logs.clamp_min(LEAST)
    values, tokens = logs.topk(min(count, logs.numel()))
    return Logprobs(float(logs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
