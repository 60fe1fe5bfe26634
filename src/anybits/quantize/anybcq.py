"""AnyBCQ (arXiv 2510.10467): scaled sign planes for the base precision, then one frozen plane more at a time.

A code is the nearest level, so the weights of one code are one run of the group's sorted values (a run of
the runs below, after an expansion). Each group is sorted once; a round then costs a search for the ends of
the runs and sums over runs from prefix sums, and never touches the weights again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from anybits import bits
from anybits.config import check_group_size, check_precisions
from anybits.errors import AnybitsError
from anybits.quantize import linalg, steps
from anybits.quantize.anyprecision import check_weight
from anybits.quantize.linalg import least_squares as least_squares
from anybits.weight import AffineLevels, PlaneWeight, group_columns, group_count

# Weights fitted at once: the sorted values and their prefix sums, float64, should stay in cache.
CHUNK = 1 << 19


@dataclass(frozen=True)
class Fit:
    """A fitted batch of groups: w ~ offset + sum_i scale_i b_i.

    codes: uint8 `[R, g]`, plane 0 the most significant of `precision` bits; scales: float64 `[R, precision]`;
    offsets: float64 `[R]`, zeros when symmetric; error: float64 `[R]`, the weighted squared error.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class _Runs:
    """Sorted groups cut into runs, one for each code; C = 2**p codes, R groups, all float64 and int64.

    keys `[R, g]`: ascending values, or values plus code * span where the codes came from outside, so that
    each run is sorted in a place of its own; low, high `[R]`: limits of a threshold's place in its run;
    mass `[R, g+1]` (None: every weight counts 1) and moment `[R, g+1]`: prefix sums of h and h * w;
    square `[R]`: sum h w^2; starts, ends `[C, R]`; centre `[R]`: subtracted from all values, a common offset's digits.
    """

    keys: torch.Tensor
    span: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    mass: torch.Tensor | None
    moment: torch.Tensor
    square: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    centre: torch.Tensor
    symmetric: bool

    @property
    def precision(self) -> int:
        """p, as many bits as number the runs."""
        return (len(self.starts) - 1).bit_length()

    def design(self) -> torch.Tensor:
        """Return linalg.design of the codes that the runs stand for."""
        return linalg.design(self.precision, self.symmetric, self.keys)

    def select(self, groups: torch.Tensor) -> _Runs:
        """Return the runs of some groups."""
        parts: dict[str, Any] = {
            name: value.index_select(1 if name in ("starts", "ends") else 0, groups)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **parts)

    def cut(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Return for each run the first position whose value reaches its threshold: `[C, R]` from `[C, R]`."""
        code = torch.arange(len(thresholds), device=thresholds.device)[:, None]
        places = thresholds.clamp(self.low, self.high) + code * self.span
        found = torch.searchsorted(self.keys, places.T.contiguous()).T
        return found.maximum(self.starts).minimum(self.ends)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prefix sums (mass, moment) at positions `[C, R]`."""
        rows, width = self.moment.shape
        flat = positions + torch.arange(rows, device=positions.device) * width
        mass = positions.double() if self.mass is None else self.mass.take(flat)
        return mass, self.moment.take(flat)

    def sums(self, starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum h, sum h w) of runs `[C, R]`."""
        first, last = self.at(starts), self.at(ends)
        return last[0] - first[0], last[1] - first[1]


# Runs, coefficients `[q, R]` (scales, then the offset of the centred values) and squared error `[R]`.
_Stage = tuple[_Runs, torch.Tensor, torch.Tensor]


def _error(runs: _Runs, levels: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the squared error `[R]` of levels `[C, R]`; rounding may leave it a hair below zero."""
    mass, moment = runs.sums(starts, ends)
    return runs.square + (levels * (levels * mass - 2 * moment)).sum(0)


def _nearest(runs: _Runs, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return starts and ends `[C, R]` of the runs of values nearest to each of the levels `[C, R]`."""
    # Descending scales that are not negative: the levels of one or two planes ascend with the code.
    ascending, order = (levels, None) if len(levels) <= 4 else levels.sort(dim=0, stable=True)
    middle = (ascending[1:] + ascending[:-1]) / 2
    cuts = torch.searchsorted(runs.keys, middle.T.contiguous()).T
    cuts = torch.nn.functional.pad(cuts, (0, 0, 1, 0))
    starts, ends = cuts, torch.cat([cuts[1:], torch.full_like(cuts[:1], runs.keys.shape[1])])
    if order is None:
        return starts, ends
    return torch.empty_like(starts).scatter_(0, order, starts), torch.empty_like(ends).scatter_(0, order, ends)


def _greedy(runs: _Runs, precision: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return coefficients `[q, R]`, starts and ends of b_i = sign(r), a_i = mean |r|, r -= a_i b_i from the mean on."""
    mass, moment = runs.sums(runs.starts, runs.ends)
    total = mass[0].clamp_min(1e-200)
    offset = torch.zeros_like(moment) if runs.symmetric else moment / total
    levels, scales = offset, []
    for _ in range(precision):
        cuts = runs.cut(levels)
        below, above = runs.sums(runs.starts, cuts), runs.sums(cuts, runs.ends)
        scale = ((above[1] - levels * above[0]) - (below[1] - levels * below[0])).sum(0) / total
        scales.append(scale)
        levels, starts, ends = _children(runs, levels, scale)
        runs = replace(runs, starts=starts, ends=ends)
    coefficients = torch.stack(scales) if runs.symmetric else torch.cat([torch.stack(scales), offset])
    return coefficients, runs.starts, runs.ends


def _descending(coefficients: torch.Tensor, precision: int) -> torch.Tensor:
    """Relabel planes so that scales are not negative and descend; the set of levels stays the same."""
    scales = coefficients[:precision].abs().sort(dim=0, descending=True, stable=True)[0]
    return torch.cat([scales, coefficients[precision:]])


def _fit_runs(runs: _Runs, precision: int, rounds: int) -> torch.Tensor:
    """Alternate least squares and nearest codes from the greedy start: the best coefficients `[q, R]`."""
    design = linalg.design(precision, runs.symmetric, runs.keys)
    best, starts, ends = _greedy(runs, precision)
    least = _error(runs, design.T @ best, starts, ends)
    best = _descending(best, precision)
    active = torch.arange(len(least), device=least.device)
    for _ in range(max(rounds, 1)):
        mass, moment = runs.sums(starts, ends)
        right = design @ moment
        found = linalg.solve(linalg.normal_matrix(design, mass), right)
        error = runs.square - (found * right).sum(0) - linalg.ridge(mass.sum(0)) * found.square().sum(0)
        found = _descending(found, precision)
        # Rounding alone must not replace a start that is already exact.
        better = error < least[active] - 1e-12 * runs.square
        best[:, active[better]], least[active[better]] = found[:, better], error[better]
        old_starts, old_ends = starts, ends
        starts, ends = _nearest(runs, design.T @ found)
        moved = ((starts != old_starts) | (ends != old_ends)).any(0)
        # The rounds are deterministic: a group whose codes stay is finished. Dropping few costs more than it saves.
        if moved.sum() < 0.75 * len(moved):
            keep = moved.nonzero()[:, 0]
            if not len(keep):
                break
            runs, active, starts, ends = runs.select(keep), active[keep], starts[:, keep], ends[:, keep]
    return best


def _grow_runs(runs: _Runs, rounds: int) -> torch.Tensor:
    """Alternate a new plane's signs and the refit of all scales: coefficients `[q + 1, R]`, the new scale last.

    The frozen planes' normal matrix A never changes, so it is inverted once; with u the new plane's products
    with them, block elimination gives the new scale (r - u A^-1 t) / (n - u A^-1 u), n = sum h.
    """
    design = runs.design()
    first, last = runs.at(runs.starts), runs.at(runs.ends)
    mass, moment = last[0] - first[0], last[1] - first[1]
    inverse = linalg.inverse(linalg.normal_matrix(design, mass))
    found = frozen = linalg.apply(inverse, design @ moment)
    out = torch.cat([frozen, torch.zeros_like(frozen[:1])])
    constant = [inverse, frozen, first[0] + last[0], first[1] + last[1], mass.sum(0)]
    active = torch.arange(out.shape[1], device=out.device)
    cuts = None
    for _ in range(max(rounds, 1)):
        inverse, frozen, mass_edges, moment_edges, total = constant
        old, cuts = cuts, runs.cut(design.T @ found)
        if old is not None:
            moved = (cuts != old).any(0)
            if moved.sum() < 0.75 * len(moved):
                keep = moved.nonzero()[:, 0]
                if not len(keep):
                    break
                runs, active, cuts = runs.select(keep), active[keep], cuts[:, keep]
                constant = [t.index_select(-1, keep) for t in constant]
                inverse, frozen, mass_edges, moment_edges, total = constant
        below = runs.at(cuts)
        product = design @ (mass_edges - 2 * below[0])
        right = (moment_edges - 2 * below[1]).sum(0)
        shift = linalg.apply(inverse, product)
        ridge = linalg.ridge(total)
        left = (total + ridge - (product * shift).sum(0)).maximum(ridge)
        scale = (right - (product * frozen).sum(0)) / left
        found = frozen - shift * scale
        out[:, active] = torch.cat([found, scale[None]])
    return out


def _stored(runs: _Runs, coefficients: torch.Tensor, precision: int, level_dtype: torch.dtype | None) -> torch.Tensor:
    """Round coefficients `[q, R]` to what the level dtype can hold; the offset is stored uncentred."""
    if level_dtype is None:
        return coefficients
    scales = coefficients[:precision].to(level_dtype).double()
    offset = (coefficients[precision:] + runs.centre).to(level_dtype).double() - runs.centre
    return torch.cat([scales, offset])


def _base(runs: _Runs, precision: int, rounds: int, level_dtype: torch.dtype | None) -> _Stage:
    """Return the runs of the base codes, its coefficients `[q, R]` and its error `[R]`."""
    found = _stored(runs, _fit_runs(runs, precision, rounds), precision, level_dtype)
    levels = linalg.design(precision, runs.symmetric, found).T @ found
    starts, ends = _nearest(runs, levels)
    return replace(runs, starts=starts, ends=ends), found, _error(runs, levels, starts, ends)


def _grow(stage: _Stage, rounds: int, level_dtype: torch.dtype | None) -> _Stage:
    """Return runs, coefficients and error with one plane more than the stage has; the error never rises."""
    runs, before, error = stage
    grown, planes = _grow_runs(runs, rounds), runs.precision
    frozen = _stored(runs, grown[:-1], planes, level_dtype)
    scale = _stored(runs, grown[-1:].abs(), 1, level_dtype)
    levels = runs.design().T @ frozen
    found = _error(runs, *_children(runs, levels, scale))
    # The levels below with a scale of zero reproduce them: the way out where rounding ate the gain.
    worse = found > error
    frozen, scale = torch.where(worse, before, frozen), torch.where(worse, 0.0, scale)
    _, starts, ends = _children(runs, runs.design().T @ frozen, scale)
    found = torch.where(worse, error, found)
    return replace(runs, starts=starts, ends=ends), torch.cat([frozen[:planes], scale, frozen[planes:]]), found


def _children(runs: _Runs, levels: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut every run at its level: levels, starts and ends `[2C, R]` of what lies below, then above, of each."""
    cuts = runs.cut(levels)
    pairs = (levels - scale, levels + scale), (runs.starts, cuts), (cuts, runs.ends)
    return tuple(torch.stack(pair, 1).flatten(0, 1) for pair in pairs)


def _sorted_runs(
    values: torch.Tensor, weights: torch.Tensor | None, symmetric: bool, fit: Fit | None = None
) -> tuple[_Runs, torch.Tensor]:
    """Sort groups `[R, g]` by value, or by code and value when `fit` has codes; return the runs and the order."""
    values = values.double()
    centre = values.mean(1) if weights is None else linalg.mean(values, weights.double())
    centre = torch.zeros_like(centre) if symmetric else centre
    values = values - centre[:, None]
    low, high = values.amin(1), values.amax(1)
    span, starts = torch.zeros_like(low), torch.zeros(1, len(low), dtype=torch.int64, device=values.device)
    keys, ends = values, torch.full_like(starts, values.shape[1])
    if fit is not None:
        span = torch.where(high > low, 2 * (high - low), 1.0)
        keys = values + fit.codes * span[:, None]
        counts = starts.new_zeros(len(low), 2 ** fit.scales.shape[1])
        ends = counts.scatter_add_(1, fit.codes.long(), torch.ones_like(fit.codes, dtype=torch.int64)).cumsum(1).T
        starts = torch.cat([starts, ends[:-1]])
    keys, order = keys.sort(dim=1, stable=True)
    values = keys if fit is None else values.gather(1, order)
    heavy = values if weights is None else values * weights.double().gather(1, order)
    pad = torch.nn.functional.pad
    mass = None if weights is None else pad(weights.double().gather(1, order).cumsum(1), (1, 0))
    # A threshold just outside of the values keeps its meaning and stays clear of the next run's keys.
    margin = span.new_tensor(torch.inf) if fit is None else span / 4
    moment, square = pad(heavy.cumsum(1), (1, 0)), (heavy * values).sum(1)
    limits = low - margin, high + margin
    return _Runs(keys, span, *limits, mass, moment, square, starts, ends, centre, symmetric), order


def _codes(runs: _Runs, order: torch.Tensor) -> torch.Tensor:
    """Return the uint8 codes `[R, g]` of the runs, in the order of the values before sorting."""
    rows, columns = runs.keys.shape
    code = torch.arange(len(runs.starts), device=order.device, dtype=torch.int16).expand(rows, -1)
    steps = torch.zeros(rows, columns + 1, dtype=torch.int16, device=order.device)
    steps.scatter_add_(1, runs.starts.T, code).scatter_add_(1, runs.ends.T, -code)
    placed = steps[:, :columns].cumsum(1, dtype=torch.int16).to(torch.uint8)
    return torch.empty_like(placed).scatter_(1, order, placed)


def _levels(stage: _Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales `[p, R]`, offsets `[R]`)."""
    runs, found, _ = stage
    offsets = torch.zeros_like(runs.centre) if runs.symmetric else found[-1] + runs.centre
    return found[: runs.precision], offsets


def _as_fit(stage: _Stage, order: torch.Tensor) -> Fit:
    scales, offsets = _levels(stage)
    return Fit(_codes(stage[0], order), scales.T.contiguous(), offsets, stage[2].clamp_min(0))


def fit_base(
    values: torch.Tensor,
    precision: int,
    rounds: int,
    symmetric: bool,
    weights: torch.Tensor | None = None,
    level_dtype: torch.dtype | None = None,
) -> Fit:
    """Fit groups at the base precision: greedy signs of the residual, then `rounds` of least squares and nearest codes.

    values: float `[R, g]`; weights >= 0 of the squared error, `[R, g]`, None for uniform. Levels are rounded to
    `level_dtype` before the last choice of codes, so every code is the nearest of the levels returned; scales
    are not negative and descend (the paper's alternating minimisation of |w - sum a_i b_i|^2).
    """
    runs, order = _sorted_runs(values, weights, symmetric)
    return _as_fit(_base(runs, precision, rounds, level_dtype), order)


def expand(
    values: torch.Tensor,
    fit: Fit,
    rounds: int,
    symmetric: bool,
    weights: torch.Tensor | None = None,
    level_dtype: torch.dtype | None = None,
) -> Fit:
    """Add one plane to groups whose codes are frozen: sign of the residual, refit of all scales, `rounds` times.

    values, weights as in `fit_base`; `fit` may hold any codes, not only nearest ones. The new code is
    2 * code + bit, the new scale not negative, and the error never above that of `fit`'s levels
    (the paper's progressive precision expansion).
    """
    runs, order = _sorted_runs(values, weights, symmetric, fit)
    before = fit.scales.double().T
    if not symmetric:
        before = torch.cat([before, (fit.offsets.double() - runs.centre)[None]])
    error = _error(runs, runs.design().T @ before, runs.starts, runs.ends)
    return _as_fit(_grow((runs, before, error), rounds, level_dtype), order)


def quantize_matrix(
    weight: torch.Tensor,
    precisions: tuple[int, ...],
    group_size: int,
    symmetric: bool,
    rounds: int = 20,
    scale_bits: int = 16,
    level_dtype: torch.dtype = torch.float16,
) -> PlaneWeight:
    """Quantize one matrix to scaled sign planes shared by all precisions, from the weights alone.

    weight: float `[N, K]`; group_size: columns that share scales, a multiple of 32 or -1 for a row, the last group
    of a row may be shorter. w ~ offset + sum_i scale_i b_i, the paper's model, with scales and offsets of their own
    for each precision. The squared error of a group under its levels in `level_dtype` never rises with the precision;
    scale_bits 8 then rounds them to steps of their row (steps.in_steps), 16 leaves them.
    Raises AnybitsError for values that are not finite and levels beyond `level_dtype`.
    """
    check_precisions(precisions)
    check_group_size(group_size)
    check_weight(weight)
    weight, (rows, columns) = weight.detach(), weight.shape
    size, groups = group_columns(group_size, columns), group_count(group_size, columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = {p: torch.empty(p, rows, groups, dtype=level_dtype, device=weight.device) for p in precisions}
    offsets = {p: torch.empty(rows, groups, dtype=level_dtype, device=weight.device) for p in precisions}
    whole = columns // size
    # A shorter last group is fitted apart: padding would need masks everywhere and give the same result.
    for first, count, width in ((0, whole, size), (whole, groups - whole, columns - whole * size)):
        step = max(1, CHUNK // (max(width, 2 ** precisions[-1]) * max(count, 1)))

        def fit(r: int, first: int = first, count: int = count, width: int = width, step: int = step) -> None:
            place = slice(r, r + step), slice(first * size, first * size + count * width)
            groups_of = slice(r, r + step), slice(first, first + count)
            values = weight[place].reshape(-1, width)
            code, fitted = _fit_groups(values, precisions, symmetric, rounds, level_dtype)
            codes[place] = code.view(-1, count * width)
            for p in precisions:
                scales[p][:, *groups_of] = fitted[p][0].view(p, -1, count)
                offsets[p][groups_of] = fitted[p][1].view(-1, count)

        linalg.for_each_chunk(fit, range(0, rows if count else 0, step), weight.device)
    if not all(bool(torch.isfinite(t).all()) for t in (*scales.values(), *offsets.values())):
        raise AnybitsError(f"the weights are too large for levels of {level_dtype}: choose a wider level dtype")
    levels = AffineLevels(group_size, scales, None if symmetric else offsets)
    return steps.stored_in(PlaneWeight(bits.codes_to_planes(codes, precisions[-1]), columns, levels), scale_bits)


def _fit_groups(
    values: torch.Tensor, precisions: tuple[int, ...], symmetric: bool, rounds: int, level_dtype: torch.dtype
) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Return codes `[R, g]` of the top precision, and the scales `[p, R]` and offsets `[R]` of each from the base."""
    runs, order = _sorted_runs(values, None, symmetric)
    stage = _base(runs, precisions[0], rounds, level_dtype)
    levels = {precisions[0]: _levels(stage)}
    for p in range(precisions[0] + 1, precisions[-1] + 1):
        stage = _grow(stage, rounds, level_dtype)
        levels[p] = _levels(stage)
    return _codes(stage[0], order), levels
