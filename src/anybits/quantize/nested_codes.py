"""Choosing nested codes with a layer's Hessian in hand: one code a weight, good at every precision at once.

Everything here is column-major: a matrix `[N, K]` lies as `[K, N]`, so that a column of N weights is contiguous
and one operation handles it for all rows. P counts the stored precisions; leading dimensions `[P, ...]` follow
their ascending order. Codes are those of the top precision; precision p reads the first p bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Columns between two updates of all columns that follow (GPTQ's lazy batches, arXiv 2210.17323, section 3.3).
BATCH = 64

Tables = Callable[[int], list[torch.Tensor]]
"""Group -> for each precision the level of every code of that precision, `[2**p, N]`."""


@dataclass(frozen=True)
class Search:
    """How codes are searched: all prefixes while at most `exhaustive` of them, then the `beam` best go on."""

    precisions: tuple[int, ...]
    exhaustive: int = 32
    beam: int = 6


class Chooser:
    """Chooses the codes of one column after another from one group's levels."""

    def __init__(self, tables: Sequence[torch.Tensor], search: Search) -> None:
        """tables: `[2**p, N]` for each precision of `search`."""
        self.tables, self.search = tables, search
        top = search.precisions[-1]
        if 1 << top <= search.exhaustive:
            # Every level beside the code that it belongs to: one operation a precision weighs all codes.
            pairs = zip(tables, search.precisions, strict=True)
            self.spread = torch.stack([t.repeat_interleave(1 << (top - p), dim=0) for t, p in pairs])
            self.buffer = torch.empty_like(self.spread)

    def __call__(self, targets: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes int64 `[N]` of least sum_p weights_p (level_p(first p bits) - targets_p)^2, and levels.

        targets, weights, levels: `[P, N]`. Exact while there are at most `search.exhaustive`
        codes; above, a beam search over the bits that follow.
        """
        top = self.search.precisions[-1]
        if 1 << top > self.search.exhaustive:
            codes = self._beam(targets, weights)
            pairs = zip(self.tables, self.search.precisions, strict=True)
            return codes, torch.stack([t.gather(0, (codes >> (top - p))[None])[0] for t, p in pairs])
        costs = torch.sub(self.spread, targets[:, None], out=self.buffer).square_().mul_(weights[:, None])
        # Sums and argmin over a leading dimension are several times slower.
        cost = costs[0]
        for own in costs[1:]:
            cost += own
        codes = cost.min(0)[1]
        return codes, self.spread.gather(1, codes.expand(len(self.spread), 1, -1))[:, 0]

    def _beam(self, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        search = self.search
        cost, prefixes, bits = targets.new_zeros(1, targets.shape[1]), None, 0
        for i, p in enumerate(search.precisions):
            grow = 1 << (p - bits)
            if len(cost) > search.beam and len(cost) * grow > search.exhaustive:
                cost, kept = cost.topk(search.beam, dim=0, largest=False, sorted=True)
                prefixes = kept if prefixes is None else prefixes.gather(0, kept)
            table = self.tables[i]
            if prefixes is not None:
                steps = torch.arange(grow, device=table.device)[None, :, None]
                prefixes = (prefixes[:, None] * grow + steps).flatten(0, 1)
                table = table.gather(0, prefixes)
            own = (table - targets[i]).square_().mul_(weights[i])
            cost = own if bits == 0 else own.view(-1, grow, own.shape[1]).add_(cost[:, None]).flatten(0, 1)
            bits = p
        best = cost.min(0)[1]
        return best if prefixes is None else prefixes.gather(0, best[None])[0]


def feedback_pass(
    targets: torch.Tensor,
    factors: torch.Tensor,
    weights: torch.Tensor,
    tables: Tables,
    group_of: Sequence[int],
    search: Search,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose all codes in one pass over the columns, each precision carrying its own error forward.

    targets: `[P, K, N]`, the matrix that each precision should become; factors: `[P, K, K]`, upper Cholesky factors
    of the inverse Hessians (GPTQ, arXiv 2210.17323, algorithm 1); weights: `[P, N]`, what a unit of each
    precision's error costs; group_of: group of each column. Returns codes uint8 `[K, N]` and the levels
    `[P, K, N]` they stand for. With one precision this is GPTQ.
    """
    left = targets.clone()
    columns = left.shape[1]
    codes = torch.empty(left.shape[1:], dtype=torch.uint8, device=left.device)
    levels = torch.empty_like(left)
    group, choose = -1, None
    for start in range(0, columns, BATCH):
        stop = min(start + BATCH, columns)
        errors = left.new_empty(left.shape[0], stop - start, left.shape[2])
        for j in range(start, stop):
            if choose is None or group_of[j] != group:
                group = group_of[j]
                choose = Chooser(tables(group), search)
            # What columns of this batch pushed here; the batches before already did at their end.
            wanted = left[:, j]
            if j > start:
                wanted = wanted - torch.matmul(factors[:, None, start:j, j], errors[:, : j - start])[:, 0]
            pivot = factors[:, j, j, None]
            codes[j], level = choose(wanted, weights / pivot.square())
            levels[:, j] = level
            errors[:, j - start] = (wanted - level) / pivot
        if stop < columns:
            left[:, stop:].baddbmm_(factors[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
    return codes, levels


def descent_pass(
    errors: torch.Tensor,
    hessians: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    levels: torch.Tensor,
    tables: Tables,
    group_of: Sequence[int],
    search: Search,
) -> None:
    """Choose every code anew, one column after another, all others being fixed: the summed error never rises.

    errors: levels minus targets `[P, K, N]`; hessians: `[P, K, K]`; weights: `[P, N]`; codes uint8 `[K, N]`; levels
    `[P, K, N]`; errors, codes and levels change in place. Cyclic coordinate descent on
    sum_p weights_p e_p^T H_p e_p (as LNQ does for one precision, arXiv 2505.07004, section 4).
    """
    columns = errors.shape[1]
    group, choose = -1, None
    for start in range(0, columns, BATCH):
        stop = min(start + BATCH, columns)
        gradients = torch.bmm(hessians[:, start:stop], errors)
        moves = torch.zeros_like(gradients)
        for j in range(start, stop):
            if choose is None or group_of[j] != group:
                group = group_of[j]
                choose = Chooser(tables(group), search)
            gradient = gradients[:, j - start]
            if j > start:
                gradient = gradient + torch.matmul(hessians[:, None, j, start:j], moves[:, : j - start])[:, 0]
            pivot = hessians[:, j, j, None]
            now = levels[:, j]
            codes[j], level = choose(now - gradient / pivot, weights * pivot)
            moves[:, j - start] = level - now
            levels[:, j] = level
        errors[:, start:stop] += moves
