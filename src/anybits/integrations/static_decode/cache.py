"""A KV cache of fixed size whose every step is the same operators on the same memory: what a CUDA graph can replay.

transformers' static layers for sliding windows keep their length in Python and copy the whole window at every
position, so a replayed step would neither move on nor be the same step. Here position q lies in slot q modulo the
number of slots, the position is a tensor, and the mask follows from it.
"""

from __future__ import annotations

from typing import Any

import torch

from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf

MOST_ROWS = 8
"""New positions of one step at most: a ring has so many slots more than its window, so that positions which are
dropped again have not overwritten any that are still seen."""


class Slots:
    """Where positions lie and which of them a row sees, for all layers with one window.

    size: slots; window: positions that a row sees, its own included, or None for all.
    """

    def __init__(self, size: int, window: int | None, device: torch.device) -> None:
        self.size, self.window = size, window
        self._all = torch.arange(size, device=device)
        self.new = self._all[:0]
        """int64 `[M]`: the slots of a step's new positions."""

    def begin(self, positions: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Start a step at int64 `positions` `[M]`; return which slots its rows see, bool `[B, 1, M, size]`.

        first: int64 `[B]`, the first position of each sequence that is not padding.
        """
        self.new = positions % self.size
        held = positions[-1] - (positions[-1] - self._all) % self.size  # the latest position that a slot may hold
        seen = held <= positions[:, None]
        if self.window is not None:
            seen = seen & (held > positions[:, None] - self.window)
        return (seen & (held >= first[:, None])[:, None])[:, None]


class StaticLayer(hf.CacheLayerMixin):
    """Keys and values `[B, Hkv, slots, D]` of one layer, made from a layer of a prefilled cache."""

    is_compileable = True

    def __init__(self, prefilled: Any, slots: Slots) -> None:
        super().__init__()
        self.slots, self.is_sliding = slots, slots.window is not None
        batch, heads, _, _ = prefilled.keys.shape
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            self.keys, self.values = (
                torch.zeros(batch, heads, slots.size, t.shape[-1], dtype=t.dtype, device=t.device)
                for t in (prefilled.keys, prefilled.values)
            )
        self.is_initialized = True

    def fill(self, prefilled: Any, length: int) -> None:
        """Take over what the layer `prefilled` holds of `length` positions."""
        kept = min(prefilled.keys.shape[2], self.slots.size)
        at = torch.arange(length - kept, length, device=self.keys.device) % self.slots.size
        self.keys.index_copy_(2, at, prefilled.keys[:, :, prefilled.keys.shape[2] - kept :])
        self.values.index_copy_(2, at, prefilled.values[:, :, prefilled.values.shape[2] - kept :])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[B, Hkv, M, D]` into the step's slots and return all slots."""
        self.keys.index_copy_(2, self.slots.new, key_states)
        self.values.index_copy_(2, self.slots.new, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: there are keys and values from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return slots and offset; a step brings its own mask, so nobody asks."""
        return self.slots.size, 0

    def get_seq_length(self) -> int:
        """Raise: the length is the decoder's, and a model that asks for it would bake it into a graph."""
        raise AnybitsError("this model asks the cache for its length in every step, which a static cache cannot tell")

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.slots.size


def build(prefilled: Any, capacity: int) -> tuple[hf.Cache, list[Slots]]:
    """Return an empty static cache shaped like `prefilled`, for `capacity` positions, and its distinct Slots.

    Raises AnybitsError for a layer that is neither full nor sliding-window attention.
    """
    layers, found = [], dict[int | None, Slots]()
    for layer in prefilled.layers:
        window = window_of(layer)
        if window not in found:
            with torch.inference_mode(False):
                found[window] = Slots(_slots(window, capacity), window, layer.keys.device)
        layers.append(StaticLayer(layer, found[window]))
    if len(found) > 2 or (len(found) == 2 and None not in found):
        raise AnybitsError(f"a static cache takes one window beside full attention, not {sorted(map(str, found))}")
    return hf.Cache(layers=layers), list(found.values())


def _slots(window: int | None, capacity: int) -> int:
    return capacity if window is None else min(capacity, -(-(window + MOST_ROWS) // 8) * 8)


def window_of(layer: Any) -> int | None:
    """Return the window of a prefilled cache's layer, None for full attention; AnybitsError for other layers."""
    if type(layer) not in hf.SHORTENABLE:
        raise AnybitsError(f"a static cache takes full and sliding-window attention, not {type(layer).__name__}")
    return int(layer.sliding_window) if isinstance(layer, hf.DynamicSlidingWindowLayer) else None


def fits(cache: hf.Cache, prefilled: Any, capacity: int) -> bool:
    """Return whether a built cache can take `prefilled` over, with `capacity` positions in all."""

    def like(a: StaticLayer, b: Any) -> bool:
        window = window_of(b)
        enough = a.slots.window == window and a.slots.size >= _slots(window, capacity)
        alike = a.keys.dtype == b.keys.dtype and a.keys.device == b.keys.device
        shapes = (a.keys.shape[:2], a.keys.shape[3], a.values.shape[3])
        return enough and alike and shapes == (b.keys.shape[:2], b.keys.shape[3], b.values.shape[3])

    pairs = zip(cache.layers, prefilled.layers, strict=False)
    return len(cache.layers) == len(prefilled.layers) and all(like(a, b) for a, b in pairs)
