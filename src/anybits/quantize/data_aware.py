"""Codes that know the data: nested codes and levels of a layer chosen together under its Hessians.

Fit the data-free levels of all precisions together; choose all codes in one pass with error feedback at every
precision; then in turn refit the levels under the full Hessian and choose the codes anew. A row that ends
up worse than the data-free codes at any precision gets those back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anybits import bits
from anybits.config import DataAware
from anybits.errors import AnybitsError
from anybits.quantize import balancing, families, linalg, refit
from anybits.quantize.families import Family
from anybits.quantize.hessian import Layout, Moments, Problem, layout, problem
from anybits.quantize.nested_codes import Search, descent_pass, feedback_pass
from anybits.weight import AffineLevels, PlaneWeight, from_tensors, group_columns

# Rows of a chunk: few enough that what the search for one column touches stays in cache, enough for good GEMMs.
ROWS = 512
# Elements of one `[P, K, N]` tensor of a chunk of rows; about five of them are alive.
CHUNK = 1 << 24
TINY = 1e-20


@dataclass
class _State:
    """Codes uint8 `[K, N]` of a chunk of rows, the levels `[P, K, N]` they stand for, and where these come from."""

    codes: torch.Tensor
    levels: torch.Tensor
    family: Family

    def copy(self) -> _State:
        """Return a state that may change without changing this one."""
        return _State(self.codes.clone(), self.levels.clone(), self.family.copy())

    def rows(self, which: torch.Tensor) -> _State:
        """Return the rows that int64 `which` numbers."""
        return _State(self.codes[:, which], self.levels[:, :, which], self.family.rows(which))

    def replace_rows(self, which: torch.Tensor, other: _State) -> None:
        """Put the rows of `other` in the places that int64 `which` numbers."""
        self.codes[:, which], self.levels[:, :, which] = other.codes, other.levels
        self.family.replace_rows(which, other.family)


def improve(
    weight: torch.Tensor, start: PlaneWeight, moments: Moments, settings: DataAware, consume: bool = False
) -> PlaneWeight:
    """Return `start` with codes and levels that fit the layer's inputs better at every precision, row by row.

    weight: float `[N, K]`, what `start` quantizes without data, of either method; moments: of the layer's inputs at
    start's precisions; consume: their memory may be used up. No row's error
    (q - w*) H (q - w*)^T, H damped, is above that of `start` at any precision.
    """
    size = start.in_features
    if isinstance(start.levels, AffineLevels):
        size = group_columns(start.levels.group_size, start.in_features)
    columns = layout(moments.hessian, size, settings.column_order == "energy")
    ordered = moments.reorder(columns.order)
    if ordered is moments and not consume:
        ordered = Moments(moments.hessian.clone(), None if moments.drift is None else moments.drift.clone())
    stated = problem(ordered, settings.damping, settings.correction)
    first = _balanced(weight, start, settings)
    step = max(1, min(ROWS, CHUNK // (len(start.precisions) * start.in_features)))
    starts = range(0, start.out_features, step)
    parts: list[PlaneWeight] = [start] * len(starts)

    def work(r: int) -> None:
        stop = min(r + step, start.out_features)
        parts[r // step] = _improve_rows(
            weight[r:stop], start.rows(r, stop), first.rows(r, stop), stated, columns, settings
        )

    linalg.for_each_chunk(work, starts, weight.device)
    return join_rows(parts)


def _balanced(weight: torch.Tensor, start: PlaneWeight, settings: DataAware) -> PlaneWeight:
    """Return what the search starts from: `start`, fitted for all precisions at once where there are few codes."""
    few = 1 << start.max_precision <= settings.exhaustive
    if not settings.balancing or not few or len(start.precisions) == 1 or not isinstance(start.levels, AffineLevels):
        return start
    return balancing.balance(weight, start, _counts(settings, start.precisions), settings.balancing)


def _improve_rows(
    weight: torch.Tensor,
    start: PlaneWeight,
    first: PlaneWeight,
    stated: Problem,
    columns: Layout,
    settings: DataAware,
) -> PlaneWeight:
    targets = stated.targets(weight.float()[:, columns.order])
    scale_bits = start.levels.scale_bits if isinstance(start.levels, AffineLevels) else 16
    before = _unpacked(start, columns, settings, scale_bits)
    search = Search(start.precisions, settings.exhaustive, settings.beam)
    state = _search(_unpacked(first, columns, settings, scale_bits), targets, stated, columns, search, settings)
    after = _finished(state)
    limit = _losses(before, targets, stated)
    worse = (_losses(after, targets, stated) > limit).any(0).nonzero()[:, 0]
    if len(worse):
        kept = _refitted(before.rows(worse), targets[:, :, worse], limit[:, worse], stated)
        after.replace_rows(worse, kept)
    return _packed(after, start, columns)


def _refitted(before: _State, targets: torch.Tensor, limit: torch.Tensor, stated: Problem) -> _State:
    """Return the data-free codes with refitted levels, and with their own in rows that those would make worse."""
    state = before.copy()
    _refit(state, targets, stated)
    state = _finished(state)
    # Rounded levels can be a hair worse than data-free ones where those are already the best there are.
    worse = (_losses(state, targets, stated) > limit).any(0).nonzero()[:, 0]
    state.replace_rows(worse, before.rows(worse))
    return state


def _search(
    state: _State, targets: torch.Tensor, stated: Problem, columns: Layout, search: Search, settings: DataAware
) -> _State:
    """Feedback pass, then refits and descents in turn."""
    group_of = columns.group_of()
    shares = targets.new_tensor(_counts(settings, search.precisions))[:, None]
    if settings.feedback:
        pivots = stated.factors.diagonal(dim1=1, dim2=2).square()[:, :, None]
        expected = ((state.levels - targets).square() / pivots).sum(1)
        state.codes, state.levels = feedback_pass(
            targets, stated.factors, _weights(expected, shares, settings), state.family.tables, group_of, search
        )
    _refit(state, targets, stated)
    for _ in range(settings.descents):
        weights = _weights(_losses(state, targets, stated), shares, settings)
        errors = state.levels - targets
        tables = state.family.tables
        descent_pass(errors, stated.hessians, weights, state.codes, state.levels, tables, group_of, search)
        _refit(state, targets, stated)
    return state


def _counts(settings: DataAware, precisions: tuple[int, ...]) -> tuple[float, ...]:
    """Return what each precision's relative error counts."""
    # The lowest counts more, as every other one builds on its planes, and the highest, which loses the most by sharing.
    given = settings.precision_weights or (1.5, *(1.0,) * (len(precisions) - 2), 1.25)[: len(precisions)]
    if len(given) != len(precisions):
        raise AnybitsError(f"{len(given)} precision weights are given for {len(precisions)} precisions")
    return given


