"""Attention layers of a loaded model whose decode steps take one call from projections to output.

In transformers a new position costs a layer 16 operators for the rotation alone, and several for views, cache and
attention. A layer is replaced where it does what Llama's does: projections, norms of query and key if it has them,
rotation of halves, cache, softmax(q k) v, output. That is asked of the layer itself: it runs beside the kernel on small
projections.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from anybits.integrations import transformers as hf
from anybits.integrations.decode_step import attention as decode_attention
from anybits.integrations.decode_step.cache import GrowingLayer
from anybits.integrations.decode_step.modules import agree, on_cpu, standard, with_forward
from anybits.kernels import step
from anybits.kernels.cuda import step as small

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
PLAIN = {decode_attention.NAME, f"{decode_attention.NAME}_by_rows"}
"""Implementations of attention that compute softmax(q k) v for one new position."""

_FUSED = PLAIN | {"sdpa"}
"""Implementations whose layers may take the kernel of a GPU: on a CPU with AMX torch's own stays in use."""

_HIDDEN, _POSITIONS = 32, 5


class _Attention:
    """Attention of one new position of each sequence, without a mask, over a cache that grows in place."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return `[B, M, hidden]` and None for hidden_states `[B, M, hidden]`."""
        if (
            hidden_states.shape[1] == 1
            and attention_mask is None
            and past_key_values is not None
            and self.config._attn_implementation in PLAIN
            and not (kwargs and (kwargs.get("output_attentions") or not decode_attention.is_plain(kwargs)))
            and step.usable(hidden_states)
            and _holds(past_key_values, self.layer_idx, hidden_states.shape[0])
        ):
            return _step(self, hidden_states, position_embeddings, past_key_values.layers[self.layer_idx]), None
        if (
            attention_mask is not None
            and past_key_values is not None
            and self.config._attn_implementation in _FUSED
            and not (kwargs and (kwargs.get("output_attentions") or not decode_attention.is_plain(kwargs)))
            and small.usable(hidden_states, *position_embeddings)
            and position_embeddings[0].shape[-1] == self.head_dim
            and hasattr(past_key_values.layers[self.layer_idx], "slots")
        ):
            layer = past_key_values.layers[self.layer_idx]
            return _slots_step(self, hidden_states, position_embeddings, attention_mask, layer), None
        return super().forward(  # type: ignore[misc]
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )


def _holds(cache: Any, layer: int, batch: int) -> bool:
    """Return whether `cache` has bfloat16 positions of `batch` sequences in a layer that grows in place."""
    found = cache.layers[layer] if len(cache.layers) > layer else None
    positions = found.positions() if type(found) is GrowingLayer else None
    return positions is not None and positions[0] == batch


def _step(layer: Any, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], cache: GrowingLayer) -> torch.Tensor:
    return layer.o_proj(step.attend_new(_projected(layer, x), angles, cache.next_place(), layer.scaling))


def _projected(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of x, before they are rotated."""
    query, key, value = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    if hasattr(layer, "q_norm"):
        heads = (*x.shape[:2], -1, layer.head_dim)
        query = layer.q_norm(query.view(heads)).view(query.shape)
        key = layer.k_norm(key.view(heads)).view(key.shape)
    return query, key, value


def _slots_step(
    layer: Any, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Return the layer's output for x `[B, M, hidden]` over a layer of a static cache, on a GPU."""
    query = small.rotate_into(_projected(layer, x), angles, (cache.keys, cache.values), cache.slots.new)
    out, _ = decode_attention.attend(layer, query, cache.keys, cache.values, mask, scaling=layer.scaling)
    return layer.o_proj(out.reshape(*x.shape[:2], -1))


def use_step_attention(model: nn.Module) -> None:
    """Let attention layers that do what Llama's does take the kernels, where decode attention or torch's is in use."""
    for module in model.modules():
        if _is_attention(module):
            module.__class__ = with_forward(_Attention, type(module))


def _is_attention(module: Any) -> bool:
    children = {name for name, _ in module.named_children()}
    if isinstance(module, _Attention) or not children or children - {*_PROJECTIONS, *_NORMS}:
        return False
    if not set(_PROJECTIONS) <= children or ("q_norm" in children) != ("k_norm" in children):
        return False
    named = all(
        hasattr(module, name) for name in ("config", "layer_idx", "head_dim", "scaling", "num_key_value_groups")
    )
    if not named or module.config._attn_implementation not in _FUSED or module.head_dim % 32:
        return False
    try:
        return _does_the_same(module)
    except Exception:  # other arguments, shapes or kinds of angles: whatever it does, it is not this
        return False


def _does_the_same(module: Any) -> bool:
    """Run the layer with small projections of its own and another's class beside the kernel, for one position."""
    dim, heads = module.head_dim, module.num_key_value_groups
    little = copy.copy(module)
    little._modules = dict(little._modules)
    generator = torch.Generator().manual_seed(dim)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    for name, sizes in zip(
        _PROJECTIONS, ((heads * dim, _HIDDEN), (dim, _HIDDEN), (dim, _HIDDEN), (_HIDDEN, heads * dim)), strict=True
    ):
        projection = nn.Linear(sizes[1], sizes[0], bias=False, device="meta")
        projection.weight = nn.Parameter(noise(*sizes) * 0.2, requires_grad=False)
        little._modules[name] = projection
    for name in _NORMS:
        if name in little._modules:
            little._modules[name] = on_cpu(little._modules[name])
    turns = torch.rand(1, 1, dim // 2, generator=generator) * 6
    cos, sin = (torch.cat((part, part), dim=-1).bfloat16() for part in (turns.cos(), turns.sin()))
    angles = cos, sin
    little.layer_idx = 0
    caches = [hf.DynamicCache(), hf.DynamicCache()]
    past = noise(1, 1, _POSITIONS, dim), noise(1, 1, _POSITIONS, dim)
    for cache in caches:
        cache.update(*past, 0)
    caches[1].layers[0].__class__ = GrowingLayer
    x = noise(1, 1, _HIDDEN)
    with torch.no_grad():
        own = little(hidden_states=x, position_embeddings=angles, attention_mask=None, past_key_values=caches[0])[0]
        place = caches[1].layers[0].next_place()
        ours = little.o_proj(standard().attend_new(_projected(little, x), angles, place, little.scaling))
    kept = zip((caches[0].layers[0].keys, caches[0].layers[0].values), caches[1].layers[0].next_place(), strict=True)
    return agree(own, ours) and all(torch.equal(a, b[:, :, :-1]) for a, b in kept)
