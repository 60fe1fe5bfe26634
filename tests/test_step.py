"""Kernels of a decode step against float64, on every instruction set, with ragged sizes and poisoned outputs."""

from collections.abc import Iterator

import pytest
import torch

from anybits.errors import AnybitsError
from anybits.kernels import cpu, native, step
from conftest import random_weight

LIBRARY = native.library()
ISAS = [name for i, name in enumerate(native.ISAS) if LIBRARY is not None and LIBRARY.isa_usable(i)]
ONE_ROUNDING, TWO_ROUNDINGS = 2**-8, 2**-7  # relative, with float32 sums below


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 0xA5)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ANYBITS_CPU_ISA", request.param)
    step.isa_number.cache_clear()
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(real(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda t: real(t.shape, dtype=t.dtype).fill_(torch.nan))
    with torch.inference_mode():
        yield request.param
    step.isa_number.cache_clear()


def close(got: torch.Tensor, wanted: torch.Tensor, relative: float) -> None:
    assert got.dtype == torch.bfloat16
    atol = 1e-5 * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got.double(), wanted, rtol=relative, atol=atol)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 17), (1, 5, 64), (300, 1, 256), (1, 1, 4096)])
def test_rms_norm(isa: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).mul_(torch.rand((*shape[:-1], 1)) * 100).bfloat16()
    weight = torch.randn(shape[-1]).bfloat16()
    normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    close(step.rms_norm(x, weight, 1e-5), normed * weight.double(), TWO_ROUNDINGS)
    assert torch.equal(step.rms_norm(x, weight, 1e-5)[:1], step.rms_norm(x[:1], weight, 1e-5))


@pytest.mark.parametrize("shape", [(1,), (3, 31), (2, 1, 200), (700, 100)])
def test_silu_mul(isa: str, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape) * 20).bfloat16(), torch.randn(shape).bfloat16()
    gate.view(-1)[0] = -300.0
    g = gate.double()
    close(step.silu_mul(gate, up), g / (1 + (-g).exp()) * up.double(), TWO_ROUNDINGS)


def test_activation_of_values_that_are_not_finite(isa: str) -> None:
    gate = torch.tensor([torch.inf, torch.nan, 3e38, -3e38, 0.0]).bfloat16()
    got = step.silu_mul(gate, torch.ones_like(gate).fill_(1))
    torch.testing.assert_close(got, torch.tensor([torch.inf, torch.nan, 3e38, 0.0, 0.0]).bfloat16(), equal_nan=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 70), (3, 9, 16), (5, 130, 33), (8, 65, 4096), (64, 3, 40)])
def test_dense(isa: str, shape: tuple[int, int, int], bias: bool) -> None:
    m, n, k = shape
    x, weight = torch.randn(m, 1, k).bfloat16(), torch.randn(n, k).bfloat16()
    added = torch.randn(n).bfloat16() if bias else None
    got = step.dense(x, weight, added)
    wanted = x.double() @ weight.double().T + (0 if added is None else added.double())
    torch.testing.assert_close(got.double(), wanted, rtol=ONE_ROUNDING, atol=1e-6 * k)
    assert all(torch.equal(got[i : i + 1], step.dense(x[i : i + 1], weight, added)) for i in range(m))


def test_more_rows_than_a_call_takes_are_refused(isa: str) -> None:
    with pytest.raises(AnybitsError, match="status 3"):
        step.dense(torch.zeros(65, 8).bfloat16(), torch.zeros(4, 8).bfloat16())


