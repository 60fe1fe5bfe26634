"""Levels refitted under the full Hessian, codes being fixed; column-major like nested_codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anybits.quantize import linalg

# Added to the normal matrices' diagonals, relative to their mean: the sums are float32.
RIDGE = 1e-6


def loss(errors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return e^T H e of every row: float `[N]` from errors `[K, N]` and `[K, K]`."""
    return (errors * (hessian @ errors)).sum(0)


def signs_of(codes: torch.Tensor, precision: int, top: int, offset: bool) -> torch.Tensor:
    """Return the basis `[q, ...]` of codes uint8 of precision `top`: signs of the first planes, ones for the offset."""
    planes = [(codes >> (top - 1 - i) & 1).float().mul_(2).sub_(1) for i in range(precision)]
    return torch.stack([*planes, torch.ones_like(planes[0])] if offset else planes)


def affine(
    errors: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    coefficients: torch.Tensor,
    precision: int,
    top: int,
    bounds: Sequence[slice],
    sweeps: int,
) -> None:
    """Refit scales and offsets group after group, cyclically, to least e^T H e; the error of no row rises.

    errors: levels minus target `[K, N]`; hessian: `[K, K]`; codes uint8 `[K, N]` of precision `top`;
    coefficients `[G, q, N]`: scales of `precision` planes, then the offset unless symmetric; bounds: columns of
    each group. errors and coefficients change in place. One group is an exact least-squares step in q unknowns.
    """
    offset = coefficients.shape[1] > precision
    normals: list[torch.Tensor] = []
    for sweep in range(sweeps):
        for g, part in enumerate(bounds):
            basis = signs_of(codes[part], precision, top, offset).to(errors.dtype)
            if sweep == 0:
                normals.append(_normal(basis, hessian[part, part]))
            gradient = (basis * (hessian[part] @ errors)).sum(1)
            step = linalg.solve(normals[g], gradient.double()).to(errors.dtype)
            coefficients[g] -= step
            errors[part] -= (basis * step[:, None]).sum(0)


def _normal(basis: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return A^T H A of every row with its ridge: float64 `[q, q, N]` from `[q, g, N]` and `[g, g]`."""
    weighted = torch.matmul(hessian, basis)
    normal = torch.stack([(basis[i] * weighted).sum(1) for i in range(len(basis))]).double()
    diagonal = normal.diagonal()
    diagonal += RIDGE * diagonal.mean(1, keepdim=True).clamp_min(1e-30)
    return normal


def codebook(
    errors: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, centroids: torch.Tensor, iterations: int
) -> None:
    """Refit a codebook a row to least e^T H e by conjugate gradients, preconditioned with the diagonal.

    errors: levels minus target `[K, N]`; codes int64 `[K, N]`; centroids `[2**p, N]`; errors and centroids change
    in place. LNQ (arXiv 2505.07004, equation 9) solves the same normal equations directly; the products with
    H shared by all rows make iterations cheaper than one normal matrix a row.
    """
    diagonal = torch.zeros_like(centroids).scatter_add_(
        0, codes, hessian.diagonal()[:, None].expand_as(errors).contiguous()
    )
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-30), 0.0)
    # A codebook with an unused entry keeps it: its residual, and so its direction, stays zero.
    residual = -torch.zeros_like(centroids).scatter_add_(0, codes, hessian @ errors)
    direction = inverse * residual
    strength = (residual * direction).sum(0)
    for _ in range(iterations):
        moved = direction.gather(0, codes)
        pushed = hessian @ moved
        curvature = (moved * pushed).sum(0)
        step = torch.where(curvature > 0, strength / curvature.clamp_min(1e-30), 0.0)
        centroids += step * direction
        errors += step * moved
        residual -= step * torch.zeros_like(centroids).scatter_add_(0, codes, pushed)
        conditioned = inverse * residual
        stronger = (residual * conditioned).sum(0)
        direction = conditioned + torch.where(strength > 0, stronger / strength.clamp_min(1e-30), 0.0) * direction
        strength = stronger
