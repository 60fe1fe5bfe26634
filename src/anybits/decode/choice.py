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

    def scores(self, tokens: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
        """Return float32 scores `[n, V]` for logits `[n, V]`; the last row follows all of `tokens`."""
        if self.processors is None:
            return rows
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=rows.device)
        first = len(tokens) - len(rows) + 1
        return torch.cat([self.processors(ids[:, : first + i], row[None]) for i, row in enumerate(rows)])

    def probabilities(self, tokens: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
        """Return probabilities `[n, V]` for logits `[n, V]`; the last row follows all of `tokens`."""
        return self.scores(tokens, rows).softmax(-1)

    def likeliest(self, tokens: Sequence[int], rows: torch.Tensor) -> list[int]:
        """Return the best token of every row of logits `[n, V]`; the last row follows all of `tokens`."""
        return self.scores(tokens, rows).argmax(-1).tolist()

    def choose(self, tokens: Sequence[int], logits: torch.Tensor) -> int:
        """Return the token that follows `tokens`, for logits `[V]`."""
        scores = self.scores(tokens, logits[None])[0]
        return int(torch.multinomial(scores.softmax(-1), 1) if self.sample else scores.argmax())
