import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits import bits
from anybits.errors import AnybitsError
from anybits.quantize import anybcq
from anybits.quantize.anybcq import Fit, expand, fit_base, least_squares, quantize_matrix
from anybits.weight import AffineLevels, PlaneWeight


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def affine(weight: PlaneWeight) -> AffineLevels:
    assert isinstance(weight.levels, AffineLevels)
    return weight.levels


def group_errors(weight: torch.Tensor, quantized: PlaneWeight, p: int, size: int) -> torch.Tensor:
    e = (quantized.dequantize(p).double() - weight.double()).square()
    pad = -e.shape[1] % size
    return torch.nn.functional.pad(e, (0, pad)).view(len(e), -1, size).sum(-1)


def signs_of(codes: torch.Tensor, p: int) -> torch.Tensor:
    planes = [(codes >> (p - 1 - i) & 1).double() * 2 - 1 for i in range(p)]
    return torch.stack(planes, 1)


# The published algorithm for one group, in loops: numpy's own least squares, all levels tried for each weight.


def naive_solve(signs: np.ndarray, w: np.ndarray, h: np.ndarray, symmetric: bool) -> np.ndarray:
    basis = signs if symmetric else np.concatenate([signs, np.ones((len(w), 1))], 1)
    root = np.sqrt(h)[:, None]
    x = np.linalg.lstsq(basis * root, w * root[:, 0], rcond=None)[0]
    return np.append(x, 0.0) if symmetric else x


