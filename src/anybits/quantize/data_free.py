"""One matrix quantized from the weights alone, by the method and the settings of a recipe."""

from __future__ import annotations

import torch

from anybits.config import Recipe
from anybits.quantize import anybcq, anyprecision
from anybits.weight import PlaneWeight


def quantize_matrix(weight: torch.Tensor, recipe: Recipe, sensitivity: torch.Tensor | None = None) -> PlaneWeight:
    """Return float `weight` `[N, K]` in planes; sensitivity `[N, K]`: of any-precision's k-means only."""
    if recipe.method == "any-precision":
        return anyprecision.quantize_matrix(weight, sensitivity, recipe.precisions)
    settings = recipe.precisions, recipe.group_size, recipe.symmetric, recipe.rounds, recipe.scale_bits
    return anybcq.quantize_matrix(weight, *settings)
