import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits import bits
from anybits.errors import AnybitsError
from anybits.quantize import anyprecision
from anybits.quantize.anyprecision import quantize_matrix
from anybits.weight import CodebookLevels, PlaneWeight


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(weight: PlaneWeight) -> dict[int, torch.Tensor]:
    assert isinstance(weight.levels, CodebookLevels)
    return dict(weight.levels.centroids)


def error(weight: torch.Tensor, quantized: PlaneWeight, p: int, h: torch.Tensor | None = None) -> torch.Tensor:
    e = (quantized.dequantize(p).double() - weight.double()).square()
    return (e if h is None else e * h.double()).sum(1)


def two_means(values: list[float], weights: list[float]) -> tuple[float, int]:
    """Least cost of one cut of sorted values, by trying all; the count of values below it."""

    def cost(v: list[float], h: list[float]) -> float:
        if not v:
            return 0.0
        mean = sum(a * b for a, b in zip(v, h, strict=True)) / sum(h)
        return sum(b * (a - mean) ** 2 for a, b in zip(v, h, strict=True))

    return min((cost(values[:i], weights[:i]) + cost(values[i:], weights[i:]), i) for i in range(len(values)))


def test_seed_and_splits_equal_brute_force() -> None:
    weight, h = randn(5, 11), torch.rand(5, 11, generator=torch.Generator().manual_seed(1)) + 0.1
    quantized = quantize_matrix(weight, h, (2, 3, 4), torch.float32)
    for n in range(5):
        order = weight[n].double().argsort()
        v, m = weight[n].double()[order].tolist(), h[n].double()[order].tolist()
        best = min(
            sum(
                sum(
                    b * (a - sum(x * y for x, y in zip(v[s:e], m[s:e], strict=True)) / sum(m[s:e])) ** 2
                    for a, b in zip(v[s:e], m[s:e], strict=True)
                )
                for s, e in itertools.pairwise((0, *cut, 11))
                if e > s
            )
            for cut in itertools.combinations_with_replacement(range(12), 3)
        )
        assert float(error(weight, quantized, 2, h)[n]) == pytest.approx(best, rel=1e-4)
    for p in (2, 3):
        parents = bits.planes_to_codes(quantized.planes, p, 11)
        for n in range(5):
            total = 0.0
            for code in range(2**p):
                members = (parents[n] == code).nonzero()[:, 0]
                members = members[weight[n, members].argsort()]
                if len(members):
                    total += two_means(weight[n, members].double().tolist(), h[n, members].double().tolist())[0]
            assert float(error(weight, quantized, p + 1, h)[n]) == pytest.approx(total, rel=1e-3, abs=1e-10)


def test_codes_are_the_nearest_seed_centroid() -> None:
    weight = randn(8, 200)
    quantized = quantize_matrix(weight, None, (3, 4), torch.float32)
    nearest = (weight[..., None] - tables(quantized)[3][:, None]).abs().argmin(-1)
    assert torch.equal(bits.planes_to_codes(quantized.planes, 3, 200).long(), nearest)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([(2,), (3, 5), (2, 8), (3, 4, 8)]), st.integers(0, 999))
def test_any_shape(rows: int, columns: int, precisions: tuple[int, ...], seed: int) -> None:
    weight = randn(rows, columns, seed=seed)
    if seed % 3 == 0:
        weight = weight.round()
    h = None if seed % 2 else randn(rows, columns, seed=seed + 1).square()
    quantized = quantize_matrix(weight, h, precisions, torch.float32)
    assert quantized.precisions == precisions
    assert quantized.planes.shape == (precisions[-1], rows, bits.words(columns))
    errors = [error(weight, quantized, p, h) for p in precisions]
    for low, high in itertools.pairwise(errors):
        assert (high <= low * (1 + 1e-5) + 1e-10).all()
    for table in tables(quantized).values():
        assert torch.isfinite(table).all()
        assert (table.diff(dim=1) >= 0).all()


