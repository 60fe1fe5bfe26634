"""Data-aware codes: every pass against a naive float64 version of it, and what `improve` promises."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits import AnybitsError, Recipe
from anybits.config import DataAware
from anybits.integrations.quantizing import quantize_model
from anybits.quantize import anybcq, anyprecision, refit
from anybits.quantize.blocks import BlockRunner, HiddenStates, capture
from anybits.quantize.data_aware import improve
from anybits.quantize.hessian import Moments, collect, layout, problem, stages
from anybits.quantize.nested_codes import BATCH, Chooser, Search, descent_pass, feedback_pass
from anybits.quantize.targets import find_blocks, find_targets
from anybits.weight import PlaneWeight
from conftest import tiny_model

OFF = DataAware(balancing=0, feedback=False, descents=0, refit_sweeps=0, codebook_iterations=0, correction=0.0)
WIDE = 1 << 8


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(columns: int, precisions: int, seed: int = 0, tokens: int = 200) -> torch.Tensor:
    """Correlated inputs, others at each precision."""
    mix = rand(columns, columns, seed=seed) * torch.logspace(0, -1, columns).double()[:, None]
    return torch.stack([x.T @ x for x in (rand(tokens, columns, seed=seed + 1 + i) @ mix for i in range(precisions))])


def nested_tables(precisions: tuple[int, ...], groups: int, rows: int) -> list[list[torch.Tensor]]:
    return [[rand(2**p, rows, seed=97 * g + p) for p in precisions] for g in range(groups)]


def code_costs(tables: list[torch.Tensor], targets: torch.Tensor, weights: torch.Tensor, precisions: tuple[int, ...]):
    """The cost of every code of the top precision, in a loop."""
    top = precisions[-1]
    costs = torch.zeros(2**top, targets.shape[1], dtype=torch.float64)
    for code in range(2**top):
        for i, p in enumerate(precisions):
            costs[code] += weights[i] * (tables[i][code >> (top - p)] - targets[i]) ** 2
    return costs


@pytest.mark.parametrize("precisions", [(2,), (5,), (2, 3, 4), (2, 4, 5), (3, 8), (2, 3, 4, 5, 6, 7, 8)])
def test_the_chosen_code_is_the_best_of_all(precisions: tuple[int, ...]) -> None:
    tables = nested_tables(precisions, 1, 40)[0]
    targets, weights = rand(len(precisions), 40, seed=5), rand(len(precisions), 40, seed=6).square()
    costs = code_costs(tables, targets, weights, precisions)
    codes, levels = Chooser(tables, Search(precisions, exhaustive=WIDE))(targets, weights)
    assert torch.equal(codes, costs.argmin(0))
    for i, p in enumerate(precisions):
        assert torch.equal(levels[i], tables[i].gather(0, (codes >> (precisions[-1] - p))[None])[0])
    # A beam may miss the best code, and still must do better than rounding one plane after another.
    beam, _ = Chooser(tables, Search(precisions, exhaustive=2, beam=4))(targets, weights)
    greedy, _ = Chooser(tables, Search(precisions, exhaustive=1, beam=1))(targets, weights)
    assert costs.gather(0, beam[None]).sum() <= costs.gather(0, greedy[None]).sum() + 1e-12


def naive_feedback(targets, hessians, weights, tables, group_of, precisions):
    """Column by column, everything that follows updated at once (optimal brain surgeon, no batches)."""
    left, top = targets.clone(), precisions[-1]
    columns = left.shape[1]
    inverses = [torch.linalg.inv(h) for h in hessians]
    codes = torch.zeros(columns, left.shape[2], dtype=torch.uint8)
    for j in range(columns):
        pivots = torch.stack([inverse[j, j] for inverse in inverses])[:, None]
        costs = code_costs(tables[group_of[j]], left[:, j], weights / pivots, precisions)
        codes[j] = costs.argmin(0).to(torch.uint8)
        for i, p in enumerate(precisions):
            level = tables[group_of[j]][i].gather(0, (codes[j].long() >> (top - p))[None])[0]
            error = (left[i, j] - level) / inverses[i][j, j]
            left[i, j:] -= inverses[i][j:, j, None] * error
            # Column j is done: take it out of the inverse.
            inverses[i] = inverses[i] - torch.outer(inverses[i][:, j], inverses[i][j]) / inverses[i][j, j]
    return codes


def passes(precisions: tuple[int, ...], columns: int):
    groups = 1 + (columns - 1) // 32
    group_of = [j // 32 for j in range(columns)]
    stated = problem(Moments(moment(columns, len(precisions)), None), 0.05, 0.0)
    hessians = stated.hessians.double()
    factors = torch.stack([torch.linalg.cholesky(torch.linalg.inv(h), upper=True) for h in hessians])
    tables = nested_tables(precisions, groups, 6)
    weights = rand(len(precisions), 6, seed=3).square() + 0.1
    targets = rand(len(precisions), columns, 6, seed=4)
    return hessians, factors, tables, weights, targets, group_of


@pytest.mark.parametrize(("precisions", "columns"), [((2, 3, 4), 7), ((3,), 40), ((2, 4), BATCH + 9)])
def test_the_joint_pass_chooses_the_codes_of_the_naive_one(precisions: tuple[int, ...], columns: int) -> None:
    hessians, factors, tables, weights, targets, group_of = passes(precisions, columns)
    search = Search(precisions, exhaustive=WIDE)
    codes, levels = feedback_pass(targets, factors, weights, lambda g: tables[g], group_of, search)
    assert torch.equal(codes, naive_feedback(targets, hessians, weights, tables, group_of, precisions))
    for i, p in enumerate(precisions):
        for j in range(columns):
            expected = tables[group_of[j]][i].gather(0, (codes[j].long() >> (precisions[-1] - p))[None])[0]
            assert torch.equal(levels[i, j], expected)


@pytest.mark.parametrize(("precisions", "columns"), [((2, 3, 4), 7), ((2, 4), BATCH + 9)])
def test_descent_takes_the_best_code_of_each_column_in_turn(precisions: tuple[int, ...], columns: int) -> None:
    hessians, factors, tables, weights, targets, group_of = passes(precisions, columns)
    search, top = Search(precisions, exhaustive=WIDE), precisions[-1]
    codes, levels = feedback_pass(targets, factors, weights, lambda g: tables[g], group_of, search)

    def total(levels: torch.Tensor) -> torch.Tensor:
        errors = levels - targets
        return (weights * torch.einsum("pkn,pkl,pln->pn", errors, hessians, errors)).sum(0)

    wanted_codes, wanted = codes.clone(), levels.clone()
    for j in range(columns):
        costs = []
        for code in range(2**top):
            for i, p in enumerate(precisions):
                wanted[i, j] = tables[group_of[j]][i][code >> (top - p)]
            costs.append(total(wanted))
        wanted_codes[j] = torch.stack(costs).argmin(0).to(torch.uint8)
        for i, p in enumerate(precisions):
            wanted[i, j] = tables[group_of[j]][i].gather(0, (wanted_codes[j].long() >> (top - p))[None])[0]
    before, errors = total(levels), levels - targets
    descent_pass(errors, hessians, weights, codes, levels, lambda g: tables[g], group_of, search)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(levels, wanted)
    torch.testing.assert_close(errors, levels - targets)
    assert (total(levels) <= before).all()


def test_the_affine_refit_of_one_group_is_least_squares() -> None:
    columns, rows, p = 40, 5, 3
    hessian = moment(columns, 1)[0] / 200 + 0.1 * torch.eye(columns)
    codes = torch.randint(0, 8, (columns, rows), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    target, coefficients = rand(columns, rows, seed=8), torch.zeros(1, p + 1, rows, dtype=torch.float64)
    errors = -target
    refit.affine(errors, hessian, codes, coefficients, p, p, [slice(0, columns)], 1)
    basis = refit.signs_of(codes, p, p, True).double()
    root = torch.linalg.cholesky(hessian).T
    for n in range(rows):
        expected = torch.linalg.lstsq(root @ basis[:, :, n].T, root @ target[:, n]).solution
        torch.testing.assert_close(coefficients[0, :, n], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors, torch.einsum("qkn,qn->kn", basis, coefficients[0]) - target)


def test_refits_over_groups_never_raise_the_error() -> None:
    hessian = moment(70, 1)[0] / 200 + 0.1 * torch.eye(70)
    codes = torch.randint(0, 4, (70, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    errors, coefficients = -rand(70, 6, seed=8), torch.zeros(3, 2, 6, dtype=torch.float64)
    bounds = [slice(0, 32), slice(32, 64), slice(64, 70)]
    found = [refit.loss(errors, hessian)]
    for _ in range(4):
        refit.affine(errors, hessian, codes, coefficients, 2, 2, bounds, 1)
        found.append(refit.loss(errors, hessian))
    assert all((later <= earlier * (1 + 1e-9)).all() for earlier, later in pairwise(found))


def test_the_codebook_refit_reaches_the_normal_equations() -> None:
    columns, rows = 40, 5
    hessian = moment(columns, 1)[0] / 200 + 0.1 * torch.eye(columns)
    codes = torch.randint(0, 3, (columns, rows), generator=torch.Generator().manual_seed(0))
    target, centroids = rand(columns, rows, seed=8), torch.full((4, rows), 7.0, dtype=torch.float64)
    errors = centroids.gather(0, codes) - target
    refit.codebook(errors, hessian, codes, centroids, 12)
    for n in range(rows):
        one_hot = torch.nn.functional.one_hot(codes[:, n], 3).double()
        expected = torch.linalg.solve(one_hot.T @ hessian @ one_hot, one_hot.T @ hessian @ target[:, n])
        torch.testing.assert_close(centroids[:3, n], expected)
    assert (centroids[3] == 7).all()  # no weight uses it
    torch.testing.assert_close(errors, centroids.gather(0, codes) - target)


def start_of(weight: torch.Tensor, method: str, precisions: tuple[int, ...], size: int, symmetric: bool) -> PlaneWeight:
    if method == "any-precision":
        return anyprecision.quantize_matrix(weight, None, precisions)
    return anybcq.quantize_matrix(weight, precisions, size, symmetric)


def row_losses(weight: PlaneWeight, original: torch.Tensor, moments: Moments, chosen: DataAware) -> torch.Tensor:
    """(q - w*) H (q - w*)^T of each row and precision, from the definition in float64."""
    found = []
    for i, p in enumerate(weight.precisions):
        h = moments.hessian[i].double()
        mean = h.diagonal().mean()
        h = h / mean + chosen.damping * torch.eye(len(h))
        target = original.double()
        if moments.drift is not None:
            change = moments.drift[i].double() / mean
            target = target + chosen.correction * target @ change @ torch.linalg.inv(h)
        error = weight.dequantize(p).double() - target
        found.append(((error @ h) * error).sum(1))
    return torch.stack(found)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 80),
    size=st.sampled_from([32, 64, -1]),
    symmetric=st.booleans(),
    method=st.sampled_from(["anybcq", "any-precision"]),
    precisions=st.sampled_from([(2,), (4,), (2, 3, 4), (2, 4), (3, 8)]),
    order=st.sampled_from(["given", "energy"]),
    drifts=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_row_gets_worse_at_any_precision(
    rows, columns, size, symmetric, method, precisions, order, drifts, seed
) -> None:
    weight = rand(rows, columns, seed=seed, dtype=torch.float32)
    start = start_of(weight, method, precisions, size, symmetric)
    hessian = moment(columns, len(precisions), seed).float()
    moments = Moments(hessian, 0.1 * moment(columns, len(precisions), seed + 7).float() if drifts else None)
    chosen = DataAware(column_order=order)
    better = improve(weight, start, moments, chosen)
    assert better.precisions == precisions
    assert {k: (t.shape, t.dtype) for k, t in better.tensors().items()} == {
        k: (t.shape, t.dtype) for k, t in start.tensors().items()
    }
    before, after = (row_losses(q, weight, moments, chosen) for q in (start, better))
    assert (after <= before * (1 + 1e-3) + 1e-5).all()


def test_all_precisions_from_2_to_8_at_once_and_the_same_every_time() -> None:
    weight, precisions = rand(12, 70, dtype=torch.float32), (2, 3, 4, 5, 6, 7, 8)
    moments = Moments(moment(70, 7).float(), None)
    for method in ("anybcq", "any-precision"):
        start = start_of(weight, method, precisions, 32, False)
        better, again = (improve(weight, start, moments, DataAware()) for _ in range(2))
        before, after = (row_losses(q, weight, moments, DataAware()).sum(1) for q in (start, better))
        assert (after <= before * (1 + 1e-3) + 1e-6).all()
        assert after[0] < before[0]
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in better.tensors().items())


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_every_switch_does_something_and_all_off_changes_nothing(method: str) -> None:
    weight = rand(48, 128, dtype=torch.float32)
    start = start_of(weight, method, (2, 3, 4), 32, False)
    hessian = moment(128, 3).float()
    moments = Moments(hessian, 0.1 * moment(128, 3, 9).float())
    plain = improve(weight, start, moments, OFF)
    assert all(torch.equal(plain.tensors()[name], tensor) for name, tensor in start.tensors().items())
    before = row_losses(start, weight, moments, OFF).sum(1)
    for change in ({"feedback": True}, {"descents": 2}, {"refit_sweeps": 2, "codebook_iterations": 8}):
        after = row_losses(improve(weight, start, moments, replace(OFF, **change)), weight, moments, OFF).sum(1)
        assert (after < before).all(), change
    base = improve(weight, start, moments, DataAware()).tensors()
    for change in (
        {"correction": 0.0},
        {"damping": 0.3},
        {"column_order": "energy"},
        {"precision_weights": (4.0, 1.0, 1.0)},
        {"exhaustive": 1, "beam": 1},
        *([{"balancing": 0}] if method == "anybcq" else []),
    ):
        other = improve(weight, start, moments, replace(DataAware(), **change)).tensors()
        assert any(not torch.equal(base[name], tensor) for name, tensor in other.items()), change


def test_a_weightier_precision_gets_closer() -> None:
    weight = rand(64, 128, dtype=torch.float32)
    start, moments = start_of(weight, "anybcq", (2, 3, 4), 32, False), Moments(moment(128, 3).float(), None)
    found = {}
    for i in range(3):
        shares = [1.0] * 3
        shares[i] = 8.0
        chosen = DataAware(precision_weights=tuple(shares))
        found[i] = row_losses(improve(weight, start, moments, chosen), weight, moments, chosen).sum(1)
    for i in range(3):
        assert found[i][i] == min(found[k][i] for k in range(3))
    with pytest.raises(AnybitsError, match="2 precision weights are given for 3 precisions"):
        improve(weight, start, moments, DataAware(precision_weights=(1.0, 2.0)))


def test_a_layer_that_saw_nothing_is_still_quantized() -> None:
    weight = rand(8, 64, dtype=torch.float32)
    start = start_of(weight, "anybcq", (2, 3), 32, False)
    zeros = torch.zeros(2, 64, 64)
    better = improve(weight, start, Moments(zeros, zeros), DataAware())
    for p in (2, 3):
        assert (better.dequantize(p) - weight).square().sum() <= (start.dequantize(p) - weight).square().sum()


def test_the_energy_order_keeps_groups_together() -> None:
    hessians = torch.diag_embed(torch.arange(1.0, 71.0))[None]
    columns = layout(hessians, 32, by_energy=True)
    assert sorted(columns.order.tolist()) == list(range(70))
    assert columns.groups.tolist() == [2, 1, 0]
    assert columns.order[:7].tolist() == [69, 68, 67, 66, 65, 64, 63]
    assert columns.group_of() == [0] * 6 + [1] * 32 + [2] * 32


def test_moments_are_those_of_the_inputs_on_both_paths() -> None:
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    tokens = torch.randint(3, 60, (10, 16), generator=torch.Generator().manual_seed(0))
    inputs = capture(model, blocks, list(tokens.split(2)))

    def disturbed(states: HiddenStates) -> HiddenStates:
        return HiddenStates([h + 0.1 * rand(*h.shape, dtype=torch.float32) for h in states.batches])

    def normed(hidden: torch.Tensor) -> torch.Tensor:
        return blocks[0].input_layernorm(hidden).flatten(0, 1)

    runner, targets = BlockRunner(blocks[0], inputs.arguments[0]), find_targets(blocks[0])
    order = stages(runner, targets, inputs.hidden.batches[0])
    assert [sorted(name.rpartition(".")[2] for name in group) for group in order] == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    plain, noisy = inputs.hidden, disturbed(inputs.hidden)
    found = collect(runner, order, plain, [noisy, plain], [{}, {}], drift=True)
    x, y = (torch.cat([normed(h) for h in path.batches]) for path in (plain, noisy))
    torch.testing.assert_close(found[0].hessian[0], y.T @ y / len(y), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0].drift[0], (x - y).T @ y / len(y), rtol=1e-3, atol=1e-3)
    for moments in found:  # without a difference between the paths there is nothing to make up for
        assert not moments.drift[1].any()
    shifts = problem(found[0], 0.01, 1.0).shifts
    torch.testing.assert_close(shifts[1], torch.eye(64), rtol=0, atol=1e-4)

    # Paths that run some of the batches only: each moment is the mean over those that it can see.
    some = collect(runner, order, plain.thinned(2), [noisy, noisy.thinned(3), noisy.thinned(2)], [{}] * 3, drift=True)
    x, y = ([normed(h) for h in path.batches] for path in (plain, noisy))
    for i, (own, shared) in enumerate([([0, 1, 2, 3, 4], [0, 2, 4]), ([0, 3], [0]), ([0, 2, 4], [0, 2, 4])]):
        wanted = torch.stack([y[k].T @ y[k] / len(y[k]) for k in own]).mean(0)
        torch.testing.assert_close(some[0].hessian[i], wanted, rtol=1e-3, atol=1e-3)
        wanted = torch.stack([(x[k] - y[k]).T @ y[k] / len(y[k]) for k in shared]).mean(0)
        torch.testing.assert_close(some[0].drift[i], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_a_stopped_default_run_resumes_to_the_same_bytes(
    tmp_path: Path, llama_folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anybits import config
    from anybits.quantize.pipeline import Progress

    monkeypatch.setattr(config, "ENOUGH_TOKENS", 64)  # some paths run every other batch, as with much text
    recipe = Recipe(method=method, group_size=32, samples=4, seq_len=32)
    text = ["the quick brown fox jumps over the lazy dog 0123456 " * 20]
    quantize_model(str(llama_folder), tmp_path / "whole", recipe, text)

    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize_model(str(llama_folder), tmp_path / "cut", recipe, text, progress=Progress(block_done=stop))
    quantize_model(str(llama_folder), tmp_path / "cut", recipe, text)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
