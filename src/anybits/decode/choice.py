"""From logits to a token: the processors that a request asks for, then the likeliest token or a drawn one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Processors = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens so far int64 [1, T], float32 logits [1, V]) -> logits [1, V]: temperature, top-p, penalties."""


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen; processors None leaves the logits as they are."""

    sample: bool = False
    processors: Processors | None = None

    def scores(self, tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Return float32 scores `[V]` of what follows `tokens`, for logits `[V]`."""
        if self.processors is None:
            return logits
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=logits.device)
        return self.processors(ids, logits[None])[0]

    def probabilities(self, tokens: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
        """Return probabilities `[n, V]` for logits `[n, V]`; the last row follows all of `tokens`."""
        first = len(tokens) - len(rows) + 1
        scores = [self.scores(tokens[: first + i], row) for i, row in enumerate(rows)]
        return torch.stack(scores).softmax(-1)

    def likeliest(self, tokens: Sequence[int], rows: torch.Tensor) -> list[int]:
        """Return the best token of every row of logits `[n, V]`; the last row follows all of `tokens`."""
        if self.processors is not None:
            first = len(tokens) - len(rows) + 1
            rows = torch.stack([self.scores(tokens[: first + i], row) for i, row in enumerate(rows)])
        return rows.argmax(-1).tolist()

    def choose(self, tokens: Sequence[int], logits: torch.Tensor) -> int:
        """Return the token that follows `tokens`, for logits `[V]`."""
        scores = self.scores(tokens, logits)
        return int(torch.multinomial(scores.softmax(-1), 1) if self.sample else scores.argmax())