def _weights(losses: torch.Tensor, shares: torch.Tensor, settings: DataAware) -> torch.Tensor:
    """Return what a unit of each precision's error costs `[P, N]`.

    At balance 1 relative errors count, the sum of their logarithms falls, and no precision is starved by
    another's larger error; at balance 0 absolute errors count, which are the coarsest precision's.
    """
    return shares / losses.clamp_min(TINY).pow(settings.balance)


def _refit(state: _State, targets: torch.Tensor, stated: Problem) -> None:
    if state.family.effort:
        for i in range(len(targets)):
            errors = state.levels[i] - targets[i]
            state.family.refit(i, errors, stated.hessians[i], state.codes)
            state.levels[i] = targets[i] + errors


def _losses(state: _State, targets: torch.Tensor, stated: Problem) -> torch.Tensor:
    errors = state.levels - targets
    return torch.stack([refit.loss(e, h) for e, h in zip(errors, stated.hessians, strict=True)])


def _finished(state: _State) -> _State:
    """Return the state with levels as they are stored."""
    family = state.family.rounded()
    return _State(state.codes, family.levels(state.codes), family)


def _unpacked(start: PlaneWeight, columns: Layout, settings: DataAware, scale_bits: int) -> _State:
    codes = bits.planes_to_codes(start.planes, start.planes.shape[0], start.in_features)
    codes = codes >> (start.planes.shape[0] - start.max_precision)
    codes = codes[:, columns.order].T.contiguous()
    family = families.family(start.levels, columns, settings.refit_sweeps, settings.codebook_iterations, scale_bits)
    return _State(codes, family.levels(codes), family)


def _packed(state: _State, start: PlaneWeight, columns: Layout) -> PlaneWeight:
    codes = state.codes[columns.order.argsort()].T.contiguous()
    return PlaneWeight(bits.codes_to_planes(codes, start.max_precision), start.in_features, state.family.stored())


def join_rows(parts: list[PlaneWeight]) -> PlaneWeight:
    """Return weights of the same kind, precisions and columns as one, their rows one after another."""
    tensors = [part.tensors() for part in parts]
    joined = {name: torch.cat([t[name] for t in tensors], dim=-2) for name in tensors[0]}
    levels = parts[0].levels
    group_size = levels.group_size if isinstance(levels, AffineLevels) else None
    return from_tensors(joined, parts[0].in_features, group_size)
