"""Any-Precision LLM (arXiv 2402.10517): a codebook a row for the seed precision, then one bit more at a time."""

from __future__ import annotations

import torch

from anybits import bits
from anybits.config import check_precisions
from anybits.errors import AnybitsError
from anybits.quantize import kmeans, linalg
from anybits.weight import CodebookLevels, PlaneWeight

# Weights of one chunk of rows; a chunk holds about fifteen float64 or int64 temporaries of this size.
CHUNK = 1 << 18
# Weights that the calibration text never touched still have to land near their value, so their sensitivity
# is this share of the row's mean: far too little to move a centroid.
FLOOR = 1e-8


def quantize_matrix(
    weight: torch.Tensor,
    sensitivity: torch.Tensor | None,
    precisions: tuple[int, ...],
    level_dtype: torch.dtype = torch.float16,
) -> PlaneWeight:
    """Quantize one matrix to codebooks that share bits.

    weight, sensitivity (diagonal Fisher, >= 0, None for uniform): float `[N, K]`. The seed min(precisions)
    minimises sum_k s_k (w_k - c_code(k))^2 of each row exactly (section 3 of the paper; the objective is
    SqueezeLLM's, arXiv 2306.07629); each further bit splits every cluster by exact weighted 2-means (incremental
    upscaling). A row without any sensitivity counts as uniform. Raises AnybitsError for values that are not
    finite, sensitivities that do not fit, and centroids beyond `level_dtype`.
    """
    check_precisions(precisions)
    check_weight(weight)
    if sensitivity is not None:
        _check_sensitivity(sensitivity, weight)
    rows, columns = weight.shape
    top = precisions[-1]
    weight = weight.detach()
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    levels = {p: torch.empty(rows, 2**p, dtype=level_dtype, device=weight.device) for p in precisions}
    step = max(1, CHUNK // columns)

    def fit(r: int) -> None:
        chunk = slice(r, r + step)
        weights = None if sensitivity is None else sensitivity[chunk]
        codes[chunk], fitted = _fit_rows(weight[chunk].double(), weights, precisions[0], top)
        for p in precisions:
            levels[p][chunk] = fitted[p].to(level_dtype)

    linalg.for_each_chunk(fit, range(0, rows, step), weight.device)
    if not all(bool(torch.isfinite(t).all()) for t in levels.values()):
        raise AnybitsError(f"the weights are too large for levels of {level_dtype}: choose a wider level dtype")
    return PlaneWeight(bits.codes_to_planes(codes, top), columns, CodebookLevels(levels))


def check_weight(weight: torch.Tensor) -> None:
    """Raise AnybitsError unless `weight` is a finite float matrix."""
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise AnybitsError(f"a weight to quantize must be float [N, K], got {weight.dtype} {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise AnybitsError("the weight holds NaN or infinite values and cannot be quantized")


def _check_sensitivity(sensitivity: torch.Tensor, weight: torch.Tensor) -> None:
    if sensitivity.shape != weight.shape:
        raise AnybitsError(f"the sensitivity has shape {list(sensitivity.shape)} where {list(weight.shape)} is needed")
    if not (torch.isfinite(sensitivity).all() and (sensitivity >= 0).all()):
        raise AnybitsError("the sensitivity must be finite and nowhere negative")


def _masses(sensitivity: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return positive float64 weights of mean about 1 for each row."""
    if sensitivity is None:
        return torch.ones_like(like)
    mass = sensitivity.double()
    mean = mass.mean(1, keepdim=True)
    return torch.where(mean > 0, (mass / mean.clamp_min(1e-300)).clamp_min(FLOOR), 1.0)


def _fit_rows(
    values: torch.Tensor, sensitivity: torch.Tensor | None, seed: int, top: int
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Return uint8 codes `[R, K]` of precision `top`, and float64 centroids `[R, 2**p]` for each p from `seed`."""
    mass = _masses(sensitivity, values)
    values, order = values.sort(dim=1, stable=True)
    mass = mass.gather(1, order)
    boundaries = kmeans.optimal_clusters(values, mass, 2**seed)
    fitted = {seed: _fill_neighbour(kmeans.centroids(values, mass, boundaries))}
    for p in range(seed + 1, top + 1):
        boundaries = kmeans.split_clusters(values, mass, boundaries)
        children = kmeans.centroids(values, mass, boundaries)
        # A child without members repeats its parent, as its sibling does: the order of centroids holds.
        fitted[p] = torch.where(children.isnan(), fitted[p - 1].repeat_interleave(2, dim=1), children)
    sorted_codes = kmeans.cluster_of(boundaries, values.shape[1]).to(torch.uint8)
    return torch.empty_like(sorted_codes).scatter_(1, order, sorted_codes), fitted


def _fill_neighbour(means: torch.Tensor) -> torch.Tensor:
    """Give empty seed clusters the centroid of the nearest one below, or of the lowest: never NaN, still ascending."""
    filled = means.clone()
    for c in range(1, means.shape[1]):
        filled[:, c] = torch.where(filled[:, c].isnan(), filled[:, c - 1], filled[:, c])
    for c in range(means.shape[1] - 2, -1, -1):
        filled[:, c] = torch.where(filled[:, c].isnan(), filled[:, c + 1], filled[:, c])
    return filled
