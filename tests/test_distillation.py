"""End-to-end tuning: its gradient is the whole model's, it moves one precision's levels only, and it can be resumed."""

import filecmp
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anybits import AnybitsError, Recipe
from anybits.checkpoint import CheckpointReader, checkpoint_files, read_stored_config
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.integrations.lazy import load_lazily
from anybits.integrations.quantizing import estimate_model, quantize_model
from anybits.quantize import block_tuning, data_free, pipeline
from anybits.quantize.blocks import BlockRunner, capture
from anybits.quantize.distillation import Distillation, Outcome, Weights
from anybits.quantize.head import find_head
from anybits.quantize.source import Source
from anybits.quantize.targets import find_targets, matrix
from anybits.weight import PlaneWeight
from conftest import save_tiny, tiny_model

TEXT = ["the quick brown fox jumps over the lazy dog 0123456 " * 20]
RECIPE = Recipe(
    group_size=32, precisions=(2, 3), samples=4, seq_len=16, rounds=2, preset="best", steps=0, distillation_steps=3
)


def set_up(
    model: torch.nn.Module, source: Source, recipe: Recipe, head: bool = False
) -> tuple[Distillation, list[Weights], torch.Tensor, dict[str, PlaneWeight]]:
    """Return a distillation over data-free planes, these planes, the tokens, and the head's planes where wanted."""
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    targets = [find_targets(block) for block in source.blocks]
    blocks = model.get_submodule(source.prefix)

    def quantized(owner: torch.nn.Module, name: str) -> PlaneWeight:
        return data_free.quantize_matrix(matrix(owner.get_parameter(name)), recipe)

    weights = [
        {t.module: quantized(block, t.parameter) for t in own} for block, own in zip(blocks, targets, strict=True)
    ]
    heads = {find_head(model).parameter: quantized(model, find_head(model).parameter)} if head else {}
    with source.running() as running:
        inputs = capture(running, source.blocks, tokens.split(recipe.batch))
    path = inputs.hidden
    for index in range(len(source.blocks)):
        with source.block(index) as block:
            runner = BlockRunner(block, inputs.arguments[index])
            path = runner.run_all(path)
    taught = inputs, path.batches, runner.as_tuple
    return Distillation(source, targets, recipe, *taught, lambda i: weights[i], heads), weights, tokens, heads


def dense(source: Source, weights: list[Weights], heads: dict[str, PlaneWeight], model: torch.nn.Module, p: int):
    found = {name: weight.dequantize(p) for name, weight in heads.items()}
    for index, own in enumerate(weights):
        block = model.get_submodule(source.prefix)[index]
        for name, value in block_tuning.dense(own, find_targets(block), p).items():
            found[f"{source.prefix}.{index}.{name}"] = value
    return found


def divergence(model: torch.nn.Module, tokens: torch.Tensor, found: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    said = torch.func.functional_call(
        model, found, kwargs={"input_ids": tokens, "use_cache": False}, tie_weights=False
    ).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - said)).sum(-1).mean()


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied-bias", "gemma2", "opt", "qwen3-moe"])
def test_divergence_and_gradient_are_those_of_the_whole_model(tmp_path: Path, architecture: str, method: str) -> None:
    folder = save_tiny(tmp_path / "float", architecture)
    model = tiny_model(architecture)
    swapping.run_experts_eagerly(model)
    for lazy in (False, True):
        skeleton, stored = load_lazily(str(folder), tmp_path / "offload") if lazy else (model, None)
        swapping.run_experts_eagerly(skeleton)
        source = Source(skeleton, stored)
        recipe = replace(RECIPE, method=method)
        with_head = architecture != "opt" and method == "anybcq"
        distillation, weights, tokens, heads = set_up(model, source, recipe, with_head)
        trained = [{m: block_tuning.trainable(w, 2) for m, w in own.items()} for own in weights]
        expected = divergence(model, tokens[2:], dense(source, trained, heads, model, 2))
        leaves = [t for own in trained for w in own.values() for t in w.levels.tensors(2).values()]
        gradients = torch.autograd.grad(expected, leaves, allow_unused=True)
        with source.rest():
            assert distillation._divergence(trained, 2, [1]) == pytest.approx(float(expected.detach()), rel=1e-4)
            distillation._accumulate(trained, 2, 1)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:  # an expert that no token reached
                assert leaf.grad is None or not leaf.grad.any()
                continue
            assert leaf.grad is not None
            assert (leaf.grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_tuning_lowers_the_divergence_and_touches_nothing_else(method: str) -> None:
    model = tiny_model("llama")
    source = Source(model)
    recipe = replace(RECIPE, method=method, distillation_steps=30)
    distillation, before, tokens, _ = set_up(model, source, recipe)
    steps: list[tuple[int, int]] = []
    after, outcome = distillation.tune(3, lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, 30) for i in range(30)]
    assert outcome.kept
    for weights, first in ((after, outcome.after), (before, outcome.before)):
        found = divergence(model, tokens, dense(source, weights, {}, model, 3))
        assert first == pytest.approx(float(found), rel=1e-3)
    assert outcome.after < 0.9 * outcome.before
    for own, old in zip(after, before, strict=True):
        for module, weight in own.items():
            for name, tensor in weight.tensors().items():
                assert tensor.dtype == old[module].tensors()[name].dtype
                assert torch.equal(tensor, old[module].tensors()[name]) == (not name.endswith("_3")), name