@pytest.mark.parametrize(
    "shape", [(1, 4, 4, 16, 16, 1), (2, 6, 2, 48, 32, 37), (3, 7, 1, 128, 80, 5), (1, 32, 8, 128, 128, 300)]
)
def test_attention_of_one_position(isa: str, shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, dim, value_dim, length = shape
    query = torch.randn(batch, 1, heads, dim).mul_(3).bfloat16().transpose(1, 2)
    key = torch.randn(batch, kv_heads, length + 3, dim).bfloat16()
    value = torch.randn(batch, kv_heads, length + 3, value_dim).bfloat16()
    key[:, :, length:], value[:, :, length:] = torch.nan, torch.nan  # what lies behind the last position
    key, value = key[:, :, :length], value[:, :, :length]
    assert step.attention_fits(query, key, value)
    got = step.attend(query, key, value, 0.3)
    shared = heads // kv_heads
    k, v = (t.double().repeat_interleave(shared, 1) for t in (key, value))
    wanted = ((query.double() @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v
    torch.testing.assert_close(got.double(), wanted.transpose(1, 2), rtol=ONE_ROUNDING, atol=2e-5)


def test_results_do_not_depend_on_threads(isa: str) -> None:
    x, weight = torch.randn(3, 512).bfloat16(), torch.randn(901, 512).bfloat16()
    query, key, value = (torch.randn(2, h, n, 64).bfloat16() for h, n in ((8, 1), (4, 900), (4, 900)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (step.dense(x, weight), step.attend(query, key, value, 0.1), step.rms_norm(weight, x[0], 1e-6))
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_goes_elsewhere() -> None:
    x = torch.randn(2, 16).bfloat16()
    assert not step.usable(x)  # autograd is on
    with torch.no_grad():
        assert step.usable(x)
        assert not step.usable(x, x.float())
        query, key = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 5, 16)
        assert not step.attention_fits(query, key, key)  # two positions
        assert not step.attention_fits(query[:, :3, :1], key, key)
        assert not step.attention_fits(query[:, :, :1, :8], key[..., :8], key)
        assert not step.attention_fits(query[:, :, :1], key.transpose(2, 3).contiguous().transpose(2, 3), key)


def test_products_of_several_weights(isa: str) -> None:
    backend = cpu.CpuBackend(isa)
    weights = [random_weight(n, 96, (2, 3), 32) for n in (5, 40, 17)]
    prepared = [backend.prepare(weight) for weight in weights]
    for rows in (1, 4, 11):
        x = torch.randn(rows, 1, 96).bfloat16()
        assert step.few_rows(x, 96)
        for y, one, p in zip(step.products(x, prepared, (2, 3, 2), backend), prepared, (2, 3, 2), strict=True):
            assert torch.equal(y[:, 0], backend.matmul(x[:, 0], one, p))
    assert not step.few_rows(torch.randn(12, 96).bfloat16(), 96)
    assert not step.few_rows(torch.randn(2, 95).bfloat16(), 96)
    assert not step.few_rows(torch.randn(2, 96), 96)
    with pytest.raises(AnybitsError, match="status 4"):
        step.products(x, prepared[:1], (7,), backend)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


@pytest.mark.parametrize("shape", [(1, 4, 4, 32, 16, 1), (2, 6, 2, 64, 32, 37), (3, 7, 1, 128, 80, 5)])
@pytest.mark.parametrize("angles", ["of each", "shared"])
def test_attention_of_a_position_that_is_put_into_the_cache(isa: str, shape: tuple[int, ...], angles: str) -> None:
    batch, heads, kv_heads, dim, value_dim, length = shape
    query, key = torch.randn(batch, 1, heads * dim).bfloat16(), torch.randn(batch, 1, kv_heads * dim).bfloat16()
    value = torch.randn(batch, 1, kv_heads * value_dim).bfloat16()
    turns = torch.rand(batch if angles == "of each" else 1, 1, dim)
    cos, sin = turns.cos().bfloat16(), turns.sin().bfloat16()
    keys = torch.full((batch, kv_heads, length + 2, dim), torch.nan).bfloat16()
    values = torch.full((batch, kv_heads, length + 2, value_dim), torch.nan).bfloat16()
    keys[:, :, : length - 1] = torch.randn(dim).bfloat16()
    values[:, :, : length - 1] = torch.randn(value_dim).bfloat16()
    cache = keys[:, :, :length], values[:, :, :length]
    got = step.attend_new((query, key, value), (cos, sin), cache, 0.3)
    q, k = (rotated(t.view(batch, -1, dim), cos, sin)[:, :, None] for t in (query, key))  # rounded as torch rounds
    assert torch.equal(cache[0][:, :, -1:], k)
    assert torch.equal(cache[1][:, :, -1], value.view(batch, kv_heads, value_dim))
    assert keys[:, :, length:].isnan().all()
    assert torch.equal(got, step.attend(q, *cache, 0.3).view(got.shape))
