"""Which precision each matrix gets within a budget of bytes: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from anybits.errors import AnybitsError

Profile = dict[str, int]
"""Module -> precision."""

Sizes = Mapping[str, Mapping[int, int]]
"""Module -> precision -> bytes of its planes and levels."""

Costs = Mapping[str, Mapping[int, float]]
"""Module -> precision -> what it adds to the loss."""

Changes = Mapping[str, Mapping[tuple[int, int], float]]
"""Module -> (rest, own) -> loss with it at `own` and all others at `rest`, less the loss with all at `rest`."""

MOST_UNITS = 50_000
"""Capacities of the table: a finer budget is counted in coarser units, sizes rounded up, so it is never exceeded."""


def total_bytes(profile: Mapping[str, int], sizes: Sizes) -> int:
    """Return the bytes that `profile` reads."""
    return sum(sizes[module][p] for module, p in profile.items())


def stored_precisions(sizes: Sizes) -> list[int]:
    """Return the precisions that every module has, ascending."""
    return sorted(set.intersection(*(set(options) for options in sizes.values())))


def neighbours(bits: float, precisions: Sequence[int]) -> tuple[int, int, float]:
    """Return the stored precisions around `bits`, and how far it lies from the lower to the higher, in 0 ... 1.

    Raises AnybitsError unless `bits` lies between the lowest and the highest of `precisions`.
    """
    if not precisions[0] <= bits <= precisions[-1] or len(precisions) < 2:
        raise AnybitsError(
            f"a budget of {bits:g} bits is out of range: it must lie between two stored precisions "
            f"({', '.join(map(str, precisions))})"
        )
    low, high = next((a, b) for a, b in pairwise(precisions) if bits <= b)
    return low, high, (bits - low) / (high - low)


def budget_bytes(sizes: Sizes, bits: float) -> int:
    """Return the bytes on the straight line between the neighbouring stored precisions of the whole model."""
    low, high, share = neighbours(bits, stored_precisions(sizes))
    least, most = (sum(options[p] for options in sizes.values()) for p in (low, high))
    return least + math.floor(share * (most - least))


def effective_bits(size: int, sizes: Sizes) -> float:
    """Return the bits whose budget is `size` bytes: the inverse of `budget_bytes` on its straight lines."""
    precisions = stored_precisions(sizes)
    totals = [sum(options[p] for options in sizes.values()) for p in precisions]
    return float(np.interp(size, totals, precisions))


def estimated_costs(changes: Changes, bits: float) -> dict[str, dict[int, float]]:
    """Return the cost of each module at each precision in a mix around `bits`; the highest precision costs 0.

    A step between neighbouring precisions a < b is known from two sides: the gain of raising one module while the
    rest is at a, and the loss of lowering it while the rest is at b. The step that holds `bits` takes the mean of
    both, weighted by how near the mix is to each; a step above it the gain, a step below it the loss, which
    were measured nearest to the mix.
    """
    costs: dict[str, dict[int, float]] = {}
    for module, measured in changes.items():
        precisions = sorted({rest for rest, _ in measured})
        low, _, share = neighbours(bits, precisions)
        cost = {precisions[-1]: 0.0}
        for a, b in reversed(list(pairwise(precisions))):
            gain, loss = -measured[a, b], measured[b, a]
            weight = share if a == low else float(a < low)
            cost[a] = cost[b] + (1 - weight) * gain + weight * loss
        costs[module] = cost
    return costs


def allocate(costs: Costs, sizes: Sizes, budget: int) -> Profile:
    """Return the profile of least total cost whose bytes are at most `budget`.

    Dynamic programming over bytes in units of their greatest common divisor: exact while the budget is at most
    MOST_UNITS of them above the cheapest profile. Raises AnybitsError when even the cheapest does not fit.
    """
    least = {module: min(options.values()) for module, options in sizes.items()}
    room = budget - sum(least.values())
    if room < 0:
        raise AnybitsError(f"a budget of {budget} bytes is too small: the lowest precision reads {budget - room}")
    extra = {m: {p: size - least[m] for p, size in sizes[m].items()} for m in costs}
    unit = max(math.gcd(*(e for each in extra.values() for e in each.values())), 1)
    unit *= max(1, math.ceil(room / unit / MOST_UNITS))
    capacity = room // unit
    best = np.zeros(capacity + 1)
    chosen: list[tuple[str, list[int], np.ndarray]] = []
    for module, options in costs.items():
        precisions = sorted(options)
        table = np.full((len(precisions), capacity + 1), np.inf)
        for row, p in enumerate(precisions):
            units = -(-extra[module][p] // unit)
            if units <= capacity:
                table[row, units:] = best[: capacity + 1 - units] + options[p]
        choice = table.argmin(axis=0).astype(np.int8)
        best = np.take_along_axis(table, choice[None].astype(np.int64), 0)[0]
        chosen.append((module, precisions, choice))
    profile: Profile = {}
    left = int(best.argmin())
    for module, precisions, choice in reversed(chosen):
        profile[module] = precisions[choice[left]]
        left -= -(-extra[module][profile[module]] // unit)
    return {module: profile[module] for module in costs}
