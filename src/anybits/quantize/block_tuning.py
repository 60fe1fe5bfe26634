"""Block-wise reconstruction: each precision's levels are tuned so that the block's output stays the float block's.

AnyBCQ (arXiv 2510.10467, section 3.3): planes stay, and Adam moves the scales and offsets of one precision
against the mean squared error at the block's output. The same works on the centroids of Any-Precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from anybits.config import Recipe
from anybits.quantize import steps
from anybits.quantize.blocks import BlockRunner
from anybits.quantize.targets import Target
from anybits.weight import AffineLevels, PlaneWeight

# Share of the input's entries that come from the float path; the rest come from the quantized path (QDrop).
FLOAT_SHARE = 0.5


def dense(weights: Mapping[str, PlaneWeight], targets: list[Target], precision: int) -> dict[str, torch.Tensor]:
    """Return every target's dequantized matrix in the shape of its parameter, by parameter name."""
    return {t.parameter: t.shaped(weights[t.module].dequantize(precision)) for t in targets}


def tune(
    runner: BlockRunner,
    targets: list[Target],
    weights: Mapping[str, PlaneWeight],
    precision: int,
    float_inputs: Sequence[torch.Tensor],
    quantized_inputs: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    recipe: Recipe,
) -> dict[str, PlaneWeight]:
    """Return the weights with the levels of `precision` tuned; all other precisions and the planes are untouched.

    float_inputs, quantized_inputs: the block's inputs `[batch, tokens, hidden]` from the float model and from
    the model quantized at `precision` so far; wanted: the float block's outputs for the float inputs.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    tuned = {name: trainable(weight, precision) for name, weight in weights.items()}
    leaves = [t for weight in tuned.values() for t in weight.levels.tensors(precision).values()]
    optimizer = torch.optim.Adam(leaves, lr=recipe.learning_rate)
    scale = sum(w.square().mean() for w in wanted) / len(wanted)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        index = int(torch.randint(len(wanted), (1,), generator=generator))
        x, q = float_inputs[index], quantized_inputs[index]
        from_float = torch.rand(x.shape, generator=generator) < FLOAT_SHARE
        with torch.enable_grad():
            output = runner(torch.where(from_float, x, q), dense(tuned, targets, precision))
            loss = (output - wanted[index]).square().mean() / scale
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: frozen(tuned[name], weights[name], precision) for name in weights}


def trainable(weight: PlaneWeight, precision: int) -> PlaneWeight:
    """Return a weight that holds `precision` only, its levels being float32 leaves."""
    plain = weight.levels.expanded() if isinstance(weight.levels, AffineLevels) else weight.levels
    levels = plain.map(lambda t: t.detach().float().clone().requires_grad_(True), keep=lambda p: p == precision)
    return PlaneWeight(weight.planes[:precision], weight.in_features, levels)


def frozen(tuned: PlaneWeight, weight: PlaneWeight, precision: int) -> PlaneWeight:
    """Return `weight` with the tuned levels of `precision` in their stored dtype."""
    if isinstance(weight.levels, AffineLevels):
        assert isinstance(tuned.levels, AffineLevels)
        dtype = torch.float32 if weight.levels.scale_bits == 8 else weight.levels.scales[precision].dtype
        found = tuned.levels.map(lambda t: t.detach().to(dtype), keep=lambda p: True)
        if weight.levels.scale_bits == 8:
            found = steps.in_steps(found)
        return replace(weight, levels=weight.levels.replaced(found))
    assert not isinstance(tuned.levels, AffineLevels)
    dtype = weight.levels.centroids[precision].dtype
    centroids = dict(weight.levels.centroids) | {precision: tuned.levels.centroids[precision].detach().to(dtype)}
    return replace(weight, levels=replace(weight.levels, centroids=centroids))
