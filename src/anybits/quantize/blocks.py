"""Running one decoder block by itself: its inputs, its arguments, and its output under other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class _Reached(Exception):
    """Raised by a hook to end a forward pass once the first block's input is known."""


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks of a model are called with for calibration batches of one shape.

    hidden: input of the first block, float32 `[batch, tokens, hidden]` each; arguments: the other positional
    and keyword arguments of each block, which depend on positions only.
    """

    hidden: list[torch.Tensor]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, batches: list[torch.Tensor]) -> BlockInputs:
    """Run the model on token batches int64 `[batch, tokens]` and return what its blocks receive."""
    hidden: list[torch.Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        arguments.append((_to_float32(args[1:]), _to_float32(rest)))

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"]).detach().float())
        raise _Reached

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    model(input_ids=batches[0], use_cache=False)
    for hook in hooks:
        hook.remove()
    first = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    for batch in batches:
        try:
            model(input_ids=batch, use_cache=False)
        except _Reached:
            continue
    first.remove()
    return BlockInputs(hidden, arguments)


def _to_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_to_float32(v) for v in value)
    if isinstance(value, dict):
        return {k: _to_float32(v) for k, v in value.items()}
    return value


class BlockRunner:
    """A float32 copy of one block that can run with any of its weights replaced."""

    def __init__(self, block: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.block = copy.deepcopy(block).float().requires_grad_(False)
        self.positional, self.keywords = arguments

    def __call__(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the block's output `[batch, tokens, hidden]`; weights: parameter name -> replacement."""
        output = torch.func.functional_call(
            self.block, dict(weights or {}), (hidden, *self.positional), kwargs=self.keywords, strict=False
        )
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def run_all(
        self, hidden: list[torch.Tensor], weights: Callable[[], Mapping[str, torch.Tensor]] | None = None
    ) -> list[torch.Tensor]:
        """Return the outputs for all batches, the replacement weights built once."""
        replaced = weights() if weights is not None else None
        return [self(batch, replaced) for batch in hidden]
