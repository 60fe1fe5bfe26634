import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits.quantize import kmeans


def naive_cost(values: torch.Tensor, weights: torch.Tensor, boundaries: tuple[int, ...]) -> float:
    total = 0.0
    for start, stop in itertools.pairwise(boundaries):
        v, h = values[start:stop], weights[start:stop]
        if h.sum() > 0:
            total += float((h * (v - (h * v).sum() / h.sum()).square()).sum())
    return total


def brute_force(values: torch.Tensor, weights: torch.Tensor, clusters: int) -> float:
    columns = len(values)
    cuts = itertools.combinations_with_replacement(range(columns + 1), clusters - 1)
    return min(naive_cost(values, weights, (0, *c, columns)) for c in cuts)


def check_boundaries(boundaries: torch.Tensor, columns: int) -> None:
    assert boundaries.dtype == torch.int64
    assert (boundaries[:, 0] == 0).all()
    assert (boundaries[:, -1] == columns).all()
    assert (boundaries.diff(dim=1) >= 0).all()


def make_rows(rows: int, columns: int, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    if kind == "ties":
        values = torch.randint(-2, 3, (rows, columns), generator=g).double()
    elif kind == "shifted":
        values = 1000 + values
    weights = torch.rand(rows, columns, generator=g, dtype=torch.float64)
    if kind == "zeros":
        weights *= torch.rand(rows, columns, generator=g) > 0.4
    return values.sort(1)[0], weights


kinds = st.sampled_from(["random", "ties", "shifted", "zeros"])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), kinds, st.integers(0, 10**6))
def test_optimum_equals_brute_force(rows: int, columns: int, clusters: int, kind: str, seed: int) -> None:
    values, weights = make_rows(rows, columns, kind, seed)
    boundaries = kmeans.optimal_clusters(values, weights, clusters)
    check_boundaries(boundaries, columns)
    for v, h, b in zip(values, weights, boundaries, strict=True):
        assert naive_cost(v, h, tuple(b.tolist())) == pytest.approx(brute_force(v, h, clusters), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 4), kinds, st.integers(0, 10**6))
def test_split_equals_brute_force(rows: int, columns: int, clusters: int, kind: str, seed: int) -> None:
    values, weights = make_rows(rows, columns, kind, seed)
    parents = kmeans.optimal_clusters(values, weights, clusters)
    children = kmeans.split_clusters(values, weights, parents)
    check_boundaries(children, columns)
    assert torch.equal(children[:, ::2], parents)
    for v, h, parent, child in zip(values, weights, parents.tolist(), children.tolist(), strict=True):
        for c, (start, stop) in enumerate(itertools.pairwise(parent)):
            wanted = brute_force(v[start:stop], h[start:stop], 2)
            got = naive_cost(v, h, tuple(child[2 * c : 2 * c + 3]))
            assert got == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def quadratic_program(values: torch.Tensor, weights: torch.Tensor, clusters: int) -> float:
    """The textbook O(K^2) dynamic program, for one row too long for brute force."""
    mass = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
    moment = torch.nn.functional.pad((weights * values).cumsum(0), (1, 0))
    gain = (moment[None] - moment[:, None]).square() / (mass[None] - mass[:, None]).clamp_min(1e-300)
    gain = gain.triu()
    best = gain[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + gain.masked_fill(torch.ones_like(gain).tril(-1).bool(), -torch.inf)).amax(0)
    return float((weights * values.square()).sum() - best[-1])


@pytest.mark.parametrize("clusters", [2, 4, 8])
@pytest.mark.parametrize("columns", [255, 256, 600])
def test_long_rows_match_quadratic_program(columns: int, clusters: int) -> None:
    values, weights = make_rows(3, columns, "random", clusters)
    boundaries = kmeans.optimal_clusters(values, weights, clusters)
    for v, h, b in zip(values, weights, boundaries, strict=True):
        assert naive_cost(v, h, tuple(b.tolist())) == pytest.approx(quadratic_program(v, h, clusters), rel=1e-9)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = make_rows(7, 50, "ties", 3)
    whole = kmeans.optimal_clusters(values, weights, 4)
    monkeypatch.setattr(kmeans, "CHUNK", 60)
    assert torch.equal(kmeans.optimal_clusters(values, weights, 4), whole)


def test_unsorted_rows_are_sorted_first() -> None:
    values, weights = make_rows(4, 40, "random", 5)
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = kmeans.optimal_clusters(values[:, shuffle], weights[:, shuffle], 4)
    assert torch.equal(shuffled, kmeans.optimal_clusters(values, weights, 4))


def test_equal_values_are_never_parted() -> None:
    values, weights = make_rows(50, 30, "ties", 9)
    boundaries = kmeans.optimal_clusters(values, weights, 4)
    for _ in range(3):
        for v, b in zip(values, boundaries, strict=True):
            for cut in b[1:-1].tolist():
                assert cut in (0, 30) or v[cut] > v[cut - 1]
        boundaries = kmeans.split_clusters(values, weights, boundaries)
    member = kmeans.cluster_of(boundaries, 30)
    assert ((values[:, 1:] == values[:, :-1]) <= (member[:, 1:] == member[:, :-1])).all()


def test_centroids_are_weighted_means() -> None:
    values = torch.tensor([[0.0, 1.0, 5.0, 6.0]])
    weights = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    means = kmeans.centroids(values, weights, torch.tensor([[0, 2, 4, 4]]))
    assert means[0, :2].tolist() == [0.75, 5.5]
    assert means[0, 2].isnan()
