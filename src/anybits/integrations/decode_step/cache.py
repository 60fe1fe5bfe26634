"""A KV cache that grows in place: transformers' own copies all keys and values at every new position."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from anybits.integrations import transformers as hf

LEAST_ROOM = 128
"""Positions that are reserved at least when a layer's memory is used up; otherwise a quarter of what there is."""


class GrowingLayer(hf.DynamicLayer):
    """DynamicLayer whose keys and values are views of larger tensors.

    A new position is written behind the last. Whatever else changes keys or values (selecting, repeating) makes
    tensors of its own, which are copied at the next update; cropping leaves a shorter view.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, H, new, D]` and return all keys and values `[B, H, L, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        kept = self.keys.shape[-2] if self.keys.ndim == 4 else 0
        length = kept + key_states.shape[-2]
        if not kept or not self._has_room(length):
            self._rooms = _room(self.keys, key_states, kept, length), _room(self.values, value_states, kept, length)
        assert self._rooms is not None
        keys, values = self._rooms
        keys[:, :, kept:length], values[:, :, kept:length] = key_states, value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def next_place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values with one position more, which the caller fills at once."""
        kept = self.keys.shape[2]
        if not self._has_room(kept + 1):
            self._rooms = (
                _room(self.keys, self.keys, kept, kept + 1),
                _room(self.values, self.values, kept, kept + 1),
            )
        assert self._rooms is not None
        keys, values = self._rooms
        self.keys, self.values = keys[:, :, : kept + 1], values[:, :, : kept + 1]
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        """Return whether keys and values are the beginnings of the rooms, and `length` positions fit."""
        if self._rooms is None or length > self._rooms[0].shape[2]:
            return False
        if self._rooms[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids to write there
        views = zip((self.keys, self.values), self._rooms, strict=True)
        return all(view.data_ptr() == room.data_ptr() and view.stride() == room.stride() for view, room in views)

    def __copy__(self) -> GrowingLayer:
        """Return a layer that shares nothing: two that grew in one memory would write over each other."""
        made = type(self).__new__(type(self))
        made.__dict__ |= self.__dict__ | {"_rooms": None}
        if self.is_initialized:
            made.keys, made.values = self.keys.clone(), self.values.clone()
        return made


def _room(old: torch.Tensor, new: torch.Tensor, kept: int, length: int) -> torch.Tensor:
    batch, heads, _, dim = new.shape
    room = new.new_empty(batch, heads, length + max(LEAST_ROOM, length // 4), dim)
    if kept:
        room[:, :, :kept] = old
    return room


hf.SHORTENABLE.add(GrowingLayer)


def _grow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if cache is not None and type(cache) is hf.DynamicCache and not torch.compiler.is_compiling():
        for layer in cache.layers:
            if type(layer) is hf.DynamicLayer:
                layer.__class__ = GrowingLayer


def use_growing_cache(model: nn.Module) -> None:
    """Let the layers of a DynamicCache that is given to `model` grow in place from then on."""
    model.register_forward_pre_hook(_grow, with_kwargs=True)
