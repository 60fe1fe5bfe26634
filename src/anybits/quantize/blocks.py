"""Running one decoder block by itself: its inputs, its arguments, and its output under other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Keep = Callable[[Iterable[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes batches as they come and keeps them somewhere: `list`, or activations.Keeper.keep."""


@dataclass(frozen=True)
class HiddenStates:
    """What runs between two blocks: of each `every`-th calibration batch, from the first on.

    batches: float32 `[batch, tokens, hidden]` each; number i is batch i * every of the calibration text.
    """

    batches: Sequence[torch.Tensor]
    every: int = 1

    def at(self, index: int) -> torch.Tensor | None:
        """Return batch `index` of the calibration text, None where it does not run here."""
        return None if index % self.every else self.batches[index // self.every]

    def thinned(self, every: int, keep: Keep = list) -> HiddenStates:
        """Return each `every`-th of these."""
        if every == 1:
            return self
        return HiddenStates(keep(self.batches[i] for i in range(0, len(self.batches), every)), self.every * every)


def together(
    float_path: HiddenStates | None, paths: Sequence[HiddenStates]
) -> Iterator[tuple[torch.Tensor | None, Iterator[tuple[int, torch.Tensor]]]]:
    """Yield for each calibration batch the float path's states, None where it does not run, and (i, path i's)."""
    for index in range(max(path.every * (len(path.batches) - 1) + 1 for path in paths)):
        running = [i for i, path in enumerate(paths) if index % path.every == 0]
        plain = None if float_path is None else float_path.at(index)
        yield plain, ((i, paths[i].batches[index // paths[i].every]) for i in running)


class _Reached(Exception):
    """Raised by a hook to end a forward pass once all that is wanted is known."""


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks of a model are called with for calibration batches of one shape.

    hidden: input of the first block; arguments: the other positional
    and keyword arguments of each block, which depend on positions only.
    """

    hidden: HiddenStates
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, batches: Sequence[torch.Tensor], keep: Keep = list) -> BlockInputs:
    """Run the model on token batches int64 `[batch, tokens]` and return what its blocks receive, as float32."""
    arguments = [
        (_to_float32(positional), _to_float32(keywords))
        for positional, keywords in block_arguments(model, blocks, batches[0])
    ]
    return BlockInputs(HiddenStates(keep(hidden.float() for hidden in embedded(model, blocks, batches))), arguments)


@torch.no_grad()
def block_arguments(
    model: nn.Module, blocks: nn.ModuleList, batch: torch.Tensor
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what each block is called with besides its hidden states, from one forward up to the last block."""
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
        if len(arguments) == len(blocks):
            raise _Reached

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with suppress(_Reached):
            model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return arguments


def embedded(model: nn.Module, blocks: nn.ModuleList, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the first block's input `[batch, tokens, hidden]` for each token batch, in the model's dtype."""
    found: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Reached

    # Before all other hooks: what loads the block's weights need not.
    first = blocks[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        for batch in batches:
            with suppress(_Reached), torch.no_grad():
                model(input_ids=batch, use_cache=False)
            yield found.pop()
    finally:
        first.remove()


@contextmanager
def bypassed(blocks: nn.ModuleList, output: Any) -> Iterator[None]:
    """Let the blocks do nothing but return `output`, so that the model runs what comes behind them."""
    try:
        for block in blocks:
            block.forward = lambda *_, **__: output
        yield
    finally:
        for block in blocks:
            del block.forward


def _to_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_to_float32(v) for v in value)
    if isinstance(value, dict):
        return {k: _to_float32(v) for k, v in value.items()}
    return value


class BlockRunner:
    """A float32 copy of one block that can run with any of its weights replaced.

    replaced: parameters that every call will replace, which are not copied.
    """

    def __init__(
        self, block: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], replaced: Iterable[str] = ()
    ) -> None:
        placeholders: dict[int, Any] = {}  # deepcopy takes these for copies that it made
        for parameter in map(block.get_parameter, replaced):
            placeholders[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        self.block = copy.deepcopy(block, placeholders).float().requires_grad_(False)
        self.positional, self.keywords = arguments
        self.as_tuple = False
        """Whether the block wraps its output in a tuple, once it has run."""

    def __call__(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the block's output `[batch, tokens, hidden]`; weights: parameter name -> replacement."""
        output = torch.func.functional_call(
            self.block, dict(weights or {}), (hidden, *self.positional), kwargs=self.keywords, strict=False
        )
        self.as_tuple = isinstance(output, tuple)
        return output[0] if self.as_tuple else output

    @torch.no_grad()
    def run_all(
        self,
        hidden: HiddenStates,
        weights: Callable[[], Mapping[str, torch.Tensor]] | None = None,
        keep: Keep = list,
    ) -> HiddenStates:
        """Return the outputs for all batches, the replacement weights built once."""
        replaced = weights() if weights is not None else None
        return HiddenStates(keep(self(batch, replaced) for batch in hidden.batches), hidden.every)
