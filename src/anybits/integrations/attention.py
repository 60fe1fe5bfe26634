"""Attention of packed rows: a transformers model hands its queries, keys and values to whoever runs the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf

NAME = "anybits_packed"
_UNKNOWN = ("position_bias", "indices", "block_indices", "sinks", "cache")
"""Arguments of attention functions that say what a row sees in ways that are not known here."""

LAYER_TYPES = {"full_attention", "sliding_attention"}


class PackedAttention(Protocol):
    """Attends for one layer over rows of many sequences."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `[T, H, Dv]` for query `[H, T, D]`, key `[Hkv, T, D]` and value `[Hkv, T, Dv]`.

        window: a row sees this many positions, its own included; softcap: scores become c * tanh(score / c);
        sinks: `[H]`, scores of one more position each, whose value is zero.
        """


_active: ContextVar[PackedAttention | None] = ContextVar("anybits_packed_attention", default=None)


@contextmanager
def packed_attention(attention: PackedAttention) -> Iterator[None]:
    """Let every attention layer that runs in the body call `attention`."""
    token = _active.set(attention)
    try:
        yield
    finally:
        _active.reset(token)


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    attention = _active.get()
    if attention is None:
        raise AnybitsError("this model belongs to a serving engine: run it through the engine, or load it again")
    more = next((name for name in _UNKNOWN if kwargs.get(name) is not None), None)
    if attention_mask is not None or more is not None:
        what = "a mask of its own" if more is None else more
        raise AnybitsError(f"{type(module).__name__} gives its attention {what}: such a model cannot be served")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention(int(module.layer_idx), query[0], key[0], value[0], scaling, sliding_window, softcap, s_aux)
    return out[None].contiguous(), None


hf.register_attention(NAME, _forward)


def use_packed_attention(model: Any) -> None:
    """Switch `model` to packed attention; raise AnybitsError when its architecture keeps other state than KV."""
    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        raise AnybitsError(
            f"{type(model).__name__} has layers of type {', '.join(sorted(other))}: "
            f"only {' and '.join(sorted(LAYER_TYPES))} can be served"
        )
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise AnybitsError(f"{type(model).__name__} does not use transformers' AttentionInterface: it cannot be served")
