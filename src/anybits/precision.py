"""The active precision of a request, or of each row of a batch: a scoped value, never state of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from anybits.errors import AnybitsError

Precision = int | torch.Tensor
"""An int for all rows, or an int32 tensor with one entry per batch entry or per row of activations."""

_scoped: ContextVar[Precision | None] = ContextVar("anybits_precision", default=None)


@dataclass
class ModelPrecision:
    """What a model runs at outside every `precision()` scope; shared by all its layers."""

    value: Precision


@contextmanager
def precision(value: Precision) -> Iterator[None]:
    """Run the body at `value`: an int, or an int32 tensor with one entry per batch entry.

    Scopes nest, and belong to the thread or task that opened them.
    """
    token = _scoped.set(value)
    try:
        yield
    finally:
        _scoped.reset(token)


def active(default: ModelPrecision) -> Precision:
    """Return the precision of the innermost scope, or the model's own outside every scope."""
    scoped = _scoped.get()
    return default.value if scoped is None else scoped


def per_row(value: Precision, leading: torch.Size) -> Precision:
    """Return `value` for activations flattened from `leading` dimensions to rows.

    An int stays; a tensor of leading.numel() entries stays; one of leading[0] entries is repeated over
    the other dimensions, so that one entry per sequence covers all its tokens.
    """
    if isinstance(value, int) or value.numel() == leading.numel():
        return value
    if leading and value.numel() == leading[0]:
        return value.repeat_interleave(leading.numel() // leading[0])
    raise AnybitsError(
        f"precision has {value.numel()} entries for activations of shape {list(leading)}: "
        "give an int, one entry per sequence, or one per row"
    )
