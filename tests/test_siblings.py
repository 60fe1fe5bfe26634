"""Layers that get one x after another: the first multiplies for all, and nobody gets another's or an old result."""

import copy

import pytest
import torch

import anybits
from anybits import AnybitsError
from anybits.kernels import backend as kernels
from anybits.kernels import step
from anybits.kernels.reference import ReferenceBackend
from anybits.linear import PlaneLinear, Siblings, products_together
from anybits.precision import ModelPrecision
from conftest import random_weight


def layer(out_features: int, columns: int = 64, bias: bool = False) -> PlaneLinear:
    made = PlaneLinear(columns, out_features, 32, ModelPrecision(3), bias, torch.bfloat16)
    made.set_plane_weight(random_weight(out_features, columns, (2, 3), 32))
    if bias:
        made.bias.data = torch.randn(out_features).bfloat16()
    return made


@pytest.fixture
def layers() -> list[PlaneLinear]:
    made = [layer(48), layer(16, bias=True), layer(32)]
    Siblings(made)
    return made


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def without_autograd(request):
    with request.param():
        yield


@pytest.mark.usefixtures("without_autograd")
def test_each_gets_its_own_product_from_one_call(layers: list[PlaneLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    singles = [copy.deepcopy(one) for one in layers]
    for one in singles:
        one._siblings = None
    calls = []
    real = step.products
    monkeypatch.setattr(step, "products", lambda *a: calls.append(len(a[1])) or real(*a))
    for p in (2, 3):
        for shape in ((1, 1, 64), (2, 3, 64)):
            x = torch.randn(shape).bfloat16()
            with anybits.precision(p):
                found = [one(x) for one in layers]
                assert all(torch.equal(a, b(x)) for a, b in zip(found, singles, strict=True))
            assert calls == [3, 1, 1, 1]
            assert layers[0]._siblings._kept is None
            calls.clear()


@pytest.mark.usefixtures("without_autograd")
def test_other_x_changed_x_and_other_precisions_are_computed_again(layers: list[PlaneLinear]) -> None:
    x = torch.randn(1, 64).bfloat16()
    single = copy.deepcopy(layers[1])
    single._siblings = None
    layers[0](x)
    assert torch.equal(layers[1](x.clone()), single(x))
    layers[0](x)
    x.mul_(2)
    assert torch.equal(layers[1](x), single(x))
    layers[0](x)
    with anybits.precision(2):
        assert torch.equal(layers[1](x), single(x))
    assert torch.equal(layers[1](x), single(x))
    assert torch.equal(layers[1](x), single(x))  # asked twice


@pytest.mark.usefixtures("without_autograd")
def test_rows_of_their_own_precision_and_many_rows_go_the_other_way(layers: list[PlaneLinear]) -> None:
    x = torch.randn(4, 64).bfloat16()
    with anybits.precision(torch.tensor([2, 3, 2, 3], dtype=torch.int32)):
        mixed = layers[0](x)
    assert torch.equal(mixed[1], layers[0](x[1:2])[0])
    assert layers[0](torch.randn(20, 64).bfloat16()).shape == (20, 48)
    assert layers[0](torch.randn(64, 64).bfloat16().t()[:3]).shape == (3, 48)


def test_layers_of_different_widths_are_refused() -> None:
    with pytest.raises(AnybitsError, match="same number of columns"):
        Siblings([layer(8), layer(8, 96)])


class Together(ReferenceBackend):
    """The reference with the call that a GPU has: one for all weights."""

    name = "together"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def products(self, x: torch.Tensor, weights: list, precision: int | torch.Tensor) -> list[torch.Tensor]:
        self.calls.append(len(weights))
        return [self.matmul(x, weight, precision) for weight in weights]

    def matmul(self, x: torch.Tensor, prepared: object, precision: int | torch.Tensor) -> torch.Tensor:
        return super().matmul(x, prepared, precision)


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch) -> Together:
    backend = Together()
    monkeypatch.setattr(kernels, "_backends", [backend, *kernels.backends()])
    monkeypatch.setenv("ANYBITS_BACKEND", "together")
    return backend


def test_on_a_gpu_one_call_serves_all_at_any_precisions(layers: list[PlaneLinear], gpu_like: Together) -> None:
    x = torch.randn(3, 1, 64).bfloat16()
    rows = torch.tensor([2, 3, 2], dtype=torch.int32)
    for wanted in (2, 3, rows):
        with anybits.precision(wanted):
            apart = [one(x) for one in layers]
            assert gpu_like.calls == []  # outside of a step that was checked, an x may have changed
            with products_together():
                found = [one(x) for one in layers]
                other = layers[1](x.clone())
        assert gpu_like.calls == [3, 3]
        assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))
        assert torch.equal(other, apart[1])
        gpu_like.calls.clear()
    with anybits.precision(2), products_together():
        layers[0](x)
    with anybits.precision(3), products_together():
        assert torch.equal(layers[1](x), apart_at(layers[1], x, 3))


def apart_at(one: PlaneLinear, x: torch.Tensor, precision: int) -> torch.Tensor:
    with anybits.precision(precision):
        return one(x)


def test_profiles_that_differ_are_multiplied_apart(layers: list[PlaneLinear], gpu_like: Together) -> None:
    x = torch.randn(2, 64).bfloat16()
    for one, p in zip(layers, (2, 3, 3), strict=True):
        one.profiles = {"2.5": p}
    for wanted, calls in (("2.5", []), (torch.tensor([16, 2], dtype=torch.int32), []), (3, [3])):
        with anybits.precision(wanted):
            apart = [one(x) for one in layers]
            with products_together():
                assert all(torch.equal(one(x), y) for one, y in zip(layers, apart, strict=True))
        assert gpu_like.calls == calls
