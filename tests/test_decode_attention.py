"""Decode attention against float64, and in models that were loaded."""

from pathlib import Path

import pytest
import torch

import anybits
from anybits import Recipe
from anybits.integrations import transformers as hf
from anybits.integrations.decode_step import attention as decode_attention
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


@pytest.mark.parametrize("mask", ["none", "bool", "added", "of each head"])
@pytest.mark.parametrize("shape", [(1, 4, 4, 16, 16, 1), (2, 6, 2, 8, 24, 37), (3, 4, 1, 40, 8, 5)])
def test_one_query_a_sequence(mask: str, shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, dim, value_dim, length = shape
    dtype = torch.bfloat16
    query = torch.randn(batch, heads, 1, dim).to(dtype)
    key = torch.randn(batch, kv_heads, length + 3, dim).to(dtype)[:, :, :length]  # not contiguous
    value = torch.randn(batch, kv_heads, length, value_dim).to(dtype)
    seen = torch.rand(batch, heads if mask == "of each head" else 1, 1, length) < 0.7
    seen[..., -1] = True
    given = {"none": None, "added": torch.zeros(seen.shape).masked_fill_(~seen, -1e30)}.get(mask, seen)
    out, _ = decode_attention.attend(torch.nn.Module(), query, key, value, given, scaling=0.3)
    torch.testing.assert_close(out.double(), oracle(query, key, value, given, 0.3), rtol=3e-2, atol=3e-2)
    assert out.shape == (batch, 1, heads, value_dim)


@pytest.mark.parametrize("amx", [False, True])
def test_loaded_models_decode_with_it_where_torch_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    source = save_tiny(tmp_path / "float", "mistral")  # has a sliding window of 16
    anybits.quantize(str(source), tmp_path / "any", Recipe(preset="fast", group_size=32, precisions=(2, 3)))
    folder = tmp_path / "any"
    model = hf.load_model(folder, dtype=torch.bfloat16)
    other = hf.load_model(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.config._attn_implementation == ("sdpa" if amx else decode_attention.NAME)
    assert other.config._attn_implementation == "eager"
    tokens = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(tokens)
    seen[0, :5] = 0  # padding
    found = []
    for each in (model, other):
        with torch.no_grad():
            cache = each(input_ids=tokens[:, :-1], attention_mask=seen[:, :-1]).past_key_values
            found.append(each(input_ids=tokens[:, -1:], attention_mask=seen, past_key_values=cache).logits)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
