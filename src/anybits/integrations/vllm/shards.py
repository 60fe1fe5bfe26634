"""Parts of a PlaneWeight for one rank of a tensor-parallel group."""

from __future__ import annotations

import torch

from anybits.bits import WORD
from anybits.errors import AnybitsError
from anybits.weight import AffineLevels, Levels, PlaneWeight, group_columns, group_count


def check_columns(name: str, in_features: int, shard: int, group_size: int | None) -> None:
    """Raise AnybitsError unless K = `in_features` columns split into shards of `shard` at words and groups.

    group_size: None for codebooks. A row of a single group needs only whole words: each shard keeps its scale.
    """
    if shard == in_features:
        return
    groups = 1 if group_size is None else group_count(group_size, in_features)
    group = WORD if group_size is None or groups == 1 else group_columns(group_size, in_features)
    if shard % WORD or shard % group:
        raise AnybitsError(
            f"{name} cannot be split over {in_features // shard} ranks: each would have {shard} of its {in_features} "
            f"input columns, which must be a multiple of {max(WORD, group)} "
            f"({'the group size' if group > WORD else 'the bits of a word'}); use fewer ranks"
        )


def select_rows(weight: PlaneWeight, rows: torch.Tensor) -> PlaneWeight:
    """Return the output rows `rows` (int64) of `weight`, copied."""
    levels = weight.levels.map(lambda t: t.index_select(-2, rows), keep=lambda p: True)
    return PlaneWeight(weight.planes.index_select(1, rows), weight.in_features, levels)


def select_columns(weight: PlaneWeight, start: int, stop: int) -> PlaneWeight:
    """Return input columns start ... stop - 1, for which `check_columns` holds, copied."""
    levels: Levels = weight.levels
    if isinstance(levels, AffineLevels) and next(iter(levels.scales.values())).shape[-1] > 1:
        columns = group_columns(levels.group_size, weight.in_features)
        first, count = start // columns, -(-(stop - start) // columns)
        levels = levels.map(
            lambda t: t if t.shape[-1] == 1 else t.narrow(-1, first, count).contiguous(), keep=lambda p: True
        )
    words = -(-(stop - start) // WORD)
    return PlaneWeight(weight.planes.narrow(-1, start // WORD, words).contiguous(), stop - start, levels)
