"""Levels for shared planes: every precision's levels and the one set of codes fitted together, from the weights alone.

AnyBCQ fixes the coarse planes before it looks at the fine ones, which costs the fine precisions: their levels must
lie inside cells that were cut for others. Here codes are chosen for the weighted errors of all precisions at
once, in turn with least squares for the levels of each. A code's cost is sum_p u_p (level_p - w)^2, and as all codes
share its w^2 the best code is the lowest of straight lines in w: each code owns one interval of the sorted values, and
a round costs searches for its ends and sums over runs, as in anybcq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anybits import bits
from anybits.quantize import linalg
from anybits.weight import AffineLevels, PlaneWeight, group_columns, group_count

# Numbers `[C, C, R]` that compare all pairs of codes: they and a few temporaries should stay in cache.
CHUNK = 1 << 17


@dataclass
class _Groups:
    """R groups of g values: sorted keys and prefix sums of them, float64, `[R, g]` and `[R, g + 1]`; order int64."""

    keys: torch.Tensor
    order: torch.Tensor
    moment: torch.Tensor
    square: torch.Tensor

    def sums(self, starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many values lie in runs int64 `[C, R]`, and their sums."""
        moment = self.moment.gather(1, ends.T) - self.moment.gather(1, starts.T)
        return (ends - starts).double(), moment.T


