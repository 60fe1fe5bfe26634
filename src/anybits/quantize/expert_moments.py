"""Second moments of what each expert's matrices see: over the tokens that the router sends to it.

A layer of experts answers a token t with sum_e g_te E_e(x_t), g being the router's weights. Where expert e's matrix
becomes Q, its output is off by (Q - W) h_te, and the squared error of the layer's output is

    sum_t | sum_e g_te (Q_e - W_e) h_te |^2  =  sum_e sum_t g_te^2 |(Q_e - W_e) h_te|^2  +  products of two errors

Errors of two experts have nothing to do with each other, so the products cancel on average, and what is left are
problems of one expert each, a token counting the *square* of its router weight: H_e = sum_t g_te^2 h_te h_te^T. That is
exact for the last matrix of an expert; what an earlier one does wrong passes through the same weight.

Few tokens make a poor Hessian, and none make none. An expert with fewer tokens than it needs borrows others of the same
text, which run through it as if they had been sent to it. Coordinates inside an expert mean nothing in another, so its
inner Hessian cannot be had from the other experts'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from anybits.quantize.blocks import HiddenStates, Keep
from anybits.quantize.experts import Mixture, Routing
from anybits.quantize.hessian import Moments, Sums

Dense = Mapping[tuple[int, int], Mapping[str, torch.Tensor]]
"""(expert, number of the path) -> parameter name -> matrix `[N, K]` in place of the expert's own."""


@dataclass(frozen=True)
class Routed:
    """What a mixture is given on one path: inputs `[T, H]` and routing of each batch."""

    inputs: HiddenStates
    routings: list[Routing]

    @classmethod
    def along(
        cls, mixture: Mixture, path: HiddenStates, weights: Mapping[str, torch.Tensor], keep: Keep = list
    ) -> Routed:
        """Run the block up to the mixture on all batches of a path; weights: of the layers before it."""
        routings: list[Routing] = []

        def inputs(hidden: torch.Tensor) -> torch.Tensor:
            x, routing = mixture.routed(hidden, weights)
            routings.append(routing)
            return x

        return cls(HiddenStates(keep(inputs(hidden) for hidden in path.batches), path.every), routings)

    def tokens(self, expert: int) -> int:
        """Return how many tokens an expert gets."""
        return sum(len(routing.of(expert)[0]) for routing in self.routings)

    def spread(self, count: int) -> torch.Tensor:
        """Return `count` inputs `[n, H]` from all over the text, all where there are no more."""
        batches = self.inputs.batches
        size = len(batches[0])
        chosen = evenly(count, size * len(batches))
        parts = [
            chosen[(chosen >= first) & (chosen < first + size)] - first for first in range(0, size * len(batches), size)
        ]
        return torch.cat([x[part] for x, part in zip(batches, parts, strict=True)])


def evenly(count: int, total: int) -> torch.Tensor:
    """Return `count` of the numbers below `total`, evenly spread; all of them where there are no more."""
    count = min(count, total)
    return (torch.arange(count) * total).div(max(count, 1), rounding_mode="floor")


@dataclass(frozen=True)
class Loan:
    """Tokens for experts that have too few: inputs `[n, H]` of each path; an expert needs `needed` tokens in all."""

    pools: list[torch.Tensor]
    needed: int


@dataclass
class Reach:
    """How many experts a run quantized, how many of them had fewer than `needed` tokens, and how many none."""

    experts: int = 0
    scarce: int = 0
    unreached: int = 0
    needed: int = 0

    def count(self, mixture: Mixture, path: Routed, needed: int) -> None:
        """Count the experts of a mixture by what they get on a path."""
        tokens = [path.tokens(e) for e in range(mixture.count)]
        self.experts += len(tokens)
        self.scarce += sum(n < needed for n in tokens)
        self.unreached += tokens.count(0)
        self.needed = max(self.needed, needed)


def bytes_of_one(columns: int, earlier: int, precisions: int) -> int:
    """Return the bytes that one expert needs while its moments of a stage are collected.

    columns: of the stage; earlier: weights of the stages before it, which run quantized.
    """
    return 4 * precisions * (2 * columns * columns + earlier)


def collect(
    mixture: Mixture,
    stage: int,
    experts: Sequence[int],
    float_path: HiddenStates | None,
    paths: Sequence[Routed],
    dense: Dense,
    loan: Loan,
    weighted: bool = True,
) -> list[Moments]:
    """Return the moments of what the matrices of `stage` see in each of `experts`.

    float_path: what the float model gives to the mixture, None where no drift is wanted: a token's target is what the
    expert would have answered to the float model's state of it, whatever the float router chose; paths: for each
    precision what the model quantized at it gives; dense: the expert's matrices before this stage, quantized;
    weighted: tokens count the square of their router weight, else 1.
    """
    width = mixture.parts(stage, 0)[0].target.in_features
    sums = {e: Sums(width, len(paths), float_path is not None) for e in experts}
    for index in range(max(path.inputs.every * len(path.inputs.batches) for path in paths)):
        plain = None if float_path is None else _at(float_path, index)
        for i, path in enumerate(paths):
            x = _at(path.inputs, index)
            if x is None:
                continue
            for e, own in sums.items():
                tokens, weights = path.routings[index // path.inputs.every].of(e)
                if len(tokens):
                    seen = mixture.inputs(stage, e, x[tokens], dense.get((e, i), {}))
                    wanted = None if plain is None else mixture.inputs(stage, e, plain[tokens], {})
                    squares = weights.square() if weighted and weights is not None else None
                    own.add(i, seen, wanted, plain is not None, squares)
    return [_lent(mixture, stage, e, own.moments(), paths, dense, loan) for e, own in sums.items()]


def _at(path: HiddenStates, index: int) -> torch.Tensor | None:
    return path.at(index) if index < path.every * len(path.batches) else None


def _lent(
    mixture: Mixture, stage: int, expert: int, own: Moments, paths: Sequence[Routed], dense: Dense, loan: Loan
) -> Moments:
    """Return moments over an expert's n tokens and those that it borrows until it has as many as it needs.

    Borrowed tokens count 1, an own one counts 1 on average; they bring no drift.
    """
    for i, (path, pool) in enumerate(zip(paths, loan.pools, strict=True)):
        tokens = path.tokens(expert)
        borrowed = pool[evenly(loan.needed - tokens, len(pool))] if tokens < loan.needed else pool[:0]
        if len(borrowed):
            seen = mixture.inputs(stage, expert, borrowed, dense.get((expert, i), {}))
            total = tokens + len(borrowed)
            own.hessian[i].mul_(tokens / total).addmm_(seen.T, seen, alpha=1 / total)
            if own.drift is not None:
                own.drift[i].mul_(tokens / total)
    return own
