"""The two kinds of levels in the form that the passes over columns work on: column-major, float32, refittable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from anybits.quantize import linalg, refit
from anybits.quantize.hessian import Layout
from anybits.weight import AffineLevels, CodebookLevels, Levels


@dataclass(frozen=True)
class Family(ABC):
    """Levels of a chunk of rows.

    parameters: a tensor for each of `precisions`, changed in place by `refit`; columns: order and groups of the pass;
    dtype: of the stored levels; effort: sweeps or iterations of a refit.
    """

    precisions: tuple[int, ...]
    parameters: list[torch.Tensor]
    columns: Layout
    dtype: torch.dtype
    effort: int

    @abstractmethod
    def tables(self, group: int) -> list[torch.Tensor]:
        """Return for each precision the level of every code, `[2**p, N]`; groups count as the pass meets them."""

    @abstractmethod
    def refit(self, i: int, errors: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor) -> None:
        """Refit precision number i to least e^T H e; errors `[K, N]` change in place; codes uint8 `[K, N]`."""

    @abstractmethod
    def stored(self) -> Levels:
        """Return the levels as they are stored, groups in the matrix's own order."""

    def rounded(self) -> Family:
        """Return the levels as the stored dtype holds them."""
        return replace(self, parameters=[c.to(self.dtype).float() for c in self.parameters])

    def copy(self) -> Family:
        """Return levels that may change without changing these."""
        return replace(self, parameters=[c.clone() for c in self.parameters])

    def rows(self, which: torch.Tensor) -> Family:
        """Return the levels of the rows that int64 `which` numbers."""
        return replace(self, parameters=[c[..., which] for c in self.parameters])

    def replace_rows(self, which: torch.Tensor, other: Family) -> None:
        """Put the levels of `other` in the rows that int64 `which` numbers."""
        for mine, theirs in zip(self.parameters, other.parameters, strict=True):
            mine[..., which] = theirs

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Return `[P, K, N]`, the levels that codes uint8 `[K, N]` of the top precision stand for."""
        parts = []
        for g, part in enumerate(self.columns.bounds):
            own = codes[part].long()
            drops = [self.precisions[-1] - p for p in self.precisions]
            parts.append(torch.stack([t.gather(0, own >> d) for t, d in zip(self.tables(g), drops, strict=True)]))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Affine(Family):
    """Scales and offsets: parameters `[G, q, N]`, q = p scales, then the offset unless symmetric."""

    group_size: int
    symmetric: bool

    def tables(self, group: int) -> list[torch.Tensor]:
        """Return for each precision the level of every code, `[2**p, N]`."""
        pairs = zip(self.precisions, self.parameters, strict=True)
        return [linalg.design(p, self.symmetric, c).to(c.dtype).T @ c[group] for p, c in pairs]

    def refit(self, i: int, errors: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor) -> None:
        """Refit scales and offsets, group after group."""
        p, top = self.precisions[i], self.precisions[-1]
        refit.affine(errors, hessian, codes, self.parameters[i], p, top, self.columns.bounds, self.effort)

    def stored(self) -> AffineLevels:
        """Return scales `[p, N, G]` and offsets `[N, G]`."""
        back = self.columns.groups.argsort()
        plain = {p: c[back].permute(1, 2, 0) for p, c in zip(self.precisions, self.parameters, strict=True)}
        scales = {p: c[:p].contiguous().to(self.dtype) for p, c in plain.items()}
        offsets = None if self.symmetric else {p: c[p].contiguous().to(self.dtype) for p, c in plain.items()}
        return AffineLevels(self.group_size, scales, offsets)


@dataclass(frozen=True)
class Codebook(Family):
    """Centroids: parameters `[2**p, N]`; the whole row is one group."""

    def tables(self, group: int) -> list[torch.Tensor]:
        """Return for each precision the level of every code, `[2**p, N]`."""
        return self.parameters

    def refit(self, i: int, errors: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor) -> None:
        """Refit the centroids."""
        own = codes.long() >> (self.precisions[-1] - self.precisions[i])
        refit.codebook(errors, hessian, own, self.parameters[i], self.effort)

    def stored(self) -> CodebookLevels:
        """Return centroids `[N, 2**p]`."""
        pairs = zip(self.precisions, self.parameters, strict=True)
        return CodebookLevels({p: c.T.contiguous().to(self.dtype) for p, c in pairs})


def family(levels: Levels, columns: Layout, sweeps: int, iterations: int) -> Family:
    """Return stored levels in the form of the passes."""
    if isinstance(levels, CodebookLevels):
        centroids = [levels.centroids[p].float().T.contiguous() for p in levels.precisions]
        return Codebook(levels.precisions, centroids, columns, levels.centroids[levels.precisions[0]].dtype, iterations)
    parameters = []
    for p in levels.precisions:
        parts = [levels.scales[p]] if levels.offsets is None else [levels.scales[p], levels.offsets[p][None]]
        parameters.append(torch.cat(parts).float().permute(2, 0, 1)[columns.groups].contiguous())
    dtype = levels.scales[levels.precisions[0]].dtype
    symmetric = levels.offsets is None
    return Affine(levels.precisions, parameters, columns, dtype, sweeps, levels.group_size, symmetric)