def balance(weight: torch.Tensor, start: PlaneWeight, shares: tuple[float, ...], rounds: int) -> PlaneWeight:
    """Return `start` with codes and levels of least sum_p shares_p error_p / (start's error_p), group by group.

    weight: float `[N, K]`, what `start`, of affine levels, quantizes; shares: one for each of start's precisions;
    rounds: of alternating codes and least squares. No group's sum rises. Levels in 8 bits become float16.
    """
    assert isinstance(start.levels, AffineLevels)
    levels = start.levels.expanded()
    rows, columns, top = start.out_features, start.in_features, start.max_precision
    size, groups = group_columns(levels.group_size, columns), group_count(levels.group_size, columns)
    codes = bits.planes_to_codes(start.planes, top, columns)
    scales = {p: t.clone() for p, t in levels.scales.items()}
    offsets = None if levels.offsets is None else {p: t.clone() for p, t in levels.offsets.items()}
    whole = columns // size
    for first, count, width in ((0, whole, size), (whole, groups - whole, columns - whole * size)):
        step = max(1, CHUNK // (4**top * max(count, 1)))

        def fit(r: int, first: int = first, count: int = count, width: int = width, step: int = step) -> None:
            place = slice(r, r + step), slice(first * size, first * size + count * width)
            own = slice(r, r + step), slice(first, first + count)
            before = []
            for p in start.precisions:
                parts = [scales[p][:, *own], *([] if offsets is None else [offsets[p][own][None]])]
                before.append(torch.cat(parts).double().flatten(1))
            values = weight[place].detach().double().reshape(-1, width)
            old = codes[place].reshape(-1, width)
            new, found = _fit(values, old, before, start.precisions, shares, rounds, scales[top].dtype)
            codes[place] = new.view(-1, count * width)
            for p, c in zip(start.precisions, found, strict=True):
                scales[p][:, *own] = c[:p].view(p, -1, count).to(scales[p].dtype)
                if offsets is not None:
                    offsets[p][own] = c[p].view(-1, count).to(offsets[p].dtype)

        linalg.for_each_chunk(fit, range(0, rows if count else 0, step), weight.device)
    return PlaneWeight(bits.codes_to_planes(codes, top), columns, AffineLevels(levels.group_size, scales, offsets))


def _fit(
    values: torch.Tensor,
    codes: torch.Tensor,
    start: list[torch.Tensor],
    precisions: tuple[int, ...],
    shares: tuple[float, ...],
    rounds: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return codes uint8 `[R, g]` and coefficients `[q, R]` of each precision; start: those of the old codes."""
    symmetric = len(start[0]) == precisions[0]
    designs = [linalg.design(p, symmetric, values) for p in precisions]
    centre = torch.zeros_like(values[:, 0]) if symmetric else values.mean(1)
    centred = values - centre[:, None]
    groups = _sorted(centred)
    wanted = torch.tensor(shares, dtype=torch.float64, device=values.device)[:, None]
    before = _errors(centred, codes, start, designs, precisions, centre)
    # A precision that is exact already must stay so, and still not divide by zero.
    units = wanted / before.clamp_min(1e-12 * groups.square.clamp_min(1e-200))
    found = list(_shifted(start, -centre, symmetric))
    for _ in range(rounds):
        starts, ends = _runs(groups, found, designs, precisions, units)
        mass, moment = groups.sums(starts, ends)
        for i, (p, design) in enumerate(zip(precisions, designs, strict=True)):
            own = mass.view(2**p, -1, mass.shape[1]).sum(1), moment.view(2**p, -1, mass.shape[1]).sum(1)
            found[i] = linalg.solve(linalg.normal_matrix(design, own[0]), design @ own[1])
    found = [c.to(dtype).double() for c in _shifted(found, centre, symmetric)]
    final = _shifted(found, -centre, symmetric)
    new = _codes(groups, *_runs(groups, final, designs, precisions, units))
    after = _errors(centred, new, found, designs, precisions, centre)
    better = (units * after).sum(0) < (units * before).sum(0)
    kept = [torch.where(better, c, s) for c, s in zip(found, start, strict=True)]
    return torch.where(better[:, None], new, codes), kept


def _shifted(coefficients: list[torch.Tensor], by: torch.Tensor, symmetric: bool) -> list[torch.Tensor]:
    """Return coefficients `[q, R]` with `by` `[R]` added to the offsets, where there are any."""
    return coefficients if symmetric else [torch.cat([c[:-1], c[-1:] + by]) for c in coefficients]


def _sorted(values: torch.Tensor) -> _Groups:
    keys, order = values.sort(dim=1, stable=True)
    return _Groups(keys, order, torch.nn.functional.pad(keys.cumsum(1), (1, 0)), keys.square().sum(1))


def _runs(
    groups: _Groups,
    coefficients: list[torch.Tensor],
    designs: list[torch.Tensor],
    precisions: tuple[int, ...],
    units: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return starts and ends int64 `[C, R]` of the sorted values for which each code is the best for all precisions."""
    top = precisions[-1]
    slope: torch.Tensor | float = 0.0
    height: torch.Tensor | float = 0.0
    for c, design, p, unit in zip(coefficients, designs, precisions, units, strict=True):
        level = (design.T @ c).repeat_interleave(1 << (top - p), dim=0)
        slope, height = slope + unit * level, height + unit * level.square()
    assert isinstance(slope, torch.Tensor)
    assert isinstance(height, torch.Tensor)
    # Code c costs height_c - 2 slope_c w: against one of smaller slope it wins above where the two lines cross.
    steeper, higher = slope[:, None] - slope, height[:, None] - height
    crossing = higher / (2 * steeper)
    low = torch.where(steeper > 0, crossing, -torch.inf).amax(1)
    high = torch.where(steeper < 0, crossing, torch.inf).amin(1)
    earlier = torch.ones(len(slope), len(slope), dtype=torch.bool, device=slope.device).tril(-1)[..., None]
    beaten = ((steeper == 0) & ((higher > 0) | ((higher == 0) & earlier))).any(1)
    starts = torch.searchsorted(groups.keys, low.T.contiguous()).T
    ends = torch.searchsorted(groups.keys, high.T.contiguous()).T
    return starts, torch.where(beaten, starts, ends.maximum(starts))


def _codes(groups: _Groups, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 `[R, g]` of the runs, in the order of the values before sorting."""
    rows, columns = groups.keys.shape
    code = torch.arange(len(starts), dtype=torch.int16, device=starts.device).expand(rows, -1)
    steps = torch.zeros(rows, columns + 1, dtype=torch.int16, device=starts.device)
    steps.scatter_add_(1, starts.T, code).scatter_add_(1, ends.T, -code)
    placed = steps[:, :columns].cumsum(1, dtype=torch.int16).to(torch.uint8)
    return torch.empty_like(placed).scatter_(1, groups.order, placed)


def _errors(
    centred: torch.Tensor,
    codes: torch.Tensor,
    coefficients: list[torch.Tensor],
    designs: list[torch.Tensor],
    precisions: tuple[int, ...],
    centre: torch.Tensor,
) -> torch.Tensor:
    """Return the squared error `[P, R]` of each precision."""
    found = []
    for c, design, p in zip(coefficients, designs, precisions, strict=True):
        levels = (design.T @ c).T - centre[:, None]
        own = levels.gather(1, (codes >> (precisions[-1] - p)).long())
        found.append((own - centred).square().sum(1))
    return torch.stack(found)
