"""The active precision of a request, or of each row of a batch: a scoped value, never state of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from anybits.config import Single, check_single, parse_precision, precision_order
from anybits.errors import AnybitsError

if TYPE_CHECKING:  # the package and its command line start without torch
    import torch

Precision: TypeAlias = "Single | torch.Tensor"
"""A number of planes or the name of a profile for all rows; or an int32 tensor of codes, one per batch entry or row."""

FIRST_PROFILE = 16
"""Codes below are numbers of planes; code 16 + i is profile i of the model, in the order of `precision_order`."""

_scoped: ContextVar[Precision | None] = ContextVar("anybits_precision", default=None)


@dataclass
class ModelPrecision:
    """What a model runs at outside every `precision()` scope, and what it can run at; shared by all its layers."""

    value: Precision
    precisions: tuple[int, ...] = ()
    profiles: tuple[str, ...] = ()

    @property
    def singles(self) -> tuple[Single, ...]:
        """Stored precisions and profiles, ascending."""
        return tuple(sorted((*self.precisions, *self.profiles), key=precision_order))

    def check(self, value: object) -> Single:
        """Return one precision in its one form, or raise AnybitsError when it is not stored."""
        return check_single(value, self.singles)

    def codes(self, values: Sequence[object]) -> torch.Tensor:
        """Return int32 codes `[len(values)]` for a precision of each row; raise AnybitsError for one not stored."""
        import torch

        known = self._codes
        if not all(value in known for value in values):
            values = [self.check(value) for value in values]
        return torch.tensor([known[value] for value in values], dtype=torch.int32)

    @cached_property
    def _codes(self) -> dict[object, int]:
        return {p: p for p in self.precisions} | {name: FIRST_PROFILE + i for i, name in enumerate(self.profiles)}


@contextmanager
def precision(value: Precision | float) -> Iterator[None]:
    """Run the body at `value`: a number of bits, a profile ("2.5" or 2.5), or an int32 tensor of codes for each row.

    A code is a number of bits, or what `model.precision_codes` returns for profiles. Scopes nest, and belong to
    the thread or task that opened them.
    """
    import torch

    token = _scoped.set(value if isinstance(value, torch.Tensor) else parse_precision(value))
    try:
        yield
    finally:
        _scoped.reset(token)


def active(default: ModelPrecision) -> Precision:
    """Return the precision of the innermost scope, or the model's own outside every scope."""
    scoped = _scoped.get()
    return default.value if scoped is None else scoped


def per_row(value: int | torch.Tensor, leading: torch.Size) -> int | torch.Tensor:
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
