"""Levels for shared planes: the balanced fit against its definition, in loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits.quantize import anybcq, balancing, linalg
from anybits.quantize.balancing import balance
from anybits.weight import PlaneWeight, group_columns


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_errors(weight: PlaneWeight, original: torch.Tensor, size: int) -> torch.Tensor:
    """Squared error of every precision, row and group: float64 `[P, N, G]`."""
    found = []
    for p in weight.precisions:
        squares = (weight.dequantize(p).double() - original.double()).square()
        found.append(torch.stack([part.sum(1) for part in squares.split(group_columns(size, original.shape[1]), 1)], 1))
    return torch.stack(found)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 150),
    size=st.sampled_from([32, 128, -1]),
    symmetric=st.booleans(),
    precisions=st.sampled_from([(2, 3, 4), (2, 4), (3, 5), (2, 3)]),
    constant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_group_gets_worse_in_sum(rows, columns, size, symmetric, precisions, constant, seed) -> None:
    weight = torch.full((rows, columns), 0.3) if constant else rand(rows, columns, seed=seed) + 5 * (seed % 2)
    start = anybcq.quantize_matrix(weight, precisions, size, symmetric)
    shares = tuple(float(s) for s in range(1, len(precisions) + 1))
    found = balance(weight, start, shares, 8)
    assert {k: (t.shape, t.dtype) for k, t in found.tensors().items()} == {
        k: (t.shape, t.dtype) for k, t in start.tensors().items()
    }
    before, after = (group_errors(q, weight, size) for q in (start, found))
    unit = torch.tensor(shares)[:, None, None] / before.clamp_min(1e-12 * weight.square().sum())
    assert ((unit * after).sum(0) <= (unit * before).sum(0) * (1 + 1e-4) + 1e-6).all()


def test_every_value_gets_the_code_of_least_cost() -> None:
    precisions, rows, columns = (2, 3, 4), 30, 50
    values = rand(rows, columns, seed=1).double()
    designs = [linalg.design(p, False, values) for p in precisions]
    coefficients = [rand(p + 1, rows, seed=p).double() for p in precisions]
    coefficients[0][:, 0] = coefficients[1][:, 0] = coefficients[2][:, 0] = 0  # every code of a group the same
    units = rand(3, rows, seed=9).double().square() + 0.1
    groups = balancing._sorted(values)
    codes = balancing._codes(groups, *balancing._runs(groups, coefficients, designs, precisions, units)).long()
    cost = torch.zeros(16, rows, columns, dtype=torch.float64)
    for code in range(16):
        for c, design, p, unit in zip(coefficients, designs, precisions, units, strict=True):
            level = (design.T @ c)[code >> (4 - p)]
            cost[code] += unit[:, None] * (level[:, None] - values).square()
    torch.testing.assert_close(cost.gather(0, codes[None])[0], cost.amin(0))
    assert (codes[0] == 0).all()  # of equal codes the lowest


def test_one_round_is_least_squares_for_the_codes_it_had() -> None:
    precisions, rows, columns = (2, 3), 4, 60
    values = rand(rows, columns, seed=3).double() + 2
    start = anybcq.quantize_matrix(values.float(), precisions, -1, False)
    codes, found = balancing._fit(
        values,
        torch.zeros(rows, columns, dtype=torch.uint8),
        [torch.cat([start.levels.scales[p][:, :, 0], start.levels.offsets[p].T]).double() for p in precisions],  # type: ignore[union-attr]
        precisions,
        (1.0, 1.0),
        1,
        torch.float64,
    )
    # The round starts from the best codes for the start's levels; recompute them in a loop.
    for n in range(rows):
        costs = torch.zeros(8, columns, dtype=torch.float64)
        before = torch.zeros(2, dtype=torch.float64)
        levels = [
            (
                linalg.design(p, False, values).T
                @ torch.cat([start.levels.scales[p][:, n, 0], start.levels.offsets[p][n]]).double()
            )  # type: ignore[union-attr]
            for p in precisions
        ]
        for i in range(2):
            before[i] = (levels[i][0] - values[n]).square().sum()
        for code in range(8):
            for i, p in enumerate(precisions):
                costs[code] += (levels[i][code >> (3 - p)] - values[n]).square() / before[i]
        own = costs.argmin(0)
        for i, p in enumerate(precisions):
            basis = linalg.design(p, False, values).T[own >> (3 - p)]
            expected = torch.linalg.lstsq(basis, values[n]).solution
            torch.testing.assert_close(found[i][:, n], expected, rtol=1e-4, atol=1e-4)
    assert codes.dtype == torch.uint8


def test_fine_precisions_gain_much_and_coarse_ones_lose_little() -> None:
    weight = rand(64, 512, seed=5)
    start = anybcq.quantize_matrix(weight, (2, 3, 4), 128, False)
    found = balance(weight, start, (1.0, 1.5, 2.0), 10)
    alone = [anybcq.quantize_matrix(weight, (p,), 128, False) for p in (2, 3, 4)]
    bound = torch.stack([group_errors(q, weight, 128).sum() for q in alone])
    price = [group_errors(q, weight, 128).sum((1, 2)) / bound for q in (start, found)]
    assert price[0][2] > 1.35
    assert (price[1] < torch.tensor([1.05, 1.05, 1.2])).all()


@pytest.mark.parametrize("rounds", [0, 3])
def test_the_same_rows_give_the_same_codes_in_any_chunk(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    weight = rand(9, 200, seed=6)
    start = anybcq.quantize_matrix(weight, (2, 3, 4), 64, False)
    whole = balance(weight, start, (1.0, 1.0, 1.0), rounds)
    monkeypatch.setattr(balancing, "CHUNK", 1)
    parts = balance(weight, start, (1.0, 1.0, 1.0), rounds)
    assert all(torch.equal(tensor, parts.tensors()[name]) for name, tensor in whole.tensors().items())
