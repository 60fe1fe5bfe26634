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


def choose(
    tables: Sequence[torch.Tensor], targets: torch.Tensor, weights: torch.Tensor, search: Search
) -> torch.Tensor:
    """Return the codes int64 `[N]` of least sum_p weights_p (level_p(first p bits) - targets_p)^2.

    tables: `[2**p, N]` for each precision; targets, weights: `[P, N]`. Exact while a precision has at most
    `search.exhaustive` codes; above, a beam search over the bits that follow. Equal costs take the lowest code.
    """
    precisions = search.precisions
    cost, prefixes, bits = targets.new_zeros(1, targets.shape[1]), None, 0
    for i, p in enumerate(precisions):
        grow = 1 << (p - bits)
        if len(cost) > search.beam and len(cost) * grow > search.exhaustive:
            cost, kept = cost.topk(search.beam, dim=0, largest=False, sorted=True)
            prefixes = kept if prefixes is None else prefixes.gather(0, kept)
        table = tables[i]
        if prefixes is not None:
            steps = torch.arange(grow, device=table.device)[None, :, None]
            prefixes = (prefixes[:, None] * grow + steps).flatten(0, 1)
            table = table.gather(0, prefixes)
        own = (table - targets[i]).square_().mul_(weights[i])
        cost = own if bits == 0 else own.view(-1, grow, own.shape[1]).add_(cost[:, None]).flatten(0, 1)
        bits = p
    best = cost.argmin(0)
    return best if prefixes is None else prefixes.gather(0, best[None])[0]


def levels_of(tables: Sequence[torch.Tensor], codes: torch.Tensor, precisions: tuple[int, ...]) -> torch.Tensor:
    """Return the levels `[P, N]` that codes int64 `[N]` of the top precision stand for."""
    top = precisions[-1]
    return torch.stack([t.gather(0, (codes >> (top - p))[None])[0] for t, p in zip(tables, precisions, strict=True)])


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
    group, table = -1, []
    for start in range(0, columns, BATCH):
        stop = min(start + BATCH, columns)
        errors = left.new_empty(left.shape[0], stop - start, left.shape[2])
        for j in range(start, stop):
            if group_of[j] != group:
                group = group_of[j]
                table = tables(group)
            # What columns of this batch pushed here; the batches before already did at their end.
            wanted = left[:, j]
            if j > start:
                wanted = wanted - torch.matmul(factors[:, None, start:j, j], errors[:, : j - start])[:, 0]
            pivot = factors[:, j, j, None]
            code = choose(table, wanted, weights / pivot.square(), search)
            level = levels_of(table, code, search.precisions)
            codes[j], levels[:, j] = code, level
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
    group, table = -1, []
    for start in range(0, columns, BATCH):
        stop = min(start + BATCH, columns)
        gradients = torch.bmm(hessians[:, start:stop], errors)
        moves = torch.zeros_like(gradients)
        for j in range(start, stop):
            if group_of[j] != group:
                group = group_of[j]
                table = tables(group)
            gradient = gradients[:, j - start]
            if j > start:
                gradient = gradient + torch.matmul(hessians[:, None, j, start:j], moves[:, : j - start])[:, 0]
            pivot = hessians[:, j, j, None]
            now = levels[:, j]
            code = choose(table, now - gradient / pivot, weights * pivot, search)
            level = levels_of(table, code, search.precisions)
            moves[:, j - start] = level - now
            codes[j], levels[:, j] = code, level
        errors[:, start:stop] += moves
