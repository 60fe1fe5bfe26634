"""Budgets, the knapsack and the search: against brute force, and within the bytes they were given."""

import itertools
import random

import pytest

from anybits.errors import AnybitsError
from anybits.quantize import allocation
from anybits.quantize.profile_search import Search, exchange, refine


def problem(
    seed: int, modules: int = 5, precisions: tuple[int, ...] = (2, 3, 4)
) -> tuple[allocation.Costs, allocation.Sizes]:
    """Random sizes, not the same step for each precision, and costs that may even grow with the precision."""
    rng = random.Random(seed)
    sizes, costs = {}, {}
    for name in (f"m{i}" for i in range(modules)):
        plane, levels = 4 * rng.randrange(1, 40), 2 * rng.randrange(0, 20)
        sizes[name] = {p: p * plane + levels * 2 ** (p - 2) for p in precisions}
        costs[name] = {p: rng.random() * 2.0**-p - (0.02 if rng.random() < 0.1 else 0) for p in precisions}
    return costs, sizes


def cost_of(profile: dict[str, int], costs: allocation.Costs) -> float:
    return sum(costs[m][p] for m, p in profile.items())


@pytest.mark.parametrize("seed", range(40))
def test_the_knapsack_is_exact(seed: int) -> None:
    precisions = ((2, 3, 4), (2, 4, 8), (3, 4))[seed % 3]
    costs, sizes = problem(seed, 5, precisions)
    least = sum(min(each.values()) for each in sizes.values())
    most = sum(max(each.values()) for each in sizes.values())
    budget = random.Random(seed).randrange(least, most + 10)
    everything = (dict(zip(costs, each, strict=True)) for each in itertools.product(precisions, repeat=len(costs)))
    best = min(cost_of(p, costs) for p in everything if allocation.total_bytes(p, sizes) <= budget)
    found = allocation.allocate(costs, sizes, budget)
    assert list(found) == list(costs)
    assert allocation.total_bytes(found, sizes) <= budget
    assert cost_of(found, costs) == pytest.approx(best, abs=1e-12)


def test_a_budget_of_many_units_is_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        costs, sizes = problem(seed, 8)
        budget = allocation.budget_bytes(sizes, 2.7)
        exact = cost_of(allocation.allocate(costs, sizes, budget), costs)
        with monkeypatch.context() as patch:
            patch.setattr(allocation, "MOST_UNITS", 25)
            coarse = allocation.allocate(costs, sizes, budget)
        assert allocation.total_bytes(coarse, sizes) <= budget
        assert cost_of(coarse, costs) >= exact - 1e-12


def test_budgets_lie_on_the_straight_lines_between_stored_precisions() -> None:
    _, sizes = problem(0, precisions=(2, 3, 6))
    whole = {p: allocation.total_bytes(dict.fromkeys(sizes, p), sizes) for p in (2, 3, 6)}
    assert [allocation.budget_bytes(sizes, p) for p in (2, 3, 6)] == [whole[p] for p in (2, 3, 6)]
    assert allocation.budget_bytes(sizes, 4) == whole[3] + (whole[6] - whole[3]) // 3
    for bits in (2.25, 2.5, 5.0):
        assert allocation.effective_bits(allocation.budget_bytes(sizes, bits), sizes) == pytest.approx(bits, abs=0.01)
    for bits in (1.9, 6.1, float("nan")):
        with pytest.raises(AnybitsError, match=r"out of range: it must lie between two stored precisions \(2, 3, 6\)"):
            allocation.budget_bytes(sizes, bits)
    with pytest.raises(AnybitsError, match="too small: the lowest precision reads"):
        allocation.allocate(*problem(0), 10)


def test_steps_are_known_from_the_side_that_is_near() -> None:
    """Far below its step a module's gain counts, far above its loss, and in between the mean by distance."""
    changes = {"m": {(2, 3): -8.0, (3, 2): 4.0, (3, 4): -2.0, (4, 3): 1.0}}
    assert allocation.estimated_costs(changes, 2.25)["m"] == {4: 0.0, 3: 2.0, 2: 2.0 + 0.75 * 8 + 0.25 * 4}
    assert allocation.estimated_costs(changes, 3.5)["m"] == {4: 0.0, 3: 1.5, 2: 1.5 + 4}


def test_exchanges_stay_within_the_budget_and_differ() -> None:
    rng = random.Random(0)
    for seed in range(20):
        costs, sizes = problem(seed, 6)
        budget = allocation.budget_bytes(sizes, 2.6)
        parent = allocation.allocate(costs, sizes, budget)
        for _ in range(20):
            child = exchange(parent, sizes, budget, rng)
            if child is not None:
                assert child != parent
                assert allocation.total_bytes(child, sizes) <= budget
                assert all(child[m] in sizes[m] for m in child)


def test_the_search_finds_what_the_estimates_missed_and_can_be_repeated() -> None:
    """The true loss has an interaction that no sum of costs knows."""
    costs, sizes = problem(3, 6)
    budget = allocation.budget_bytes(sizes, 2.6)

    def loss(profile: dict[str, int], part: int | None) -> float:
        return cost_of(profile, costs) + 0.3 * (profile["m0"] != profile["m1"]) + 0.001 * (part or 0)

    start = allocation.allocate(costs, sizes, budget)
    found, least = refine(start, costs, sizes, budget, loss, 2, Search(generations=30), seed=1)
    assert allocation.total_bytes(found, sizes) <= budget
    assert least == loss(found, None) <= loss(start, None)
    everything = (dict(zip(costs, each, strict=True)) for each in itertools.product((2, 3, 4), repeat=len(costs)))
    best = min(loss(p, None) for p in everything if allocation.total_bytes(p, sizes) <= budget)
    assert least == pytest.approx(best)
    assert refine(start, costs, sizes, budget, loss, 2, Search(generations=30), seed=1) == (found, least)
    assert refine(start, costs, sizes, budget, loss, 2, Search(generations=0), seed=1) == (start, loss(start, None))
