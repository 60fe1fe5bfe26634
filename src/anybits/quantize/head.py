"""The output layer, when it is wanted quantized: codes that fit what the last block hands to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from anybits.config import Recipe
from anybits.errors import AnybitsError
from anybits.quantize import data_free
from anybits.quantize.blocks import HiddenStates, bypassed, together
from anybits.quantize.data_aware import improve, join_rows
from anybits.quantize.hessian import Moments, Sums
from anybits.quantize.source import Source
from anybits.quantize.targets import Target, matrix
from anybits.weight import PlaneWeight

ROWS = 1 << 14
"""Rows of the head in float32 at once: a vocabulary is large."""


class _Reached(Exception):
    """Raised by a hook once the head's input is known."""


def find_head(model: nn.Module) -> Target:
    """Return the output layer as a target; raise AnybitsError when the model has none that is linear."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is head and name), None)
    if name is None or not isinstance(head, nn.Linear):
        raise AnybitsError(
            f"{type(model).__name__} has no linear output layer to quantize: leave --quantize-lm-head out"
        )
    return Target(f"{name}.weight", name, head.out_features, head.in_features)


def quantize_head(source: Source, target: Target, recipe: Recipe, moments: Moments | None) -> PlaneWeight:
    """Return the head in planes; moments: of its inputs, None for codes from the weights alone."""
    weight = source.read(target.parameter)
    parts = []
    for start in range(0, target.out_features, ROWS):
        rows = matrix(weight[start : start + ROWS])
        part = data_free.quantize_matrix(rows, recipe)
        if moments is not None and recipe.data_aware is not None:
            part = improve(rows, part, moments, recipe.data_aware)
        parts.append(part)
    return join_rows(parts)


@torch.no_grad()
def head_moments(
    source: Source,
    target: Target,
    float_path: HiddenStates,
    paths: Mapping[int, HiddenStates],
    as_tuple: bool,
) -> Moments:
    """Return the second moments of the head's inputs, as hessian.collect does for the layers of a block.

    float_path, paths: the last block's outputs from the float model and from the model quantized at each precision, in
    ascending order; as_tuple: how blocks return.
    """
    sums = Sums(target.in_features, len(paths), True)
    with source.rest():
        for plain, batches in together(float_path, list(paths.values())):
            wanted = None if plain is None else _head_input(source, target, plain, as_tuple)
            for i, hidden in batches:
                sums.add(i, _head_input(source, target, hidden, as_tuple), wanted, plain is not None)
    return sums.moments()


def _head_input(source: Source, target: Target, hidden: torch.Tensor, as_tuple: bool) -> torch.Tensor:
    """Return what the head sees `[tokens, K]`, float32, when the last block returns `hidden`."""
    found: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, target.in_features).float())
        raise _Reached

    output = hidden.to(source.dtype)
    hook = source.model.get_submodule(target.module).register_forward_pre_hook(stop)
    try:
        with bypassed(source.blocks, (output,) if as_tuple else output):
            source.model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long), use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]