def naive_base(w: np.ndarray, h: np.ndarray, p: int, rounds: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(list(itertools.product([-1.0, 1.0], repeat=p)))
    r, planes = w - (0.0 if symmetric else (h * w).sum() / h.sum()), []
    for _ in range(p):
        b = np.where(r >= 0, 1.0, -1.0)
        r = r - (h * np.abs(r)).sum() / h.sum() * b
        planes.append(b)
    signs = np.stack(planes, 1)
    for _ in range(rounds):
        x = naive_solve(signs, w, h, symmetric)
        x[:p] = -np.sort(-np.abs(x[:p]))
        levels = table @ x[:p] + x[p]
        signs = table[np.abs(w[:, None] - levels).argmin(1)]
    return signs, x


def naive_expand(
    signs: np.ndarray, w: np.ndarray, h: np.ndarray, rounds: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    p = signs.shape[1]
    x = naive_solve(signs, w, h, symmetric)
    x = np.insert(x, p, 0.0)
    for _ in range(rounds):
        b = np.where(w - signs @ x[:p] - x[-1] >= 0, 1.0, -1.0)
        grown = np.concatenate([signs, b[:, None]], 1)
        x = naive_solve(grown, w, h, symmetric)
    b = np.where(w - signs @ x[:p] - x[-1] >= 0, 1.0, -1.0)
    x[p] = abs(x[p])
    return np.concatenate([signs, b[:, None]], 1), x


def naive_codes(signs: np.ndarray) -> list[int]:
    return [int("".join("1" if s > 0 else "0" for s in row), 2) for row in signs]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("base", [1, 2, 3, 4])
def test_equals_the_naive_algorithm(base: int, weighted: bool, symmetric: bool) -> None:
    values = randn(6, 48, seed=base, dtype=torch.float64)
    weights = torch.rand(6, 48, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.1
    h = weights if weighted else torch.ones_like(values)
    fit = fit_base(values, base, 50, symmetric, weights if weighted else None)
    naive = [naive_base(v, m, base, 50, symmetric) for v, m in zip(values.numpy(), h.numpy(), strict=True)]
    for p in range(base, base + 3):
        for n, (signs, x) in enumerate(naive):
            assert fit.codes[n].tolist() == naive_codes(signs)
            np.testing.assert_allclose(fit.scales[n].numpy(), x[:p], atol=1e-5)
            np.testing.assert_allclose(float(fit.offsets[n]), x[-1], atol=1e-5)
            wanted = (h[n].numpy() * (signs @ x[:p] + x[-1] - values[n].numpy()) ** 2).sum()
            assert float(fit.error[n]) == pytest.approx(wanted, rel=1e-5)
        fit = expand(values, fit, 50, symmetric, weights if weighted else None)
        naive = [
            naive_expand(s, v, m, 50, symmetric) for (s, _), v, m in zip(naive, values.numpy(), h.numpy(), strict=True)
        ]


@pytest.mark.parametrize("symmetric", [False, True])
def test_expand_takes_codes_from_anywhere(symmetric: bool) -> None:
    values = randn(5, 40, dtype=torch.float64)
    codes = torch.randint(0, 4, (5, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    scales, offsets = least_squares(signs_of(codes, 2), values, None, symmetric)
    grown = expand(values, Fit(codes, scales, offsets, torch.zeros(5)), 30, symmetric)
    assert torch.equal(grown.codes >> 1, codes)
    for n in range(5):
        signs, x = naive_expand(signs_of(codes, 2)[n].T.numpy(), values[n].numpy(), np.ones(40), 30, symmetric)
        assert grown.codes[n].tolist() == naive_codes(signs)
        np.testing.assert_allclose(grown.scales[n].numpy(), x[:3], atol=1e-5)


@pytest.mark.parametrize("level_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("precisions", "symmetric"), [((2,), False), ((3, 4), True), ((4,), False), ((2, 5), True)])
def test_base_codes_are_the_nearest_stored_level(
    precisions: tuple[int, ...], symmetric: bool, level_dtype: torch.dtype
) -> None:
    weight = randn(6, 128)
    quantized = quantize_matrix(weight, precisions, 64, symmetric, level_dtype=level_dtype)
    p, levels = precisions[0], affine(quantized)
    table = signs_of(torch.arange(2**p)[None], p)[0]
    values = torch.einsum("pc,png->ngc", table, levels.scales[p].double())
    if levels.offsets is not None:
        values += levels.offsets[p].double()[..., None]
    least = (weight.double().view(6, 2, 64, 1) - values[:, :, None]).abs().amin(-1).view(6, 128)
    got = (quantized.dequantize(p).double() - weight.double()).abs()
    torch.testing.assert_close(got, least, atol=1e-6, rtol=0)
    scales = levels.scales[p]
    assert (scales >= 0).all()
    assert (scales.diff(dim=0) <= 0).all()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 140),
    st.sampled_from([32, 64, 96, -1]),
    st.sampled_from([(2,), (2, 3, 4), (3, 5), (2, 8)]),
    st.booleans(),
    st.integers(0, 999),
)
def test_any_shape(rows: int, columns: int, size: int, precisions: tuple[int, ...], symmetric: bool, seed: int) -> None:
    weight = randn(rows, columns, seed=seed)
    if seed % 3 == 0:
        weight = weight.round() + 3
    for dtype in (torch.float16, torch.float32):
        quantized = quantize_matrix(weight, precisions, size, symmetric, rounds=6, level_dtype=dtype)
        assert quantized.precisions == precisions
        assert (affine(quantized).offsets is None) == symmetric
        for levels in affine(quantized).scales.values():
            assert torch.isfinite(levels).all()
        width = columns if size == -1 else size
        errors = [group_errors(weight, quantized, p, width) for p in precisions]
        for low, high in itertools.pairwise(errors):
            # The slack is dequantize's own float32 rounding.
            assert (high <= low * (1 + 1e-4) + 1e-9).all()


def test_groups_do_not_depend_on_each_other() -> None:
    weight = randn(3, 150)
    whole = quantize_matrix(weight, (2, 3), 64, False)
    for g, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 150))):
        apart = quantize_matrix(weight[:, columns], (2, 3), -1, False)
        for p in (2, 3):
            torch.testing.assert_close(whole.dequantize(p)[:, columns], apart.dequantize(p), rtol=2e-3, atol=2e-3)
            levels = affine(whole).scales[p][:, :, g].float(), affine(apart).scales[p][:, :, 0].float()
            torch.testing.assert_close(*levels, rtol=2e-3, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_lower_precisions_do_not_depend_on_the_top(symmetric: bool) -> None:
    weight = randn(7, 100)
    low, high = quantize_matrix(weight, (2, 3), 32, symmetric), quantize_matrix(weight, (2, 3, 4), 32, symmetric)
    gaps = quantize_matrix(weight, (2, 4), 32, symmetric)
    assert torch.equal(low.planes, high.planes[:3])
    assert torch.equal(gaps.planes, high.planes)
    for p, other in ((2, low), (3, low), (2, gaps), (4, gaps)):
        for name, tensor in affine(other).tensors(p).items():
            assert torch.equal(tensor, affine(high).tensors(p)[name])


def test_same_input_same_tensors_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(9, 160)
    first, again = quantize_matrix(weight, (2, 4), 64, False), quantize_matrix(weight, (2, 4), 64, False)
    monkeypatch.setattr(anybcq, "CHUNK", 300)
    chunked = quantize_matrix(weight, (2, 4), 64, False)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
        # A chunk is another matrix product: the last bit of a float64 sum may differ, rounded levels hardly ever.
        torch.testing.assert_close(tensor.float(), chunked.tensors()[name].float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_singular_groups_are_exact(symmetric: bool) -> None:
    weight = torch.stack([torch.full((64,), 0.5), torch.zeros(64), torch.tensor([-1.0, 1.0]).repeat(32)])
    quantized = quantize_matrix(weight, (2, 3, 4, 8), 32, symmetric)
    for p in (2, 3, 4, 8):
        torch.testing.assert_close(quantized.dequantize(p), weight, rtol=1e-3, atol=1e-6)


def test_offset_far_from_zero_costs_nothing() -> None:
    weight = randn(4, 64, dtype=torch.float64)
    near = fit_base(weight, 2, 20, False)
    far = fit_base(weight + 1000, 2, 20, False)
    assert torch.equal(near.codes, far.codes)
    torch.testing.assert_close(near.error, far.error, rtol=1e-6, atol=0)


def test_columns_without_weight_do_not_count() -> None:
    values = randn(4, 64, dtype=torch.float64)
    weights = torch.ones(4, 64, dtype=torch.float64)
    weights[:, 40:] = 0
    padded, cut = fit_base(values, 2, 20, False, weights), fit_base(values[:, :40], 2, 20, False)
    assert torch.equal(padded.codes[:, :40], cut.codes)
    torch.testing.assert_close(padded.scales, cut.scales)
    nothing = fit_base(values, 2, 20, False, torch.zeros_like(values))
    assert torch.isfinite(expand(values, nothing, 5, False, torch.zeros_like(values)).scales).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_least_squares_equals_lstsq(dtype: torch.dtype, symmetric: bool) -> None:
    values = randn(5, 70, dtype=dtype)
    codes = torch.randint(0, 8, (5, 70), generator=torch.Generator().manual_seed(3))
    weights = torch.rand(5, 70, generator=torch.Generator().manual_seed(4)).to(dtype)
    scales, offsets = least_squares(signs_of(codes, 3).to(dtype), values, weights, symmetric)
    assert scales.dtype == dtype
    for n in range(5):
        signs = signs_of(codes, 3)[n].T.numpy()
        x = naive_solve(signs, values[n].double().numpy(), weights[n].double().numpy(), symmetric)
        np.testing.assert_allclose(np.append(scales[n].numpy(), offsets[n].numpy()), x, atol=1e-4)


def test_least_squares_of_equal_planes_is_finite() -> None:
    signs = torch.ones(2, 3, 32)
    scales, offsets = least_squares(signs, torch.full((2, 32), 0.5), None, True)
    torch.testing.assert_close(scales.sum(1), torch.full((2,), 0.5))
    assert (offsets == 0).all()


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor([[1.0, -float("inf")]]), "infinite"),
        (torch.tensor([[-1e6, 1e6]]), "too large"),
        (torch.ones(2, 3, dtype=torch.int32), "float"),
        (torch.ones(3), "float"),
    ],
)
def test_bad_input_gets_one_sentence(weight: torch.Tensor, said: str) -> None:
    with pytest.raises(AnybitsError, match=said):
        quantize_matrix(weight, (2, 3), 32, False)


def test_group_size_must_fit() -> None:
    with pytest.raises(AnybitsError, match="group size 48"):
        quantize_matrix(torch.ones(2, 96), (2,), 48, False)


def test_padding_bits_are_zero() -> None:
    quantized = quantize_matrix(randn(2, 40), (2,), 32, False)
    assert (bits.unpack(quantized.planes, 40).shape[-1], int((quantized.planes[..., 1] >> 8).abs().max())) == (40, 0)


def test_modes_and_threads_of_the_caller_stay() -> None:
    weight = randn(4, 64)
    plain = quantize_matrix(weight, (2, 3), 32, False)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        inside = quantize_matrix(weight, (2, 3), 32, False)
    weight = torch.nn.Parameter(weight)
    trainable = quantize_matrix(weight, (2, 3), 32, False)
    assert torch.get_num_threads() == threads
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, inside.tensors()[name])
        assert torch.equal(tensor, trainable.tensors()[name])
        assert not trainable.tensors()[name].requires_grad
