"""A verifying pass that gives every row the bits it gets when it runs alone.

Plain decoding runs one row a pass, verifying a few. The CPU kernels round a row the same in both; torch's attention
and dense head do not, and a difference in the last bit is enough to turn a near tie. So while this is active,
attention runs row by row, in the very calls that plain decoding makes, and the head computes again alone those rows
whose two best logits lie closer than rounding can move them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from anybits.integrations import transformers as hf
from anybits.integrations.decode_step import attention as decode_attention
from anybits.integrations.decode_step.modules import DenseHead
from anybits.kernels import step

BASES: dict[str, Callable[..., tuple[torch.Tensor, None]]] = {
    "sdpa": hf.sdpa_attention,
    decode_attention.NAME: decode_attention.attend,
}
"""Implementations of attention whose rows can be run one by one: a mask of theirs says nothing but what is past."""

_verifying: ContextVar[bool] = ContextVar("anybits_verifying", default=False)


@contextmanager
def verifying() -> Iterator[None]:
    """Treat the passes in the body as rows that must come out as if each ran alone."""
    token = _verifying.set(True)
    try:
        yield
    finally:
        _verifying.reset(token)


def _attend(
    base: Callable[..., tuple[torch.Tensor, None]],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return `[1, M, H, D]` for query `[1, H, M, D]`, key and value `[1, Hkv, L, D]` whose last M positions are new."""
    rows, length = query.shape[2], key.shape[2]
    if rows == 1 or not _verifying.get():
        return base(module, query, key, value, mask, **kwargs)
    window = kwargs.get("sliding_window")
    out = []
    for row in range(rows):
        stop = length - rows + row + 1
        start = 0 if window is None else max(0, stop - window)
        seen = key[:, :, start:stop], value[:, :, start:stop]
        out.append(base(module, query[:, :, row : row + 1], *seen, None, **kwargs)[0])
    return torch.cat(out, dim=1), None


for _name, _base in BASES.items():
    hf.register_attention(f"{_name}_by_rows", partial(_attend, _base), like="sdpa")


@contextmanager
def row_invariant(model: Any, greedy: bool, processed: bool) -> Iterator[None]:
    """Make `verifying()` passes of `model` row-invariant in the body.

    greedy: the head matters, as tokens are its best logits; processed: logits are changed before a token is
    chosen, so that no row is safe from a tie. Models with another attention than those of BASES keep it.
    """
    own = model.config._attn_implementation
    if own in BASES:
        model.set_attn_implementation(f"{own}_by_rows")
    head = model.get_output_embeddings()
    hooked = greedy and type(head) in (nn.Linear, DenseHead)
    handle = head.register_forward_hook(_Head(head, processed)) if hooked else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        if own in BASES:
            model.set_attn_implementation(own)


_lengths: WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], float]] = WeakKeyDictionary()


def _longest_row(head: nn.Linear) -> float:
    """Return the greatest Euclidean length of a row of the head, kept until its weight changes."""
    weight = head.weight
    state = (weight.data_ptr(), weight._version)
    kept = _lengths.get(head)
    if kept is None or kept[0] != state:
        with torch.no_grad():
            kept = (state, max(float(part.float().norm(dim=1).max()) for part in weight.split(4096)))
        _lengths[head] = kept
    return kept[1]


class _Head:
    """Replaces rows of logits whose best token could depend on the order of summation.

    Two float32 sums of K products differ by at most 2 K u |x| |w|, u = 2^-24; rounding both to the output's dtype
    adds one unit in the last place of each.
    """

    def __init__(self, head: nn.Linear, always: bool) -> None:
        self.head, self.always = head, always
        self._longest = _longest_row(head)  # here, and not in the first pass, whose time counts

    def __call__(
        self, module: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor
    ) -> torch.Tensor | None:
        rows = logits.shape[1] if logits.ndim == 3 else 0
        if rows < 2 or not _verifying.get():
            return None
        x = inputs[0]
        if type(self.head) is DenseHead and rows <= step.MAX_DENSE_ROWS and step.usable(x, self.head.weight):
            return None
        alone = [row for row in range(rows) if self.always or self._close(x[0, row], logits[0, row])]
        if not alone:
            return None
        logits = logits.clone()
        for row in alone:  # as a matrix: torch 2.13 takes a hundred times as long for bf16 [1, 1, K], with equal bits
            logits[0, row : row + 1] = self.head.forward(x[0, row : row + 1])
        return logits

    def _close(self, x: torch.Tensor, logits: torch.Tensor) -> bool:
        best, second = logits.float().topk(2).values.tolist()
        summed = 2 * x.numel() * 2.0**-24 * float(x.float().norm()) * self._longest
        rounded = torch.finfo(logits.dtype).eps * abs(best)
        return best - second <= 2 * (summed + rounded)
