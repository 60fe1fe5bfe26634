"""Scales in 8 bits: steps and counts against their definition, and the whole way through the quantizers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits.config import DataAware
from anybits.quantize import anybcq, steps
from anybits.quantize.block_tuning import frozen, trainable
from anybits.quantize.data_aware import improve, join_rows
from anybits.quantize.families import family
from anybits.quantize.hessian import Moments, layout
from anybits.weight import AffineLevels, PlaneWeight


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels_of(weight: PlaneWeight) -> AffineLevels:
    assert isinstance(weight.levels, AffineLevels)
    return weight.levels


@settings(max_examples=60, deadline=None)
@given(exponent=st.integers(-26, 15), groups=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_every_value_is_within_half_a_step_and_float16_holds_all_of_them(exponent: int, groups: int, seed: int) -> None:
    values = randn(3, 5, groups, seed=seed).clamp(-1.9, 1.9) * 2.0**exponent
    step = steps.step_of(values, -1)
    counts = steps.counts(values, step)
    assert step.shape == (3, 5, 1)
    assert counts.abs().max() <= 127
    assert torch.equal(step.half().float(), step)
    assert torch.equal((counts * step).half().float(), counts * step)
    assert bool(((counts * step - values).abs() <= step / 2 * (1 + 1e-6)).all())
    peak = values.abs().amax(-1, keepdim=True)
    normal = peak >= 2.0**-13  # below, steps are few bits of a subnormal float16
    assert bool((step <= peak / 127 * 1.125 * (1 + 1e-6))[normal].all())


def test_the_ends_of_the_range() -> None:
    values = torch.tensor([[0.0, 0.0], [65504.0, -1.0], [2.0**-24, 0.0], [-3.0, 1.5]])
    step = steps.step_of(values, -1)
    found = steps.counts(values, step) * step
    assert found[0].tolist() == [0.0, 0.0]
    assert step[0] == 0
    assert torch.isfinite(found.half()).all()
    assert found[1, 0] >= 65000
    assert found[2, 0] == 2.0**-24
    assert found[3].sign().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [64, 88])
def test_the_data_free_quantizer_rounds_its_levels(symmetric: bool, columns: int) -> None:
    weight = randn(12, columns)
    plain = anybcq.quantize_matrix(weight, (2, 3), 32, symmetric)
    eight = anybcq.quantize_matrix(weight, (2, 3), 32, symmetric, scale_bits=8)
    assert torch.equal(plain.planes, eight.planes)
    assert levels_of(eight).scale_bits == 8
    for p in (2, 3):
        scales, offsets = levels_of(eight).values(p)
        step = steps.step_of(levels_of(plain).scales[p], -1)
        assert bool(((scales - levels_of(plain).scales[p].float()).abs() <= step / 2 * (1 + 1e-6)).all())
        assert (offsets is None) == symmetric
    expanded = levels_of(eight).expanded()
    assert expanded.scales[2].dtype == torch.float16, "anybits' own steps lose nothing in float16"


@pytest.mark.parametrize("order", ["given", "energy"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_data_aware_quantizer_sees_the_levels_that_are_stored(order: str, symmetric: bool) -> None:
    """No row's error rises above that of the start, whose levels are in 8 bits as well."""
    weight, x = randn(40, 88), randn(300, 88, seed=1) * torch.linspace(0.2, 2, 88)
    hessian = (x.T @ x).repeat(2, 1, 1)
    start = anybcq.quantize_matrix(weight, (2, 3), 32, symmetric, scale_bits=8)
    settings = DataAware(column_order=order, correction=0.0)
    found = improve(weight, start, Moments(hessian, hessian.clone()), settings)
    assert levels_of(found).scale_bits == 8
    assert levels_of(found).scales[2].dtype == torch.int8
    damped = hessian[0].double()
    damped += settings.damping * damped.diagonal().mean() * torch.eye(88, dtype=torch.float64)

    def errors(w: PlaneWeight, p: int) -> torch.Tensor:
        e = w.dequantize(p).double() - weight.double()
        return ((e @ damped) * e).sum(1)

    sixteen = anybcq.quantize_matrix(weight, (2, 3), 32, symmetric)
    best = improve(weight, sixteen, Moments(hessian, hessian.clone()), settings)
    for p in (2, 3):
        assert bool((errors(found, p) <= errors(start, p) * (1 + 1e-4)).all())
        assert errors(found, p).sum() < 0.9 * errors(start, p).sum()
        assert errors(found, p).sum() < 1.02 * errors(best, p).sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_that_keep_their_levels_keep_them_to_the_bit(symmetric: bool) -> None:
    start = anybcq.quantize_matrix(randn(20, 88), (2, 3), 32, symmetric, scale_bits=8)
    columns = layout(torch.diag(torch.rand(88, generator=torch.Generator().manual_seed(0)))[None], 32, True)
    before = family(start.levels, columns, 1, 1, 8)
    for name, tensor in before.stored().tensors(3).items():
        assert torch.equal(tensor, start.tensors()[name]), name
    moved = replace(before, parameters=[c * 1.01 for c in before.parameters]).rounded()
    kept = torch.tensor([3, 11, 19])
    moved.replace_rows(kept, before.rows(kept))
    other = moved.copy().stored()
    assert isinstance(other, AffineLevels)
    for p in (2, 3):
        for mine, theirs in zip(other.values(p), levels_of(start).values(p), strict=True):
            if mine is not None and theirs is not None:
                same = (mine == theirs).all(-1).view(-1, 20).all(0)
                assert same[kept].all()
                assert not same.all()


def test_joined_rows_are_the_rows() -> None:
    whole = anybcq.quantize_matrix(randn(12, 64), (2, 3), 32, False, scale_bits=8)
    again = join_rows([whole.rows(0, 5), whole.rows(5, 12)])
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


def test_tuned_levels_go_back_into_steps() -> None:
    weight = anybcq.quantize_matrix(randn(12, 64), (2, 3), 32, False, scale_bits=8)
    trained = trainable(weight, 3)
    assert all(t.requires_grad and t.dtype == torch.float32 for t in trained.levels.tensors(3).values())
    back = frozen(trained, weight, 3)
    assert torch.equal(back.dequantize(2), weight.dequantize(2))
    step = levels_of(weight).scale_steps[3].float().max()
    scales, before = levels_of(back).values(3)[0], levels_of(weight).values(3)[0]
    assert levels_of(back).scale_bits == 8
    assert float((scales - before).detach().abs().max()) <= step
    moved = replace(trained, levels=trained.levels.map(lambda t: t + 1, keep=lambda p: True))
    assert float((frozen(moved, weight, 3).dequantize(3) - weight.dequantize(3)).abs().max()) > 0.5