def test_lower_planes_do_not_depend_on_the_top() -> None:
    weight, h = randn(6, 90), randn(6, 90, seed=1).square()
    low, high = quantize_matrix(weight, h, (3, 4)), quantize_matrix(weight, h, (3, 4, 5, 8))
    assert torch.equal(low.planes, high.planes[:4])
    for p in (3, 4):
        assert torch.equal(tables(low)[p], tables(high)[p])


def test_same_input_same_tensors_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = randn(9, 64), randn(9, 64, seed=1).square()
    first, again = quantize_matrix(weight, h, (2, 4)), quantize_matrix(weight, h, (2, 4))
    monkeypatch.setattr(anyprecision, "CHUNK", 128)
    chunked = quantize_matrix(weight, h, (2, 4))
    for other in (again, chunked):
        assert all(torch.equal(t, other.tensors()[name]) for name, t in first.tensors().items())


def test_few_distinct_values_are_exact() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 0.5] * 10, [2.0] * 40, [0.0] * 40])
    quantized = quantize_matrix(weight, None, (2, 3, 8))
    for p in (2, 3, 8):
        assert torch.equal(quantized.dequantize(p), weight)


def test_row_without_sensitivity_counts_as_uniform() -> None:
    weight = randn(2, 50)
    h = torch.stack([torch.zeros(50), torch.rand(50, generator=torch.Generator().manual_seed(0))])
    mixed, uniform = quantize_matrix(weight, h, (2, 3)), quantize_matrix(weight, None, (2, 3))
    assert torch.equal(mixed.dequantize(3)[0], uniform.dequantize(3)[0])
    assert not torch.equal(mixed.dequantize(3)[1], uniform.dequantize(3)[1])


def test_weights_without_sensitivity_land_near_their_value() -> None:
    weight, h = randn(4, 256), torch.ones(4, 256)
    h[:, ::2] = 0
    quantized = quantize_matrix(weight, h, (3,), torch.float32)
    nearest = (weight[..., None] - tables(quantized)[3][:, None]).abs().amin(-1)
    torch.testing.assert_close((quantized.dequantize(3) - weight).abs(), nearest)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scale_of_sensitivity_does_not_matter(scale: float) -> None:
    weight, h = randn(3, 60), randn(3, 60, seed=2).square()
    assert torch.equal(
        quantize_matrix(weight, h.double(), (2, 3)).planes, quantize_matrix(weight, h.double() * scale, (2, 3)).planes
    )


@pytest.mark.parametrize(
    ("weight", "sensitivity", "said"),
    [
        (torch.tensor([[1.0, float("nan")]]), None, "NaN"),
        (torch.tensor([[1.0, float("inf")]]), None, "infinite"),
        (torch.tensor([[1.0, 1e6]]), None, "too large"),
        (torch.ones(2, 3), torch.ones(3, 2), "shape"),
        (torch.ones(2, 3), -torch.ones(2, 3), "negative"),
        (torch.ones(2, 3, dtype=torch.int32), None, "float"),
        (torch.ones(3), None, "float"),
    ],
)
def test_bad_input_gets_one_sentence(weight: torch.Tensor, sensitivity: torch.Tensor | None, said: str) -> None:
    with pytest.raises(AnybitsError, match=said):
        quantize_matrix(weight, sensitivity, (2, 3))


def test_modes_and_threads_of_the_caller_stay() -> None:
    weight = randn(4, 64)
    plain = quantize_matrix(weight, None, (2, 3))
    threads = torch.get_num_threads()
    with torch.inference_mode():
        inside = quantize_matrix(weight, None, (2, 3))
    weight = torch.nn.Parameter(weight)
    trainable = quantize_matrix(weight, None, (2, 3))
    assert torch.get_num_threads() == threads
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, inside.tensors()[name])
        assert torch.equal(tensor, trainable.tensors()[name])
        assert not trainable.tensors()[name].requires_grad
