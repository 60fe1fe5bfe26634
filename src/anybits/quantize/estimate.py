"""What a run will take, before it: seconds from samples timed on this machine, memory and disk from shapes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from anybits.config import Recipe
from anybits.quantize import data_aware, data_free, expert_moments
from anybits.quantize.activations import IN_MEMORY
from anybits.quantize.head import find_head
from anybits.quantize.hessian import Moments, problem
from anybits.quantize.layerwise import EXPERT_MEMORY
from anybits.quantize.pipeline import REST_BYTES, walk_bytes
from anybits.quantize.source import Source
from anybits.quantize.targets import Target, all_targets, has_experts
from anybits.weight import group_count

LIBRARIES = 450 << 20
"""Bytes of Python with torch and transformers imported."""

MATRIX_COPIES = 7
"""Float32 copies of the largest matrix that the data-free quantizers hold at once, their chunks included."""

HESSIANS = 3
"""Float32 `[K, K]` matrices that are kept for each precision: Hessian, factor, and drift, which becomes the shift."""

FACTOR_COPIES = 8
"""Float32 `[K, K]` matrices' worth of float64 ones that live while one Hessian is factorised."""

LEVEL_COPIES = 5
"""Float32 copies of one precision's levels while they are tuned: themselves, gradient, two moments, as they were."""

TUNING_COPIES = 4
"""Float32 copies of a block's matrices while levels are tuned: dequantized, gradient, and two on the way."""

LOGIT_COPIES = 6
"""Float32 copies of a sequence's logits: of both models, their logarithms, gradients."""

PARTIAL_FORWARD = 0.6
"""Share of a block that runs to reach a group of layers, on average over the groups."""


@dataclass(frozen=True)
class Estimate:
    """seconds; memory, disk: bytes at the peak, by what takes them; weights: how many are quantized."""

    weights: int
    seconds: dict[str, float]
    memory: dict[str, int]
    disk: dict[str, int]


def estimate(model: nn.Module, recipe: Recipe, expert_memory: int = EXPERT_MEMORY) -> Estimate:
    """Return what quantizing `model`, which may be on the meta device, will take; times samples for some seconds.

    expert_memory: as of pipeline.quantize.
    """
    source = Source(model)
    targets = all_targets(source.model)
    tokens = recipe.samples * recipe.seq_len if recipe.needs_text else 0
    shape = _Shape(source, targets, tokens, recipe, expert_memory)
    return Estimate(shape.weights, shape.seconds(), shape.memory(), shape.disk())


@dataclass(frozen=True)
class _Stage:
    """Matrices that see one input, `[rows, columns]` together; copies: in a block; share: of the tokens in each."""

    columns: int
    rows: int
    copies: int = 1
    share: float = 1.0


