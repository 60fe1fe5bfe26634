"""The pipeline: a float model in, a checkpoint of bit-planes out, one decoder block after another.

Only the block at hand is in memory. A finished block is on disk before the next one starts. A run that was
stopped goes on from there: finished blocks are read back instead of quantized again, and the result is the same to
the byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybits.checkpoint import CheckpointReader, CheckpointWriter, write_json
from anybits.config import Recipe, StoredConfig
from anybits.errors import AnybitsError
from anybits.quantize import block_tuning, data_free, layerwise
from anybits.quantize.activations import Keeper
from anybits.quantize.blocks import BlockInputs, BlockRunner, HiddenStates, capture
from anybits.quantize.calibration import Calibration
from anybits.quantize.data_aware import join_rows
from anybits.quantize.distillation import Distillation, Outcome
from anybits.quantize.expert_moments import Reach
from anybits.quantize.head import find_head, head_moments, quantize_head
from anybits.quantize.interruptions import explained
from anybits.quantize.left_out import left_out, sentence
from anybits.quantize.sensitivity import Sensitivity
from anybits.quantize.source import Source
from anybits.quantize.targets import Target, all_targets, has_experts, target_patterns
from anybits.quantize.tuned_levels import TunedLevels
from anybits.weight import PlaneWeight

logger = logging.getLogger(__name__)

STATE_FILE = "quantize.json"
SENSITIVITY_FOLDER = "sensitivity"
DISTILLED_FOLDER = "distilled"
HEAD = "head"
REST_BYTES = 512 << 20
"""Bytes of unquantized tensors in one file, unless a single one is larger: what is in memory to write it."""


@dataclass(frozen=True)
class BlockReport:
    """What one finished block reports: relative squared weight error of each precision, and whether it was resumed."""

    index: int
    total: int
    error: dict[int, float]
    resumed: bool


@dataclass
class Progress:
    """Callbacks of a run; each may be replaced."""

    calibrating: Callable[[int, int], None] = field(default=lambda done, total: None)
    block_done: Callable[[BlockReport], None] = field(default=lambda report: None)
    distilling: Callable[[int, int, int], None] = field(default=lambda precision, done, total: None)
    distilled: Callable[[Outcome], None] = field(default=lambda outcome: None)


def quantize(
    model: nn.Module,
    model_config: dict[str, Any],
    recipe: Recipe,
    calibration: Calibration | None,
    out: Path,
    version: str,
    progress: Progress | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    last_step: Callable[[StoredConfig], None] = lambda stored: None,
    expert_memory: int = layerwise.EXPERT_MEMORY,
) -> StoredConfig:
    """Quantize the decoder blocks of `model` into folder `out` and return what was stored.

    model: a causal language model on the CPU, left unchanged; model_config: the JSON object of its config;
    calibration: needed unless the preset is fast; weights: name -> tensor for the parameters of `model` that lie on the
    meta device, read when they are needed; last_step: completes the folder, again if the run is stopped in it;
    expert_memory: bytes of second moments of several experts at once, which does not change the result.
    Raises AnybitsError for a model without linear layers in blocks, for missing calibration, for a folder that
    holds another run, and when memory or disk run out.
    """
    if recipe.needs_text and calibration is None:
        raise AnybitsError(f"preset {recipe.preset} needs calibration text: give some, or use preset fast")
    with explained(out):
        writer = CheckpointWriter(out)
        run = _Run(Source(model, weights), recipe, calibration, writer, progress or Progress(), expert_memory)
        run.check_and_announce()
        _claim(out, run.fingerprint(model_config, version))
        complete = (out / "config.json").exists()  # a run that was stopped in its last step
        rest = [] if complete else run.quantize()
    targets = target_patterns(model) + ((run.head.module,) if run.head else ())
    facts = recipe.to_dict() | _data_facts(calibration) | {"anybits_version": version}
    stored = replace(_stored_config(recipe, targets), recipe=facts)
    if run.head:  # planes of its own in place of the embedding's matrix
        model_config = model_config | {"tie_word_embeddings": False}
    with explained(out):
        if not complete:
            run.writer.finish([*run.shard_names(), *rest], stored, model_config)
        last_step(stored)
        for folder in (SENSITIVITY_FOLDER, DISTILLED_FOLDER):
            shutil.rmtree(out / folder, ignore_errors=True)
        (out / STATE_FILE).unlink()
    return stored


def _data_facts(calibration: Calibration | None) -> dict[str, Any]:
    if calibration is None:
        return {"calibration": None}
    return {
        "calibration": {
            "source": calibration.source,
            "sha256": calibration.sha256,
            "tokens": calibration.tokens.numel(),
        }
    }


def _claim(out: Path, fingerprint: str) -> None:
    """Mark `out` as belonging to this run, or raise AnybitsError when it holds something else."""
    state = out / STATE_FILE
    if state.exists():
        if json.loads(state.read_text())["fingerprint"] != fingerprint:
            raise AnybitsError(
                f"{out} holds an unfinished run with another model, data, settings or version: "
                "repeat that run to resume it, or choose another folder"
            )
        return
    refuse_occupied(out)
    write_json(state, {"fingerprint": fingerprint})


def refuse_occupied(out: Path) -> None:
    """Raise AnybitsError when no run can write to `out`: it is a file, or holds a finished model."""
    if out.exists() and not out.is_dir():
        raise AnybitsError(f"{out} is a file: choose a folder for the result")
    finished = (out / "config.json").exists() or any(out.glob("*.safetensors"))
    if finished and not (out / STATE_FILE).exists():
        raise AnybitsError(f"{out} already holds a model: choose another folder or remove it first")


def walk_bytes(tokens: int, hidden: int, precisions: int, experts: bool) -> int:
    """Return the bytes of activations that are kept while a block is finished.

    They are float32 `[tokens, hidden]`: the block's inputs on the float path and at each precision, the float block's
    outputs, and the outputs that are just computed; before these two, the inputs of experts on all paths.
    """
    return 4 * tokens * hidden * (precisions + 1 + max(2, experts * (precisions + 1)))


def _stored_config(recipe: Recipe, targets: tuple[str, ...]) -> StoredConfig:
    """Return what a reader of `targets` needs to know of planes made by `recipe`."""
    if recipe.method == "any-precision":
        return StoredConfig(recipe.method, recipe.precisions, targets)
    settings = recipe.group_size, recipe.symmetric
    return StoredConfig(recipe.method, recipe.precisions, targets, *settings, scale_bits=recipe.scale_bits)


@dataclass
class _Walk:
    """Where the calibration batches are: the inputs of the next block on the float path and at each precision."""

    inputs: BlockInputs
    keeper: Keeper
    float_path: HiddenStates
    paths: dict[int, HiddenStates]
    as_tuple: bool = False


class _Run:
    """One pass over the blocks."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        calibration: Calibration | None,
        writer: CheckpointWriter,
        progress: Progress,
        expert_memory: int,
    ) -> None:
        self.source, self.recipe, self.calibration = source, recipe, calibration
        self.writer, self.progress = writer, progress
        self.expert_memory, self.reach = expert_memory, Reach()
        self.prefix, self.blocks = source.prefix, source.blocks
        self.targets = all_targets(source.model)
        self.head = find_head(source.model) if recipe.quantize_lm_head else None
        self.sensitivity: Sensitivity | None = None
        self.tuned = TunedLevels(writer.folder / DISTILLED_FOLDER, source.prefix)

    def check_and_announce(self) -> None:
        """Raise AnybitsError for a model whose blocks text cannot be followed through; say what is not quantized."""
        shared = self.source.shared()
        if shared and self.recipe.needs_text:
            raise AnybitsError(
                f"{type(self.source.model).__name__} has blocks that share {shared}: calibration would fit it anew in "
                "each of them, use preset fast"
            )
        left = left_out(self.source, self.targets, self.head)
        if left:
            logger.warning(sentence(left))

    def shard_names(self) -> list[str]:
        """Return the shards of blocks and head, in the order in which they are written."""
        return [*self.block_names(), *([HEAD] if self.head else [])]

    def block_names(self) -> list[str]:
        """Return the shard of each block."""
        return [f"block-{index:05d}" for index in range(len(self.blocks))]

    def fingerprint(self, model_config: dict[str, Any], version: str) -> str:
        """Return a hash of everything that determines the result: model, data, settings and code version."""
        facts = [json.dumps(model_config, sort_keys=True, default=str), self.recipe.to_json(), version]
        facts.append(self.calibration.sha256 if self.calibration else "no text")
        digest = hashlib.sha256("\n".join(facts).encode())
        for name, tensor in self.source.tensors.items():
            digest.update(name.encode() + str(tuple(tensor.shape)).encode() + self.source.sample(name))
        return digest.hexdigest()

    def quantize(self) -> list[str]:
        """Have every shard on disk; return the names of those that hold no block and no quantized head."""
        walk = self._quantize_blocks()
        if self.recipe.distils:
            self._distil(walk)
        return self._write_rest()

    def _quantize_blocks(self) -> _Walk | None:
        """Quantize, tune and write every block, and the head if it is wanted, that is not yet on disk."""
        todo = [not self.writer.has_shard(name) for name in self.block_names()]
        head = self.head is not None and not self.writer.has_shard(HEAD)
        if self.recipe.method == "any-precision" and self.recipe.needs_text and any(todo):
            self._measure_sensitivity(todo)
        fits = self.recipe.uses_hessian or self.recipe.reconstructs
        walk = self._walk() if (fits and (any(todo) or head)) or self._undistilled() else None
        for index in range(len(todo)):
            with self.source.block(index):
                self._finish_block(index, walk, todo[index])
        if head:
            self._write_head(walk)
        if self.reach.scarce:
            logger.warning(
                "%d of %d experts got fewer than %d calibration tokens, %d of them none, and borrowed those of others: "
                "more samples help",
                *(self.reach.scarce, self.reach.experts, self.reach.needed, self.reach.unreached),
            )
        return walk

    def _undistilled(self) -> list[int]:
        """Return the precisions whose levels are still to be tuned end to end."""
        return [p for p in self.recipe.precisions if self.recipe.distils and not self.tuned.has(p)]

    def _distil(self, walk: _Walk | None) -> None:
        """Tune the levels of all blocks end to end, and put them in place of those in the blocks' shards."""
        missing = self._undistilled()
        if missing:
            assert walk is not None
            head = {self.head.parameter: self._read_head()} if self.head else {}
            taught = walk.inputs, walk.float_path.batches, walk.as_tuple
            distillation = Distillation(self.source, self.targets, self.recipe, *taught, self._read_back, head)
            for p in missing:
                blocks, outcome = distillation.tune(p, partial(self.progress.distilling, p))
                self.tuned.write(p, blocks)
                self.progress.distilled(outcome)
        self.tuned.put_into(self.writer, self.block_names(), self.recipe.precisions)

    def _write_head(self, walk: _Walk | None) -> None:
        assert self.head is not None
        moments = None
        if walk is not None and self.recipe.uses_hessian:
            moments = head_moments(self.source, self.head, walk.float_path, walk.paths, walk.as_tuple)
        name = self.head.module
        tensors = quantize_head(self.source, self.head, self.recipe, moments).tensors()
        sentinel = {f"{name}.weight": torch.empty(0, dtype=self.source.dtype)}  # see PlaneModule
        self.writer.write_shard(HEAD, sentinel | {f"{name}.{key}": value for key, value in tensors.items()})

    def _finish_block(self, index: int, walk: _Walk | None, todo: bool) -> None:
        name = self.block_names()[index]
        weights = self._quantize_weights(index) if todo else self._read_back(index)
        if walk is not None:
            weights = self._fit_and_move(index, weights, walk, todo)
        if todo:
            self._write_block(index, name, weights)
        if self.sensitivity is not None:
            self.sensitivity.forget(index)
        self.progress.block_done(BlockReport(index, len(self.blocks), self._errors(index, weights), not todo))

    def _measure_sensitivity(self, todo: list[bool]) -> None:
        assert self.calibration is not None
        folder = self.writer.folder / SENSITIVITY_FOLDER
        self.sensitivity = Sensitivity(self.source, self.targets, self.calibration.tokens, folder)
        self.sensitivity.measure([i for i, wanted in enumerate(todo) if wanted], self.progress.calibrating)

    def _walk(self) -> _Walk:
        assert self.calibration is not None
        batch = self.recipe.batch
        tokens = self.calibration.tokens
        batches = [b for b in tokens.split(batch) if len(b) == batch] or [tokens]
        width = self.source.hidden_size()
        precisions = self.recipe.precisions
        experts = any(has_experts(targets) for targets in self.targets)
        keeper = Keeper(walk_bytes(tokens.numel(), width, len(precisions), experts), self.writer.folder)
        with self.source.running() as model:
            inputs = capture(model, self.blocks, batches, keeper.keep)
        every = {p: self.recipe.every(p) for p in (None, *precisions)}
        thinned = {n: inputs.hidden.thinned(n, keeper.keep) for n in set(every.values())}
        return _Walk(inputs, keeper, thinned[every[None]], {p: thinned[every[p]] for p in precisions})

    def _quantize_weights(self, index: int) -> dict[str, PlaneWeight]:
        sums = {} if self.sensitivity is None else self.sensitivity.read(index)
        return {t.module: self._quantize_one(index, t, sums.get(t.parameter)) for t in self.targets[index]}

    def _quantize_one(self, index: int, target: Target, sensitivity: torch.Tensor | None) -> PlaneWeight:
        parameter = self.blocks[index].get_parameter(target.parameter)
        parts = []
        for rows in target.slices():
            wanted = None if sensitivity is None else target.rows(sensitivity, rows)
            parts.append(data_free.quantize_matrix(target.rows(parameter, rows), self.recipe, wanted))
        return parts[0] if len(parts) == 1 else join_rows(parts)

    def _fit_and_move(
        self, index: int, weights: dict[str, PlaneWeight], walk: _Walk, fit: bool
    ) -> dict[str, PlaneWeight]:
        """Fit the block's weights to the data, then move every path of `walk` behind this block."""
        recipe, targets = self.recipe, self.targets[index]
        runner = BlockRunner(self.blocks[index], walk.inputs.arguments[index])
        if fit and recipe.uses_hessian and recipe.data_aware is not None:
            inputs, keep = (walk.float_path, walk.paths), walk.keeper.keep
            weights = layerwise.improve_block(
                runner, targets, weights, *inputs, recipe.data_aware, keep, self.expert_memory, self.reach
            )
        wanted = runner.run_all(walk.float_path, keep=walk.keeper.keep)
        for p, path in walk.paths.items():
            if fit and recipe.reconstructs:
                seen = walk.float_path.batches, path.batches, wanted.batches
                weights = block_tuning.tune(runner, targets, weights, p, *seen, recipe)
            with torch.no_grad():
                replaced = block_tuning.dense(weights, targets, p)
            walk.paths[p] = runner.run_all(path, lambda replaced=replaced: replaced, walk.keeper.keep)  # type: ignore[misc]
        walk.float_path, walk.as_tuple = wanted, runner.as_tuple
        return weights

    def _write_block(self, index: int, name: str, weights: dict[str, PlaneWeight]) -> None:
        block = self.blocks[index]
        where = f"{self.prefix}.{index}"
        quantized = {t.parameter for t in self.targets[index]}
        tensors = {f"{where}.{key}": value for key, value in block.state_dict().items() if key not in quantized}
        for module, weight in weights.items():
            tensors[f"{where}.{module}.weight"] = torch.empty(0, dtype=self.source.dtype)  # see PlaneModule
            tensors.update({f"{where}.{module}.{key}": value for key, value in weight.tensors().items()})
        self.writer.write_shard(name, tensors)

    def _read_back(self, index: int) -> dict[str, PlaneWeight]:
        recipe = self.recipe
        reader = CheckpointReader([self.writer.path(self.block_names()[index])], _stored_config(recipe, ()))
        where = f"{self.prefix}.{index}"
        return {
            t.module: reader.read(f"{where}.{t.module}", t.in_features, recipe.precisions) for t in self.targets[index]
        }

    def _read_head(self) -> PlaneWeight:
        assert self.head is not None
        reader = CheckpointReader([self.writer.path(HEAD)], _stored_config(self.recipe, ()))
        return reader.read(self.head.module, self.head.in_features, self.recipe.precisions)

    def _write_rest(self) -> list[str]:
        """Write all that is not in a block: embeddings, norms, head; a tied tensor once. Return the shards' names."""
        tied = set(getattr(self.source.model, "all_tied_weights_keys", None) or {})
        parts: list[list[str]] = [[]]
        size = 0
        if self.head:
            tied.add(self.head.parameter)
        for name in self.source.rest_names():
            if name in tied:
                continue
            one = self.source.tensors[name].nbytes
            if parts[-1] and size + one > REST_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(name)
            size += one
        names = ["rest", *(f"rest-{i:05d}" for i in range(1, len(parts)))]
        for shard, part in zip(names, parts, strict=True):
            if not self.writer.has_shard(shard):
                self.writer.write_shard(shard, {name: self.source.read(name) for name in part})
        return names

    def _errors(self, index: int, weights: dict[str, PlaneWeight]) -> dict[int, float]:
        """Return the squared weight error of the block at each precision, relative to the squared weights."""
        total = 0.0
        errors = dict.fromkeys(self.recipe.precisions, 0.0)
        for target in self.targets[index]:
            parameter, quantized = self.blocks[index].get_parameter(target.parameter), weights[target.module]
            for rows in target.slices():
                weight = target.rows(parameter, rows)
                total += float(weight.square().sum())
                for p in errors:
                    error = quantized.rows(rows.start, rows.stop).dequantize(p) - weight
                    errors[p] += float(error.square().sum())
        return {p: error / max(total, 1e-30) for p, error in errors.items()}
