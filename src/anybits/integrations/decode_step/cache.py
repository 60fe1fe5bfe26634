"""A KV cache that grows in place: transformers' own copies all keys and values at every new position."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from anybits.integrations import transformers as hf

LEAST_ROOM = 128
"""Positions that are reserved at least when a layer's memory is used up; otherwise a quarter of what there is."""


class Room:
    """Memory for keys `[B, H, capacity, D]` and values `[B, H, capacity, Dv]` of one layer.

    address: of keys and of values; then three strides of each, in elements.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self.address = (keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3])

    def __reduce__(self) -> tuple[Any, ...]:
        return Room, (self.keys, self.values)  # a copy lies elsewhere


class GrowingLayer(hf.DynamicLayer):
    """DynamicLayer whose keys and values are views of larger tensors.

    A new position is written behind the last. Whatever else changes keys or values (selecting, repeating) makes
    tensors of its own, which are copied at the next update; cropping leaves a shorter view. Views are made when
    somebody looks at them.
    """

    _room: Room | None = None
    _length: int | None = None
    """Positions in the room, where keys and values are its beginning; None where that is not known."""

    @property
    def keys(self) -> torch.Tensor:
        """Keys `[B, H, L, D]`."""
        return self._view("keys")

    @keys.setter
    def keys(self, value: torch.Tensor) -> None:
        self._replace("keys", value)

    @property
    def values(self) -> torch.Tensor:
        """Values `[B, H, L, Dv]`."""
        return self._view("values")

    @values.setter
    def values(self, value: torch.Tensor) -> None:
        self._replace("values", value)

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
        room = self._room_for(kept, length, key_states, value_states)
        room.keys[:, :, kept:length], room.values[:, :, kept:length] = key_states, value_states
        self._hold(length)
        return self.keys, self.values

    def next_place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values with one position more, which the caller fills at once."""
        self.next_address()
        return self.keys, self.values

    def next_address(self) -> tuple[int, tuple[int, ...]]:
        """Return the length with one position more, which the caller fills at once, and the room's address."""
        room, length = self._room, self._length
        if room is None or length is None or not self._has_room(length + 1):
            length = self.keys.shape[2]
            room = self._room_for(length, length + 1, self.keys, self.values)
        self._hold(length + 1)
        return length + 1, room.address

    def positions(self) -> tuple[int, ...] | None:
        """Return the shape `[B, H, L, D]` of keys and values in bfloat16 on a CPU; None while there are none."""
        if self._length is not None and self._room is not None:
            tensors, length = (self._room.keys, self._room.values), self._length
        elif self.is_initialized and self.keys.ndim == 4 and self.keys.stride(3) == self.values.stride(3) == 1:
            tensors, length = (self.keys, self.values), self.keys.shape[2]
        else:
            return None
        keys, values = tensors
        same = keys.dtype is values.dtype is torch.bfloat16 and keys.is_cpu and keys.shape[3] == values.shape[3]
        return (*keys.shape[:2], length, keys.shape[3]) if same and length else None

    def _view(self, name: str) -> torch.Tensor:
        found = self.__dict__.get(name)
        if found is None and self._length is not None and self._room is not None:
            found = self.__dict__[name] = getattr(self._room, name)[:, :, : self._length]
        return found  # type: ignore[return-value]

    def _replace(self, name: str, value: torch.Tensor) -> None:
        self._view("keys"), self._view("values")  # the other one stays what it is
        self.__dict__[name] = value
        self._length = None

    def _hold(self, length: int) -> None:
        """Let keys and values be the first `length` positions of the room."""
        self._length = length
        self.__dict__["keys"] = self.__dict__["values"] = None

    def _room_for(self, kept: int, length: int, keys: torch.Tensor, values: torch.Tensor) -> Room:
        """Return a room for `length` positions like those of `keys` and `values` that begins with the `kept` ones."""
        if not kept or not self._has_room(length):
            self._room = Room(_room(self.keys, keys, kept, length), _room(self.values, values, kept, length))
        assert self._room is not None
        return self._room

    def _has_room(self, length: int) -> bool:
        """Return whether keys and values are the beginnings of the room, and `length` positions fit."""
        room = self._room
        if room is None or length > room.keys.shape[2]:
            return False
        if room.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids to write there
        if self._length is not None:
            return True
        views = (self.keys, room.keys), (self.values, room.values)
        return all(view.data_ptr() == whole.data_ptr() and view.stride() == whole.stride() for view, whole in views)

    def __copy__(self) -> GrowingLayer:
        """Return a layer that shares nothing: two that grew in one memory would write over each other."""
        made = type(self).__new__(type(self))
        made.__dict__ |= self.__dict__ | {"_room": None, "_length": None}
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
