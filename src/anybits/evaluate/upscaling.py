"""An open question of the Any-Precision paper: does incremental upscaling also serve uniform quantization?

Round-to-nearest (RTN) and GPTQ at each precision alone, against one seed whose bins are halved again and again,
on the same matrices, groups and text. Nothing here is a method of anybits; the answer goes into the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from anybits.evaluate import perplexity
from anybits.evaluate.perplexity import Logits
from anybits.weight import group_columns

VARIANTS = ("RTN alone", "RTN upscaled", "GPTQ alone", "GPTQ upscaled")
_BLOCK = 64  # columns whose errors move on together
_DAMPING = 0.01  # of the mean diagonal, as GPTQ does


@dataclass
class Grid:
    """A uniform grid for each group of a matrix `[N, K]`: value = low + step * code; low and step `[N, G]`."""

    low: torch.Tensor
    step: torch.Tensor
    columns: int


def fit_grid(weight: torch.Tensor, precision: int, group_size: int) -> Grid:
    """Return the grid between each group's smallest and largest value."""
    rows, width = weight.shape
    columns = group_columns(group_size, width)
    padded = nn.functional.pad(weight, (0, -width % columns), mode="replicate").view(rows, -1, columns)
    low, high = padded.amin(-1), padded.amax(-1)
    return Grid(low, ((high - low) / (2**precision - 1)).clamp_min(1e-12), columns)


Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Column numbers `[k]` and their values `[N, k]` -> the quantized values `[N, k]`."""


def feedback(weight: torch.Tensor, factor: torch.Tensor | None, choose: Choose) -> torch.Tensor:
    """Return `weight` `[N, K]` quantized by `choose`, column after column with errors fed forward through `factor`.

    factor: upper Cholesky factor `[K, K]` of the inverse Hessian, or None for round-to-nearest.
    """
    width = weight.shape[1]
    if factor is None:
        return choose(torch.arange(width), weight)
    left = weight.T.contiguous()  # [K, N]: a column of the matrix lies in one piece
    out, errors = torch.empty_like(left), torch.empty_like(left)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        for k in range(start, stop):
            out[k] = choose(torch.tensor([k]), left[k][:, None])[:, 0]
            errors[k] = (left[k] - out[k]) / factor[k, k]
            left[k + 1 : stop] -= factor[k, k + 1 : stop, None] * errors[k]
        left[stop:] -= factor[start:stop, stop:].T @ errors[start:stop]
    return out.T.contiguous()


def alone(weight: torch.Tensor, factor: torch.Tensor | None, precision: int, group_size: int) -> torch.Tensor:
    """Return `weight` quantized uniformly at one precision."""
    grid = fit_grid(weight, precision, group_size)

    def choose(k: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        low, step = grid.low[:, k // grid.columns], grid.step[:, k // grid.columns]
        return low + step * ((column - low) / step).round().clamp_(0, 2**precision - 1)

    return feedback(weight, factor, choose)


def upscaled(
    weight: torch.Tensor, factor: torch.Tensor | None, precisions: Sequence[int], group_size: int
) -> dict[int, torch.Tensor]:
    """Return precision -> `weight`, the lowest quantized alone and each further one halving the bins below it."""
    seed = precisions[0]
    step = fit_grid(weight, seed, group_size).step
    columns = group_columns(group_size, weight.shape[1])
    values = {seed: alone(weight, factor, seed, group_size)}
    for p in range(seed + 1, precisions[-1] + 1):
        below, share = values[p - 1], 2.0 ** -(p - seed + 1)

        def choose(
            k: torch.Tensor, column: torch.Tensor, below: torch.Tensor = below, share: float = share
        ) -> torch.Tensor:
            half = step[:, k // columns] * share
            return torch.where(column >= below[:, k], below[:, k] + half, below[:, k] - half)

        values[p] = feedback(weight, factor, choose)
    return {p: values[p] for p in precisions}


def inverse_factors(model: nn.Module, names: Sequence[str], windows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return module -> upper Cholesky factor of the inverse of its damped input covariance on `windows`."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return count

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window, use_cache=False)
    for handle in handles:
        handle.remove()
    factors = {}
    for name, total in sums.items():
        damped = total + torch.eye(len(total)) * (_DAMPING * total.diagonal().mean())
        factors[name] = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factors


@torch.no_grad()
def compare(
    model: nn.Module,
    names: Sequence[str],
    calibration: Sequence[torch.Tensor],
    windows: Sequence[torch.Tensor],
    precisions: Sequence[int],
    group_size: int = 128,
) -> list[dict[str, Any]]:
    """Return one object for each variant and precision: relative weight error and perplexity of the whole model.

    names: linear layers to quantize; calibration, windows: token windows `[1, T]` for GPTQ and for scoring.
    The model, float32 on the CPU, is left as it was.
    """
    originals = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in names}
    factors = inverse_factors(model, names, calibration)
    rows = []
    for variant in VARIANTS:
        made: dict[int, dict[str, torch.Tensor]] = {p: {} for p in precisions}
        for name, weight in originals.items():
            factor = factors[name] if variant.startswith("GPTQ") else None
            if variant.endswith("upscaled"):
                values = upscaled(weight, factor, precisions, group_size)
            else:
                values = {p: alone(weight, factor, p, group_size) for p in precisions}
            for p, value in values.items():
                made[p][name] = value
        for p, matrices in made.items():
            rows.append({"variant": variant, "precision": p} | _score(model, originals, matrices, windows))
    for name, weight in originals.items():
        model.get_parameter(f"{name}.weight").copy_(weight)
    return rows


def _score(
    model: nn.Module,
    originals: dict[str, torch.Tensor],
    matrices: dict[str, torch.Tensor],
    windows: Sequence[torch.Tensor],
) -> dict[str, float]:
    error = sum(float((matrices[name] - w).square().sum()) for name, w in originals.items())
    size = sum(float(w.square().sum()) for w in originals.values())
    for name, matrix in matrices.items():
        model.get_parameter(f"{name}.weight").copy_(matrix)
    logits: Logits = lambda tokens: model(input_ids=tokens, use_cache=False).logits  # noqa: E731
    scores, _ = perplexity.score(windows, [logits], None)
    return {"weight_error": error / size, "perplexity": scores[0].perplexity}