def test_levels_that_do_not_help_are_left() -> None:
    model = tiny_model("llama")
    distillation, before, _, _ = set_up(model, Source(model), RECIPE)
    taught = []
    for x in distillation._first:  # a teacher that says what the student says already
        for index, weights in enumerate(before):
            x = distillation._forward(index, weights, 2, x)
        taught.append(x)
    distillation._taught = taught
    after, outcome = distillation.tune(2, lambda done, total: None)
    assert outcome.before == pytest.approx(0, abs=1e-6)
    assert not outcome.kept
    for own, old in zip(after, before, strict=True):
        for module, weight in own.items():
            assert all(torch.equal(t, old[module].tensors()[name]) for name, t in weight.tensors().items())


@pytest.mark.parametrize(
    "changes", [{}, {"method": "any-precision"}, {"scale_bits": 8}, {"quantize_lm_head": True, "precisions": (3,)}]
)
def test_a_run_stopped_anywhere_in_it_and_resumed_gives_the_same_bytes(tmp_path: Path, changes: dict) -> None:
    source = save_tiny(tmp_path / "float", "llama", torch.bfloat16)
    recipe = replace(RECIPE, **changes)
    outcomes: list[Outcome] = []
    whole = tmp_path / "whole"
    quantize_model(str(source), whole, recipe, TEXT, progress=pipeline.Progress(distilled=outcomes.append))
    assert [outcome.precision for outcome in outcomes] == list(recipe.precisions)
    assert not (whole / pipeline.DISTILLED_FOLDER).exists()
    hf.load_model(whole)

    class Stopped(BaseException):
        pass

    cut = tmp_path / "cut"
    stops = {"tuning": True, "put": True, "last": True}

    def stop(where: str) -> None:
        if stops[where]:
            stops[where] = False
            raise Stopped

    put, forget = pipeline.TunedLevels.put_into, pipeline.shutil.rmtree

    def put_some(self: pipeline.TunedLevels, writer: object, shards: list[str], precisions: list[int]) -> None:
        put(self, writer, shards[:1], precisions)  # type: ignore[arg-type]
        stop("put")
        put(self, writer, shards, precisions)  # type: ignore[arg-type]

    def remove(path: Path, ignore_errors: bool = False) -> None:
        forget(path, ignore_errors=ignore_errors)
        if path.name == pipeline.DISTILLED_FOLDER:
            stop("last")

    progress = pipeline.Progress(
        distilling=lambda p, done, total: stop("tuning") if p == recipe.precisions[-1] and done == 2 else None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.TunedLevels, "put_into", put_some)
        patch.setattr(pipeline.shutil, "rmtree", remove)
        for _ in range(3):
            with pytest.raises(Stopped):
                quantize_model(str(source), cut, recipe, TEXT, progress=progress)
            assert (cut / pipeline.STATE_FILE).exists()
        assert not any(stops.values())
        quantize_model(str(source), cut, recipe, TEXT)
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in cut.iterdir())
    differing = [name for name in names if not filecmp.cmp(whole / name, cut / name, shallow=False)]
    assert differing == ["README.md"]  # names its folder
    reader = CheckpointReader(checkpoint_files(whole), read_stored_config(whole))
    reader.verify_unquantized()


def test_settings_and_estimate(tmp_path: Path) -> None:
    source = str(save_tiny(tmp_path / "float", "llama"))
    recipe = replace(RECIPE, data_aware=None)  # which would take long to be timed
    with_it = estimate_model(source, recipe)
    without = estimate_model(source, replace(recipe, distillation_steps=0))
    assert with_it.seconds["end-to-end tuning"] > 0
    assert "end-to-end tuning" not in without.seconds
    assert with_it.disk["tuned levels, until the end"] > 0
    with pytest.raises(AnybitsError, match="distillation_steps is -1: it must be a whole number of at least 0"):
        replace(RECIPE, distillation_steps=-1)
    with pytest.raises(AnybitsError, match="distillation_rate is 0: it must lie between 0 and 1"):
        replace(RECIPE, distillation_rate=0)
    assert not replace(RECIPE, preset="default").distils
