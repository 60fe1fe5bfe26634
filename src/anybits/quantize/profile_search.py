"""Refine a profile on the true loss: small exchanges of bytes between matrices, kept when the loss falls."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from anybits.quantize.allocation import Costs, Profile, Sizes, total_bytes

Loss = Callable[[Mapping[str, int], int | None], float]
"""(profile, part) -> loss on all calibration text, or on one of its parts, numbered from 0."""


@dataclass(frozen=True)
class Search:
    """How long to search: generations of `offspring`, of which `finalists` are measured on all text.

    tournament: random exchanges from which the one that the estimated costs like best becomes a child.
    """

    generations: int = 12
    offspring: int = 8
    finalists: int = 2
    tournament: int = 3


def refine(
    start: Profile,
    costs: Costs,
    sizes: Sizes,
    budget: int,
    loss: Loss,
    parts: int,
    search: Search,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Profile, float]:
    """Return the best profile found within `budget` bytes, and its loss; never worse than `start` on all text.

    Evolution with one parent, as EvoPress (arXiv 2410.14649) has it: each generation measures its children on one
    part of the text, then the best of them on all of it. The same seed gives the same profile.
    """
    rng = random.Random(seed)
    parent, least = start, loss(start, None)
    seen = {tuple(start.values())}
    for generation in range(search.generations):
        children = []
        for _ in range(search.offspring):
            child = _best_of(search.tournament, parent, costs, sizes, budget, rng)
            if child is not None and tuple(child.values()) not in seen:
                seen.add(tuple(child.values()))
                children.append(child)
        part = generation % parts
        ranked = sorted(children, key=lambda child: loss(child, part))
        for child in ranked[: search.finalists]:
            found = loss(child, None)
            if found < least:
                parent, least = child, found
        progress(generation + 1, search.generations)
    return parent, least


def _best_of(
    count: int, parent: Profile, costs: Costs, sizes: Sizes, budget: int, rng: random.Random
) -> Profile | None:
    """Return the exchange with the least estimated cost among `count` random ones; None when none was possible."""
    tried = [exchange(parent, sizes, budget, rng) for _ in range(count)]
    return min((t for t in tried if t is not None), key=lambda t: sum(costs[m][p] for m, p in t.items()), default=None)


def exchange(parent: Profile, sizes: Sizes, budget: int, rng: random.Random) -> Profile | None:
    """Raise one random module by a step, lower others until the bytes fit, and spend what is left over.

    Returns None when the random choices lead back to `parent`.
    """
    child = dict(parent)
    order = sorted(sizes)
    rng.shuffle(order)
    raised = next((m for m in order if _step(child, sizes, m, +1) is not None), None)
    if raised is None:
        return None
    child[raised] = _step(child, sizes, raised, +1) or child[raised]
    others = [m for m in order if m != raised]
    for module in rng.sample(others, len(others)):
        if total_bytes(child, sizes) <= budget:
            break
        child[module] = _step(child, sizes, module, -1) or child[module]
    if total_bytes(child, sizes) > budget:
        return None
    for module in rng.sample(others, len(others)):
        up = _step(child, sizes, module, +1)
        if up is not None and total_bytes(child | {module: up}, sizes) <= budget:
            child[module] = up
    return None if child == parent else child


def _step(profile: Profile, sizes: Sizes, module: str, by: int) -> int | None:
    """Return the next stored precision of `module` above or below its own, or None at the end."""
    options = sorted(sizes[module])
    place = options.index(profile[module]) + by
    return options[place] if 0 <= place < len(options) else None
