"""Exact weighted k-means on a line, for many rows at once.

Clusters of sorted values are intervals, so a clustering is a list of boundaries and the cost of an interval
follows from prefix sums: sum w v^2 - (sum w v)^2 / sum w. The first term is the same for every clustering;
what is maximised here is the second, the gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Candidates weighed at once, about: they and some ten temporaries should stay in cache.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Prefix:
    """Prefix sums of sorted rows: `mass` and `moment` float64 `[R, K+1]`; `fresh` bool `[R, K+1]`.

    `fresh` marks where a cut may fall: not inside a run of equal values, where no cut is ever needed and
    rounding would otherwise place one at random.
    """

    mass: torch.Tensor
    moment: torch.Tensor
    fresh: torch.Tensor

    def gain(self, row: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Return (sum w v)^2 / sum w of values start ... stop - 1, 0 where no weight lies."""
        width = self.mass.shape[1]
        first, last = start + row * width, stop + row * width
        mass = self.mass.take(last) - self.mass.take(first)
        moment = self.moment.take(last) - self.moment.take(first)
        return _gain(mass, moment)


def _gain(mass: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    return torch.where(mass > 0, moment.square() / mass.clamp_min(1e-300), 0.0)


def prefix_sums(values: torch.Tensor, weights: torch.Tensor) -> Prefix:
    """Return the prefix sums of rows `[R, K]` that ascend, values centred and masses scaled to a mean of 1."""
    values, weights = values.double(), weights.double()
    weights = weights / weights.mean(1, keepdim=True).clamp_min(1e-300)
    centre = (values * weights).mean(1, keepdim=True)
    pad = torch.nn.functional.pad
    edge = values.new_ones(values.shape[0], 1, dtype=torch.bool)
    return Prefix(
        pad(weights.cumsum(1), (1, 0)),
        pad((weights * (values - centre)).cumsum(1), (1, 0)),
        torch.cat([edge, values[:, 1:] != values[:, :-1], edge], dim=1),
    )


def optimal_clusters(values: torch.Tensor, weights: torch.Tensor, clusters: int) -> torch.Tensor:
    """Return the clustering of least weighted squared error: boundaries int64 `[R, clusters + 1]`.

    values, weights >= 0: `[R, K]`, any order; cluster c of a row holds its sorted values boundaries[c] ...
    boundaries[c + 1] - 1. Clusters may be empty, surely so with fewer distinct values than clusters.
    Dynamic programming over D_c[i] = max_j D_{c-1}[j] + gain(j, i), whose best j never falls as i grows
    (SqueezeLLM's objective, arXiv 2306.07629, solved exactly).
    """
    values, order = values.sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    step = max(1, CHUNK // (values.shape[1] + 1))
    parts = [_cluster_chunk(values[r : r + step], weights[r : r + step], clusters) for r in range(0, len(values), step)]
    return torch.cat(parts)


def _cluster_chunk(values: torch.Tensor, weights: torch.Tensor, clusters: int) -> torch.Tensor:
    rows, columns = values.shape
    sums = prefix_sums(values, weights)
    boundaries = torch.zeros(rows, clusters + 1, dtype=torch.int64, device=values.device)
    boundaries[:, clusters] = columns
    if clusters == 1:
        return boundaries
    best = _gain(sums.mass, sums.moment)
    cuts: list[torch.Tensor] = []
    for _ in range(clusters - 2):
        best, cut = _layer(sums, best)
        cuts.append(cut)
    # The last cluster ends at K in every clustering: one range instead of a layer.
    ends = _gain(sums.mass[:, -1:] - sums.mass, sums.moment[:, -1:] - sums.moment) + best
    boundaries[:, clusters - 1] = ends.masked_fill(~sums.fresh, -torch.inf).argmax(1)
    for c in range(clusters - 2, 0, -1):
        boundaries[:, c] = cuts[c - 1].gather(1, boundaries[:, c + 1 : c + 2])[:, 0]
    return boundaries


def _layer(sums: Prefix, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a cluster: return D_c `[R, K+1]` and the best j for each i, int64 `[R, K+1]`.

    The ends i are visited at strides K/2, K/4, ... 1; each search runs from the best j of the left neighbour
    to that of the right one, so that a stride weighs about K candidates a row.
    """
    rows, width = before.shape
    before = before.masked_fill(~sums.fresh, -torch.inf).view(-1)
    best, cut = torch.zeros_like(sums.mass), torch.zeros(rows, width, dtype=torch.int64, device=before.device)
    stride = 1 << (width - 1).bit_length()
    while stride > 1:
        half = stride // 2
        ends = torch.arange(half, width, stride, device=before.device)
        low = cut[:, ends - half]
        right = ends + half
        high = torch.where(right < width, cut[:, right.clamp_max(width - 1)], ends).minimum(ends)
        row = torch.arange(rows, device=before.device)[:, None].expand_as(low)
        value, where = _search(sums, before, row.reshape(-1), ends.expand_as(low).reshape(-1), low, high)
        best[:, ends], cut[:, ends] = value.view_as(low), where.view_as(low)
        stride = half
    return best, cut


def _search(
    sums: Prefix, before: torch.Tensor, row: torch.Tensor, end: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each ragged range low ... high of starts j, the greatest before[j] + gain(j, end) and its j."""
    low, width = low.reshape(-1), sums.mass.shape[1]
    lengths = high.reshape(-1) - low + 1
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    segment = torch.repeat_interleave(lengths)
    first, last = low + row * width, end + row * width
    at = torch.arange(segment.numel(), device=low.device).add_((first - offsets[:-1]).take(segment))
    # take, not indexing: several times faster on a CPU, and nearly all of the time goes here.
    mass, moment = sums.mass.take(last).take(segment), sums.moment.take(last).take(segment)
    mass.sub_(sums.mass.take(at)).clamp_min_(1e-300)
    value = moment.sub_(sums.moment.take(at)).square_().div_(mass).add_(before.take(at))
    greatest = torch.segment_reduce(value, "max", offsets=offsets, unsafe=True)
    hits = (value == greatest.take(segment)).nonzero()[:, 0]
    # Of equal candidates the first, whatever the order in which a device scatters.
    where = torch.full_like(low, width).scatter_reduce_(
        0, segment[hits], at[hits] - (row * width)[segment[hits]], "amin", include_self=True
    )
    return greatest, where


def split_clusters(values: torch.Tensor, weights: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Split every cluster in two at least weighted squared error: boundaries int64 `[R, 2C + 1]` from `[R, C + 1]`.

    values ascending, weights >= 0: `[R, K]`. A cluster of one distinct value, or of none, gets an empty half.
    """
    rows, columns = values.shape
    sums = prefix_sums(values, weights)
    clusters = boundaries.shape[1] - 1
    member = cluster_of(boundaries, columns)
    start = boundaries.gather(1, member)
    stop = boundaries.gather(1, member + 1)
    row = torch.arange(rows, device=values.device)[:, None]
    cut = torch.arange(columns, device=values.device)[None]
    value = sums.gain(row, start, cut.expand_as(start)) + sums.gain(row, cut.expand_as(start), stop)
    # A cut at the start leaves the left half empty: it is the baseline and always allowed.
    value = value.masked_fill(~(sums.fresh[:, :-1] | (cut == start)), -torch.inf)
    greatest = value.new_full((rows, clusters), -torch.inf).scatter_reduce_(1, member, value, "amax")
    hit = torch.where(value == greatest.gather(1, member), cut, columns)
    # Empty clusters have no candidate: their cut is the boundary itself.
    cuts = boundaries[:, 1:].scatter_reduce(1, member, hit, "amin")
    return torch.cat([torch.stack([boundaries[:, :-1], cuts], 2).flatten(1), boundaries[:, -1:]], dim=1)


def cluster_of(boundaries: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the cluster of each sorted position: int64 `[R, columns]` from boundaries `[R, C + 1]`."""
    steps = torch.zeros(boundaries.shape[0], columns + 1, dtype=torch.int64, device=boundaries.device)
    inner = boundaries[:, 1:-1]
    return steps.scatter_add_(1, inner, torch.ones_like(inner)).cumsum(1)[:, :columns]


def centroids(values: torch.Tensor, weights: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of each cluster, float64 `[R, C]`; NaN where a cluster has no weight.

    values ascending, weights >= 0: `[R, K]`.
    """
    values, weights = values.double(), weights.double()
    member = cluster_of(boundaries, values.shape[1])
    empty = values.new_zeros(values.shape[0], boundaries.shape[1] - 1)
    mass = empty.scatter_add(1, member, weights)
    return empty.scatter_add(1, member, weights * values) / mass
