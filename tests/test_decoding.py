"""Decode attention against float64, and a random-weight model whose layers repeat."""

import json
from pathlib import Path

import pytest
import torch

import anybits
from anybits import AnybitsError, Recipe
from anybits.evaluate import end_to_end
from anybits.integrations import decoding
from anybits.integrations import transformers as hf
from conftest import save_tiny


def oracle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Head after head, in float64: `[B, 1, H, Dv]`."""
    batch, heads, _, _ = query.shape
    shared = heads // key.shape[1]
    out = torch.full((batch, 1, heads, value.shape[-1]), torch.nan, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            scores = key[b, h // shared].double() @ query[b, h, 0].double() * scaling
            if mask is not None:
                seen = mask[b % len(mask), h % mask.shape[1], 0]
                scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen.double()
            out[b, 0, h] = scores.softmax(0) @ value[b, h // shared].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "bool", "added", "of each head"])
@pytest.mark.parametrize("shape", [(1, 4, 4, 16, 16, 1), (2, 6, 2, 8, 24, 37), (3, 4, 1, 40, 8, 5)])
def test_one_query_a_sequence(dtype: torch.dtype, mask: str, shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, dim, value_dim, length = shape
    query = torch.randn(batch, heads, 1, dim).to(dtype)
    key = torch.randn(batch, kv_heads, length + 3, dim).to(dtype)[:, :, :length]  # not contiguous
    value = torch.randn(batch, kv_heads, length, value_dim).to(dtype)
    seen = torch.rand(batch, heads if mask == "of each head" else 1, 1, length) < 0.7
    seen[..., -1] = True
    given = {"none": None, "added": torch.zeros(seen.shape).masked_fill_(~seen, -1e30)}.get(mask, seen)
    out, _ = decoding.attend(torch.nn.Module(), query, key, value, given, scaling=0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), oracle(query, key, value, given, 0.3), rtol=tolerance, atol=tolerance)
    assert out.shape == (batch, 1, heads, value_dim)


def test_loaded_models_decode_with_it_and_agree_with_torch(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "float", "mistral")  # has a sliding window of 16
    anybits.quantize(str(source), tmp_path / "any", Recipe(preset="fast", group_size=32, precisions=(2, 3)))
    model, other = hf.load_model(tmp_path / "any"), hf.load_model(tmp_path / "any", attn_implementation="eager")
    assert model.config._attn_implementation == decoding.NAME
    assert other.config._attn_implementation == "eager"
    tokens = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0
    wanted = {"input_ids": tokens, "attention_mask": padding, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**wanted), other.generate(**wanted))


def test_decode_steps_of_a_random_model_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=32)
    monkeypatch.setitem(end_to_end.MODELS, "tiny", sizes | {"num_key_value_heads": 2})
    file = tmp_path / "steps.json"
    timings = list(end_to_end.bench_decoding("tiny", "2,3", (5, 9), rounds=1, distinct=2, json_file=file))
    assert [(t.context, t.precision) for t in timings] == [(c, p) for c in (5, 9) for p in (16, 2, 3)]
    assert [json.loads(line)["precision"] for line in file.read_text().splitlines()] == [16, 2, 3] * 2
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert timings[0].bytes == 2 * (matrices + 64 * 32)
    assert timings[1].bytes < timings[2].bytes < timings[0].bytes
    assert all(t.distinct_layers == 2 and t.layers == 3 and t.speedup_vs_bf16 > 0 for t in timings)
    head = next(
        end_to_end.bench_decoding("tiny", "2", rounds=1, distinct=1, quantize_head=True, method="any-precision")
    )
    assert head.quantized_head
    for bad in ({"model": "none"}, {"contexts": (0,)}, {"method": "x"}):
        with pytest.raises(AnybitsError):
            next(end_to_end.bench_decoding(**{"model": "tiny"} | bad))
