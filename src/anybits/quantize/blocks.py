"""Running one decoder block by itself: its inputs, its arguments, and its output under other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from anybits.errors import AnybitsError

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
    """Return what each block is called with besides its hidden states, from one forward up to the last block.

    Raises AnybitsError where that is not all there is to a block: see `check_chain`.
    """
    arguments = _Calls(blocks).of(model, batch, to_the_end=False).arguments
    check_chain(model, blocks, batch, arguments)
    return arguments


@torch.no_grad()
def check_chain(
    model: nn.Module,
    blocks: nn.ModuleList,
    batch: torch.Tensor,
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    """Raise AnybitsError unless the model is what calibration takes it for, seen on other text of the same shape.

    Each block is called once, in order, with the last one's output; arguments, what it gets besides, depend on
    positions only.
    """
    calls = _Calls(blocks).of(model, batch.flip(1), to_the_end=True)
    name, instead = type(model).__name__, "calibration cannot follow that, use preset fast"
    if calls.order != list(range(len(blocks))) or len(arguments) != len(blocks):
        raise AnybitsError(f"{name} does not call its decoder blocks once each, one after another: {instead}")
    if not calls.chained:
        raise AnybitsError(f"{name} changes hidden states between its decoder blocks: {instead}")
    for (positional, keywords), (others, named) in zip(arguments, calls.arguments, strict=True):
        different = [key for key in keywords if not _same(keywords[key], named.get(key))]
        if different or not _same(positional, others):
            what = f" ({different[0]})" if different else ""
            raise AnybitsError(
                f"{name} gives its decoder blocks further inputs that depend on the text{what}: {instead}"
            )


class _Calls:
    """What the blocks of a model are called with during one forward.

    order: the number of each call's block; arguments: of each call, without the hidden states; chained: whether every
    block got what the one before it returned.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.order: list[int] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.chained = True
        self._blocks = blocks
        self._last: torch.Tensor | None = None

    def of(self, model: nn.Module, batch: torch.Tensor, to_the_end: bool) -> _Calls:
        """Run token `batch`, up to the output layer or only until the last block is called, and return this."""

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self._last is not None and not torch.equal(self._last, hidden):
                self.chained = False
            self.order.append(index)
            self.arguments.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
            if index == len(self._blocks) - 1 and not to_the_end:
                raise _Reached

        def after(output: Any) -> None:
            self._last = (output[0] if isinstance(output, tuple) else output).detach()

        def stop(*_: object) -> None:
            raise _Reached

        hooks = []
        for index, block in enumerate(self._blocks):
            run = partial(before, index)
            hooks.append(
                block.register_forward_pre_hook(lambda _, args, kwargs, run=run: run(args, kwargs), with_kwargs=True)
            )
            hooks.append(block.register_forward_hook(lambda _, __, output: after(output)))
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        if head is not None:
            hooks.append(head.register_forward_pre_hook(stop))
        try:
            with suppress(_Reached):
                model(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return self


def _same(one: Any, other: Any) -> bool:
    """Return whether two arguments are equal: tensors to the bit, what cannot be compared by its kind."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return not isinstance(one, bool | int | float | str) or one == other


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