class _Shape:
    """The sizes that everything is computed from."""

    def __init__(
        self, source: Source, targets: list[list[Target]], tokens: int, recipe: Recipe, expert_memory: int
    ) -> None:
        self.source, self.recipe, self.tokens, self.expert_memory = source, recipe, tokens, expert_memory
        self.head = [find_head(source.model)] if recipe.quantize_lm_head else []
        self.targets = [*(target for block in targets for target in block), *self.head]
        self.block = max(targets, key=lambda block: sum(_numel(t) for t in block))
        self.blocks = len(targets)
        self.weights = sum(_numel(t) for t in self.targets)
        self.precisions = len(recipe.precisions)
        experts = any(has_experts(block) for block in targets)
        self.activations = walk_bytes(tokens, source.hidden_size(), self.precisions, experts)
        self.dense, self.experts = _split(self.block)
        self.chosen = _experts_a_token(source.model) if self.experts else 0

    def memory(self) -> dict[str, int]:
        """Return the peak by part: the parts of one block's work, which are alive together."""
        largest = max(_numel(t) // t.experts for t in self.block)
        block = sum(_numel(t) for t in self.block)
        rest = [t.nbytes for t in (self.source.tensors[name] for name in self.source.rest_names())]
        parts = {"libraries": LIBRARIES, "block": block * self.source.dtype.itemsize}
        if self.recipe.uses_hessian:
            # Experts are dequantized one by one, and all of them only where the block runs at one precision.
            dense = sum(_numel(t) for t in self.dense)
            parts["block in float32, and dequantized at each precision"] = 4 * (
                block + max(block if self.experts else 0, self.precisions * dense)
            )
            parts["Hessians"] = max(self._hessians(), default=0)
            if self.experts:
                stored = [_stored_bytes(t, self.recipe) for stage in self.experts.values() for t in stage]
                parts["planes of the block's experts, before and after"] = 2 * sum(stored)
        elif self.recipe.reconstructs:
            parts["block in float32, and dequantized at each precision"] = 4 * block * (1 + self.precisions)
        if not self.recipe.uses_hessian:
            parts["largest matrix at work"] = 4 * largest * MATRIX_COPIES
        if self.tokens and self.activations <= IN_MEMORY:
            parts["activations"] = self.activations
        if self.recipe.distils:
            tuning = self._tuning()
            if sum(tuning.values()) > sum(parts.values()):
                parts = tuning
        alone = LIBRARIES + max(max(rest, default=0), min(sum(rest), REST_BYTES))
        if alone > sum(parts.values()):  # embeddings and head are written by themselves
            return {"libraries": LIBRARIES, "embeddings and head": alone - LIBRARIES}
        return parts

    def _tuning(self) -> dict[str, int]:
        """Return the peak of end-to-end tuning: the block at work dequantized, with its gradient and copies between."""
        levels = max(
            sum(_level_bytes(t, replace(self.recipe, precisions=(p,), scale_bits=16)) for t in self.targets) // 2
            for p in self.recipe.precisions
        )
        states = self.blocks * self.recipe.batch * self.recipe.seq_len * self.source.hidden_size()
        vocabulary = int(self.source.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        head, logits = vocabulary * self.source.hidden_size(), vocabulary * self.recipe.seq_len
        return {
            "libraries": LIBRARIES,
            "levels with their gradients and moments": 4 * levels * LEVEL_COPIES,
            "block dequantized, and its gradient": 4 * sum(_numel(t) for t in self.block) * TUNING_COPIES,
            "states between blocks": 4 * states,
            "output layer, and logits": 4 * (head + LOGIT_COPIES * logits),
            "activations": self.activations if self.activations <= IN_MEMORY else 0,
        }

    def _hessians(self) -> list[int]:
        """Return the bytes of second moments while each of the block's matrices is at work."""
        factors = self.precisions + FACTOR_COPIES
        found = [4 * t.in_features**2 * ((HESSIANS - 1) * self.precisions + factors) for t in self.dense]
        earlier = 0
        for stage in self._expert_stages():
            one = expert_moments.bytes_of_one(stage.columns, earlier, self.precisions)
            held = min(one * stage.copies, max(one, self.expert_memory))
            found.append(held + 4 * stage.columns**2 * factors)
            earlier += stage.columns * stage.rows
        return found

    def _expert_stages(self) -> list[_Stage]:
        """Return what an expert's matrices see, in the order of its layers."""
        found: dict[int, _Stage] = {}
        for alike in self.experts.values():
            columns, copies = alike[0].in_features, sum(t.experts for t in alike)
            rows = alike[0].out_features // alike[0].experts
            before = found.get(columns, _Stage(columns, 0))
            found[columns] = _Stage(columns, before.rows + rows, copies, min(1.0, self.chosen / copies))
        return list(found.values())

    def disk(self) -> dict[str, int]:
        """Return the bytes of the result, and of what lies beside it until the run ends."""
        quantized = {t.parameter for t in self.block}
        tied = set(getattr(self.source.model, "all_tied_weights_keys", None) or {})
        kept = sum(
            t.nbytes
            for name, t in self.source.tensors.items()
            if name not in tied
            and name not in [t.parameter for t in self.head]
            and not any(name.endswith(f".{q}") for q in quantized)
        )
        parts = {"result": sum(_stored_bytes(t, self.recipe) for t in self.targets) + kept}
        if self.activations > IN_MEMORY:
            parts["activations, until the end"] = self.activations
        if self.recipe.distils:
            parts["tuned levels, until the end"] = sum(_level_bytes(t, self.recipe) for t in self.targets)
        if self.recipe.method == "any-precision" and self.recipe.needs_text:
            width = self.source.hidden_size() * self.source.dtype.itemsize
            parts["sensitivities, until the end"] = 4 * self.weights + (self.blocks + 2) * self.tokens * width
        stacks = sum(p.nbytes for p in self.source.model.parameters() if p.ndim == 3)
        if stacks:
            parts["experts as transformers converts them, until the end"] = stacks
        return parts

    def seconds(self) -> dict[str, float]:
        """Return the time by part."""
        parts = {"codes and levels": self.weights * _data_free_seconds(self.block, self.recipe)}
        if not self.tokens:
            return parts
        rate = _multiply_adds_a_second()
        stages = [*self._dense_stages(), *self._expert_stages()]
        block = sum(_numel(t) for t in self.block)
        active = sum(s.copies * s.share * s.columns * s.rows for s in stages)
        forward = self.tokens * self.weights * (active / block) / rate
        shares = {p: 1 / self.recipe.every(p) for p in (None, *self.recipe.precisions)}
        paths = sum(shares.values())
        if self.recipe.method == "any-precision":
            parts["sensitivities"] = 4 * forward
        if self.recipe.uses_hessian:
            cost = _Cost.measured(self.recipe)
            parts["data-aware codes"] = self.blocks * sum(s.copies * cost(s.columns, s.rows) for s in stages)
            halves = sum(shares[p] + min(shares[p], shares[None]) for p in self.recipe.precisions)
            seen = sum(s.copies * s.share * s.columns**2 for s in stages)
            moments = halves * self.tokens * seen * self.blocks
            parts["running the blocks"] = paths * forward * (1 + PARTIAL_FORWARD * len(stages)) + moments / rate
        if self.recipe.reconstructs:
            step = 3 * self.recipe.batch * self.recipe.seq_len * forward / self.tokens
            parts["reconstruction"] = self.recipe.steps * self.precisions * step + paths * forward
        if self.recipe.distils:
            step = 4 * self.recipe.batch * self.recipe.seq_len * forward / self.tokens  # forward, again, and backward
            parts["end-to-end tuning"] = self.recipe.distillation_steps * self.precisions * step
        return parts

    def _dense_stages(self) -> list[_Stage]:
        """Return what the other layers see: q/k/v and gate/up share one input, about 4 of 7 layers have their own."""
        inputs: dict[int, list[Target]] = {}
        for t in self.dense:
            inputs.setdefault(t.in_features, []).append(t)
        groups = [group for targets in inputs.values() for group in _halves(targets)]
        return [_Stage(group[0].in_features, sum(t.out_features for t in group)) for group in groups]


def _numel(target: Target) -> int:
    return target.out_features * target.in_features


def _split(block: list[Target]) -> tuple[list[Target], dict[str, list[Target]]]:
    """Return the layers that see all tokens, and those of experts: a stack, or what is alike in a list, by its name."""
    alike: dict[str, list[Target]] = {}
    for t in block:
        if t.experts > 1 or re.search(r"experts[^.]*\.[^.]*\d+\.", t.module):
            alike.setdefault(re.sub(r"\d+", "*", t.module), []).append(t)
    experts = {name: ts for name, ts in alike.items() if len(ts) > 1 or ts[0].experts > 1}
    listed = [t for ts in experts.values() for t in ts]
    return [t for t in block if t not in listed], experts


def _experts_a_token(model: nn.Module) -> int:
    """Return how many experts a token goes to, by the model's config; 2 where it does not tell."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k")
    return next((int(k) for name in names if isinstance(k := getattr(config, name, None), int)), 2)


def _halves(targets: list[Target]) -> list[list[Target]]:
    """Split layers of one width into those of the attention's input and the rest, as a decoder block has them."""
    first = [t for t in targets if any(part in t.module for part in ("q_", "k_", "v_", "qkv"))]
    return [group for group in (first, [t for t in targets if t not in first]) if group]


def _stored_bytes(target: Target, recipe: Recipe) -> int:
    planes = recipe.precisions[-1] * target.out_features * -(-target.in_features // 32) * 4
    return planes + _level_bytes(target, recipe)


def _level_bytes(target: Target, recipe: Recipe) -> int:
    rows, columns, size = target.out_features, target.in_features, 0
    for p in recipe.precisions:
        if recipe.method == "any-precision":
            size += 2 * rows * 2**p
        else:
            groups = group_count(recipe.group_size, columns)
            a_row = 2 * groups if recipe.scale_bits == 16 else groups + 2  # with the step of a row
            size += a_row * rows * (p + (not recipe.symmetric))
    return size


def _timed(work: Callable[[], object]) -> float:
    """Return the least seconds of three calls after one that warms up: other work on the machine counts least so."""
    work()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _multiply_adds_a_second() -> float:
    x, w = torch.randn(512, 1024), torch.randn(1024, 1024)
    return 512 * 1024 * 1024 / _timed(lambda: x @ w.T)


def _data_free_seconds(block: list[Target], recipe: Recipe) -> float:
    """Return seconds a weight of the data-free quantizer, from some rows of the block's largest matrix."""
    largest = max(block, key=lambda t: _numel(t) // t.experts)
    weight = torch.randn(
        min(largest.out_features // largest.experts, max(16, (1 << 20) // largest.in_features)), largest.in_features
    )
    return _timed(lambda: data_free.quantize_matrix(weight, recipe)) / weight.numel()


@dataclass(frozen=True)
class _Cost:
    """Seconds of data-aware codes for K columns and N rows in chunks.

    chunks K call + N K column + N K² square, chunks running on all cores, + K³ cube.
    """

    precisions: int
    call: float
    column: float
    square: float
    cube: float

    def __call__(self, columns: int, rows: int) -> float:
        step = max(1, min(data_aware.ROWS, data_aware.CHUNK // (self.precisions * columns)))
        chunks = -(-rows // step)
        passes = chunks * columns * self.call + rows * columns * (self.column + columns * self.square)
        return passes / min(chunks, torch.get_num_threads()) + columns**3 * self.cube

    @classmethod
    def measured(cls, recipe: Recipe) -> _Cost:
        """Solve for the four from samples of two widths and two heights, and from one factorisation."""
        narrow, wide, few, many = 256, 1024, 32, 256
        cube = _timed(lambda: problem(_moments(wide, recipe), 0.01, 0.5)) / wide**3
        slope, fixed = {}, 0.0
        for columns in (narrow, wide):
            times = [_data_aware_seconds(columns, rows, recipe) for rows in (few, many)]
            slope[columns] = max(times[1] - times[0], 0.0) / (many - few) / columns
            fixed = max(times[0] - few * columns * slope[columns] - cube * columns**3, 0.0)
        square = max(slope[wide] - slope[narrow], 0.0) / (wide - narrow)
        return cls(len(recipe.precisions), fixed / wide, max(slope[narrow] - narrow * square, 0.0), square, cube)


def _moments(columns: int, recipe: Recipe) -> Moments:
    x = torch.randn(2 * columns, columns)
    hessian = (x.T @ x).repeat(len(recipe.precisions), 1, 1)
    return Moments(hessian, hessian / 16)


def _data_aware_seconds(columns: int, rows: int, recipe: Recipe) -> float:
    assert recipe.data_aware is not None
    settings, weight = recipe.data_aware, torch.randn(rows, columns)
    start = data_free.quantize_matrix(weight, recipe)
    moments = _moments(columns, recipe)
    return _timed(lambda: data_aware.improve(weight, start, moments, settings))
