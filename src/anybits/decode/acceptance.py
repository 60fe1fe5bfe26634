"""Which drafted tokens stand: equal choices when greedy, the rejection rule when sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def accept_greedy(drafted: Sequence[int], wanted: Sequence[int]) -> int:
    """Return how many of the k drafted tokens are what the target chose; wanted: its k + 1 choices."""
    pairs = zip(drafted, wanted, strict=False)
    return next((i for i, (token, choice) in enumerate(pairs) if token != choice), len(drafted))


def accept_sampled(drafted: Sequence[int], q: torch.Tensor, p: torch.Tensor) -> tuple[int, int]:
    """Return (number of accepted tokens n, the token that follows them), distributed exactly as p alone would be.

    drafted: k tokens, token i drawn from q[i]; q: float `[k, V]` draft probabilities; p: float `[k + 1, V]` target
    probabilities. Token x is kept with probability min(1, p(x) / q(x)); the first one refused is drawn again from
    max(p - q, 0) / sum max(p - q, 0), and after k kept tokens one more comes from p[k] (Leviathan et al., algorithm 1).
    """
    chance = torch.rand(len(drafted), dtype=q.dtype, device=q.device)
    for i, token in enumerate(drafted):
        if chance[i] * q[i, token] >= p[i, token]:  # >= : a token that p excludes is refused even at chance 0
            return i, _draw(_residual(p[i], q[i]))
    return len(drafted), _draw(p[len(drafted)])


def _residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return max(p - q, 0); p itself where rounding leaves nothing of it, as then p = q and any draw is right."""
    rest = (p - q).clamp_min(0)
    return rest if rest.sum() > 0 else p


def _draw(weights: torch.Tensor) -> int:
    return int(torch.multinomial(weights, 1))
