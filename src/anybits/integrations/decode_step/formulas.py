"""What the kernels of a decode step compute, in plain torch: what a module is compared with where they were not built.

A GPU has kernels of its own for a step (kernels/cuda/step.py), which must not depend on a compiler for the CPU.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As kernels/step.py."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As kernels/step.py."""
    return torch.nn.functional.silu(gate.float()).to(gate.dtype) * up


def attend_new(
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> torch.Tensor:
    """As kernels/step.py: `[B, 1, H * Dv]`."""
    (query, key, value), (keys, values) = new, cache
    batch, kv_heads, _, dim = keys.shape
    keys[:, :, -1] = _rotated(key.view(batch, kv_heads, dim), angles)
    values[:, :, -1] = value.view(batch, kv_heads, -1)
    grouped = _rotated(query.view(batch, -1, dim), angles).view(batch, kv_heads, -1, dim).float()
    weights = (grouped @ keys.float().transpose(-1, -2) * scaling).softmax(-1)
    return (weights @ values.float()).to(query.dtype).reshape(batch, 1, -1)


def _rotated(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `[B, H, D]`: x * cos and rotate_half(x) * sin are rounded, then their sum."""
    low, high = x.chunk(2, -1)
    return x * angles[0] + torch.cat((-high, low), -1) * angles[1]
