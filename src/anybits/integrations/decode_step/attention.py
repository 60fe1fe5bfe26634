"""Decode attention on the CPU: one new position of each sequence.

torch's fused attention is made for many queries. With one, in bfloat16 on a CPU without AMX, it takes ten to twenty
times as long as the two products that it stands for; with AMX it is as fast. So one query goes through a kernel of our
own or, with a mask or a shape that it does not take, through two products. Everything else stays with torch.
"""

from __future__ import annotations

from typing import Any

import torch

from anybits.integrations import transformers as hf
from anybits.kernels import step

NAME = "anybits_decode"

_ELSEWHERE = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments that only other attention functions know what to do with."""


def is_plain(arguments: dict[str, Any]) -> bool:
    """Return whether the further arguments of an attention function ask for nothing but softmax(q k) v."""
    return not arguments.get("dropout") and all(arguments.get(name) is None for name in _ELSEWHERE)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return `[B, M, H, Dv]` for query `[B, H, M, D]`, key `[B, Hkv, L, D]` and value `[B, Hkv, L, Dv]`.

    attention_mask: bool (True is seen) or added to the scores, broadcast to `[B, H, M, L]`. M = 1 in bfloat16 on a CPU
    is computed here: without a mask in float32 throughout; with one the products are in bfloat16 and the softmax in
    float32, as in transformers' eager attention.
    """
    here = query.shape[2] == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if not here or query.requires_grad or not is_plain(kwargs):
        return hf.sdpa_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None and step.usable(query, key, value) and step.attention_fits(query, key, value):
        return step.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    scores = (grouped @ key.transpose(-1, -2)).float() * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        mask = attention_mask
        if mask.shape[1] != 1:
            mask = mask.expand(batch, heads, 1, length).reshape(scores.shape)
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    out = scores.softmax(-1).to(value.dtype) @ value
    return out.reshape(batch, 1, heads, -1), None


hf.register_attention(NAME, attend, like="sdpa")


def use_decode_attention(model: Any) -> None:
    """Switch `model` to this one where torch's fused attention is slow; models that chose another keep theirs."""
    if model.config._attn_implementation == "sdpa" and not torch.cpu._is_amx_tile_supported():
        model.set_attn_implementation(NAME)
