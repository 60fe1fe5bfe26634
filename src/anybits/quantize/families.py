"""The two kinds of levels in the form that the passes over columns work on: column-major, float32, refittable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from anybits.quantize import linalg, refit, steps
from anybits.quantize.hessian import Layout
from anybits.weight import AffineLevels, CodebookLevels, Levels


@dataclass(frozen=True)
class Family(ABC):
    """Levels of a chunk of rows.

    parameters: a tensor for each of `precisions`, changed in place by `refit`; columns: order and groups of the pass;
    dtype: of the stored levels; effort: sweeps or iterations of a refit; steps: where the parameters are rounded to
    8 bits, the rows' steps that they were rounded to, else nothing.
    """

    precisions: tuple[int, ...]
    parameters: list[torch.Tensor]
    columns: Layout
    dtype: torch.dtype
    effort: int
    steps: list[torch.Tensor] = field(default_factory=list, kw_only=True)

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
        return self._mapped(torch.clone)

    def rows(self, which: torch.Tensor) -> Family:
        """Return the levels of the rows that int64 `which` numbers."""
        return self._mapped(lambda t: t[..., which])

    def _mapped(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Family:
        return replace(self, parameters=[fn(c) for c in self.parameters], steps=[fn(s) for s in self.steps])

    def replace_rows(self, which: torch.Tensor, other: Family) -> None:
        """Put the levels of `other` in the rows that int64 `which` numbers."""
        pairs = zip([*self.parameters, *self.steps], [*other.parameters, *other.steps], strict=True)
        for mine, theirs in pairs:
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
    """Scales and offsets: parameters `[G, q, N]`, q = p scales, then the offset unless symmetric; steps `[1, q, N]`."""

    group_size: int
    symmetric: bool
    scale_bits: int = 16

    def rounded(self) -> Family:
        """Return the levels as they are stored: in the stored dtype, or in steps of their row."""
        if self.scale_bits == 16:
            return super().rounded()
        found = [steps.step_of(c, 0) for c in self.parameters]
        values = [steps.counts(c, step) * step for c, step in zip(self.parameters, found, strict=True)]
        return replace(self, parameters=values, steps=found)

    def tables(self, group: int) -> list[torch.Tensor]:
        """Return for each precision the level of every code, `[2**p, N]`."""
        pairs = zip(self.precisions, self.parameters, strict=True)
        return [linalg.design(p, self.symmetric, c).to(c.dtype).T @ c[group] for p, c in pairs]

    def refit(self, i: int, errors: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor) -> None:
        """Refit scales and offsets, group after group."""
        p, top = self.precisions[i], self.precisions[-1]
        refit.affine(errors, hessian, codes, self.parameters[i], p, top, self.columns.bounds, self.effort)

    def stored(self) -> AffineLevels:
        """Return scales `[p, N, G]` and offsets `[N, G]`, in 8 bits with the steps that `rounded` found."""
        back = self.columns.groups.argsort()
        plain, dtype, sizes = self.parameters, self.dtype, None
        if self.scale_bits == 8:
            assert self.steps, "levels are rounded before they are stored"
            plain = [steps.counts(c, step) for c, step in zip(plain, self.steps, strict=True)]
            dtype, sizes = torch.int8, self._split([s.half() for s in self.steps])
        found = self._split([c[back].to(dtype) for c in plain])
        return AffineLevels(self.group_size, *found, *(sizes or ()))

    def _split(self, parameters: list[torch.Tensor]) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor] | None]:
        """Return `[G, q, N]` of each precision as what belongs to scales `[p, N, G]` and to offsets `[N, G]`."""
        turned = {p: c.permute(1, 2, 0) for p, c in zip(self.precisions, parameters, strict=True)}
        offsets = None if self.symmetric else {p: c[p].contiguous() for p, c in turned.items()}
        return {p: c[:p].contiguous() for p, c in turned.items()}, offsets


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


def family(levels: Levels, columns: Layout, sweeps: int, iterations: int, scale_bits: int = 16) -> Family:
    """Return stored levels in the form of the passes; scale_bits: how affine ones are stored again."""
    if isinstance(levels, CodebookLevels):
        centroids = [levels.centroids[p].float().T.contiguous() for p in levels.precisions]
        return Codebook(levels.precisions, centroids, columns, levels.centroids[levels.precisions[0]].dtype, iterations)
    parameters, symmetric = [], levels.offsets is None
    for p in levels.precisions:
        scales, offsets = levels.values(p)
        parameters.append(_joined(scales, offsets)[columns.groups].contiguous())
    own = []
    if levels.scale_steps is not None:
        offset_steps = levels.offset_steps or {}
        own = [_joined(levels.scale_steps[p].float(), offset_steps.get(p)) for p in levels.precisions]
    dtype = torch.float16 if levels.scale_bits == 8 else levels.scales[levels.precisions[0]].dtype
    settings = levels.group_size, symmetric, scale_bits
    return Affine(levels.precisions, parameters, columns, dtype, sweeps, *settings, steps=own)


def _joined(scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """Return `[G, q, N]` from `[p, N, G]` and `[N, G]`."""
    parts = scales if offsets is None else torch.cat([scales, offsets[None].float()])
    return parts.permute(2, 0, 1)
