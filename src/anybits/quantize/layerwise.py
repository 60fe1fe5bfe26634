"""One decoder block with data-aware codes: layer after layer, each seeing what the ones before it became."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from anybits.config import DataAware
from anybits.quantize import expert_moments
from anybits.quantize.blocks import BlockRunner, HiddenStates, Keep
from anybits.quantize.data_aware import improve, join_rows
from anybits.quantize.expert_moments import Dense, Loan, Reach, Routed
from anybits.quantize.experts import Mixture, Part, find_mixtures
from anybits.quantize.hessian import Moments, Watch, collect, stages
from anybits.quantize.targets import Target
from anybits.weight import PlaneWeight

logger = logging.getLogger(__name__)

EXPERT_MEMORY = 1 << 30
"""Bytes of moments of several experts at once, unless it is set; at least those of one are held."""


@torch.no_grad()
def improve_block(
    runner: BlockRunner,
    targets: list[Target],
    start: Mapping[str, PlaneWeight],
    float_path: HiddenStates,
    paths: Mapping[int, HiddenStates],
    settings: DataAware,
    keep: Keep = list,
    expert_memory: int = EXPERT_MEMORY,
    reach: Reach | None = None,
) -> dict[str, PlaneWeight]:
    """Return `start`, the block's data-free weights by module, with codes and levels that fit their inputs.

    float_path, paths: the block's inputs from the float model and from the model quantized at each precision so far;
    keep: where the inputs of experts are kept; expert_memory: bytes of moments of experts at once, which changes
    nothing in the result; reach: counts what tokens experts got.
    """
    hidden = float_path.batches[0]
    mixtures, reasons = find_mixtures(runner, targets, hidden) if settings.experts else ([], _switched_off(targets))
    by_name = {mixture.name: mixture for mixture in mixtures}
    experts = {target.module for mixture in mixtures for target in mixture.targets()}
    order = stages(runner, [t for t in targets if t.module not in experts], hidden, list(by_name))
    work = _Work(runner, targets, start, float_path, paths, settings, keep, expert_memory, reach or Reach())
    for i, groups in enumerate([[group] for group in order] if settings.sequential else [order]):
        work.improve_layers([group for group in groups if group[0] not in by_name])
        later = [name for group in order[i + 1 :] for name in group] if settings.sequential else []
        for group in groups:
            if group[0] in by_name:
                mixture = by_name[group[0]]
                work.improve_mixture(mixture, bool(later) and _is_seen(mixture, later, hidden))
    _announce([t.module for t in targets if t.module not in work.weights], reasons)
    return {**start, **work.weights}


@dataclass
class _Work:
    """A block at work; weights: what is finished, by module; replaced: the same at each precision, by parameter."""

    runner: BlockRunner
    targets: list[Target]
    start: Mapping[str, PlaneWeight]
    float_path: HiddenStates
    paths: Mapping[int, HiddenStates]
    settings: DataAware
    keep: Keep
    expert_memory: int
    reach: Reach
    weights: dict[str, PlaneWeight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with nothing finished."""
        self.precisions = next(iter(self.start.values())).precisions
        self.inputs = [self.paths[p] for p in self.precisions]
        self.replaced: list[dict[str, torch.Tensor]] = [{} for _ in self.precisions]
        self.by_module = {t.module: t for t in self.targets}
        self.like = dict(self.runner.block.named_parameters())

    def improve_layers(self, groups: list[list[str]]) -> None:
        """Improve linear layers, each group of which shares an input."""
        if not groups:
            return
        drift = self.settings.correction > 0
        found = collect(self.runner, groups, self.float_path, self.inputs, self.replaced, drift)
        for group, moments in zip(groups, found, strict=True):
            targets = [self.by_module[module] for module in group]
            parts = self._improve([Part(t, 0, t.out_features) for t in targets], moments)
            for target, better in zip(targets, parts, strict=True):
                self._finish(target, better, True)

    def improve_mixture(self, mixture: Mixture, followed: bool) -> None:
        """Improve all experts of a mixture; followed: whether layers that are still to come see its answers."""
        float_inputs = None
        if self.settings.correction > 0:
            float_inputs = Routed.along(mixture, self.float_path, {}, self.keep).inputs
        before = self.replaced if self.settings.sequential else [{} for _ in self.precisions]
        routed = [Routed.along(mixture, *seen, self.keep) for seen in zip(self.inputs, before, strict=True)]
        finished: dict[str, dict[int, PlaneWeight]] = {}
        for stage in range(len(mixture.stages)):
            columns = mixture.parts(stage, 0)[0].target.in_features
            needed = math.ceil(self.settings.expert_tokens * columns)
            loan = Loan([path.spread(needed) for path in routed], needed)
            if stage == 0:
                self.reach.count(mixture, routed[0], needed)
            for experts in self._chunks(mixture, stage):
                dense = self._dense(mixture, stage, experts, finished)
                weighted = self.settings.router_weights
                found = expert_moments.collect(mixture, stage, experts, float_inputs, routed, dense, loan, weighted)
                for expert in experts:
                    parts = mixture.parts(stage, expert)
                    for part, better in zip(parts, self._improve(parts, found.pop(0)), strict=True):
                        finished.setdefault(part.target.module, {})[part.start] = better
        for module, own in finished.items():
            self._finish(self.by_module[module], join_rows([own[first] for first in sorted(own)]), followed)

    def _chunks(self, mixture: Mixture, stage: int) -> Iterator[range]:
        """Yield experts whose moments are collected together."""
        parts = [p for s in range(stage) for p in mixture.parts(s, 0)]
        earlier = sum((p.stop - p.start) * p.target.in_features for p in parts)
        columns = mixture.parts(stage, 0)[0].target.in_features
        step = max(1, self.expert_memory // expert_moments.bytes_of_one(columns, earlier, len(self.precisions)))
        return (range(first, min(first + step, mixture.count)) for first in range(0, mixture.count, step))

    def _dense(
        self, mixture: Mixture, stage: int, experts: range, finished: Mapping[str, Mapping[int, PlaneWeight]]
    ) -> Dense:
        """Return for each expert and path the matrices before `stage`, by parameter."""
        before = range(stage if self.settings.sequential else 0)
        return {
            (e, i): {
                part.target.parameter: finished[part.target.module][part.start].dequantize(p)
                for s in before
                for part in mixture.parts(s, e)
            }
            for e in experts
            for i, p in enumerate(self.precisions)
        }

    def _improve(self, parts: list[Part], moments: Moments) -> list[PlaneWeight]:
        """Return better weights of matrices that see the same input; moments are used up."""
        # One pass over the columns serves all of them: their rows are independent.
        together = torch.cat([p.target.rows(self.like[p.target.parameter], slice(p.start, p.stop)) for p in parts])
        start = join_rows([self.start[p.target.module].rows(p.start, p.stop) for p in parts])
        better = improve(together, start, moments, self.settings, True)
        ends = torch.tensor([p.stop - p.start for p in parts]).cumsum(0).tolist()
        return [better.rows(first, last) for first, last in zip([0, *ends], ends, strict=False)]

    def _finish(self, target: Target, better: PlaneWeight, needed: bool) -> None:
        """Note a finished target; needed: whether the block runs with it before all are finished."""
        self.weights[target.module] = better
        if needed:
            for p, dense in zip(self.precisions, self.replaced, strict=True):
                dense[target.parameter] = target.shaped(better.dequantize(p))


def _is_seen(mixture: Mixture, later: list[str], hidden: torch.Tensor) -> bool:
    """Return whether what a mixture answers changes what any of the modules `later` sees."""
    like = dict(mixture.runner.block.named_parameters())
    # Its matrices at every precision take much memory, and shared experts, which may come later, do not need them.
    nothing = {t.parameter: torch.zeros(1).expand(like[t.parameter].shape) for t in mixture.targets()}
    watch = Watch(mixture.runner, later)
    one, other = (watch.inputs(hidden, weights, whole=True) for weights in (None, nothing))
    return any(name not in other or not torch.equal(x, other[name]) for name, x in one.items())


def _switched_off(targets: list[Target]) -> dict[str, str]:
    return {t.module: "experts that follow the data are switched off" for t in targets if t.experts > 1}


_announced: set[str] = set()


def _announce(left: list[str], reasons: Mapping[str, str]) -> None:
    for name in sorted(set(left) - _announced):
        _announced.add(name)
        logger.warning("%s: codes are chosen without data: %s", name, reasons.get(name, "it was never called"))
