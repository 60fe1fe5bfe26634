"""Scales and offsets in 8 bits: whole numbers of a step that a row has for each plane, and one for its offsets."""

from __future__ import annotations

from dataclasses import replace

import torch

from anybits.weight import AffineLevels, PlaneWeight

MOST = 127
MANTISSA = 4
"""Significant bits of a step: with the 7 of a count they fit the 11 of float16, so that all backends may hold the
product in float16 and still have it exactly."""
TINIEST = 24
LARGEST_STEP = 512.0


def step_of(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the step of float `values` along `dim`, kept with extent 1: 127 of them reach the largest magnitude.

    float32, one of the numbers that float16 holds in 4 significant bits; 0 where all values are 0.
    """
    least = values.float().abs().amax(dim, keepdim=True) / MOST
    mantissa, exponent = torch.frexp(least)
    step = torch.ldexp((mantissa * 2**MANTISSA).ceil(), exponent - MANTISSA)
    return ((step * 2.0**TINIEST).ceil() / 2.0**TINIEST).clamp_max(LARGEST_STEP)


def counts(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Return the nearest whole numbers of `step`, float32, -127 to 127; 0 where the step is."""
    found = values.float() / torch.where(step > 0, step, 1.0)
    return torch.where(step > 0, found.round().clamp(-MOST, MOST), 0.0)


def in_steps(levels: AffineLevels) -> AffineLevels:
    """Return the levels in 8 bits, rounded to the nearest; those that are in 8 bits already as they are."""
    if levels.scale_bits == 8:
        return levels
    scale_steps = {p: step_of(t, -1) for p, t in levels.scales.items()}
    scales = {p: counts(t, scale_steps[p]).to(torch.int8) for p, t in levels.scales.items()}
    halves = {p: t.half() for p, t in scale_steps.items()}
    if levels.offsets is None:
        return AffineLevels(levels.group_size, scales, None, halves)
    offset_steps = {p: step_of(t, -1) for p, t in levels.offsets.items()}
    offsets = {p: counts(t, offset_steps[p]).to(torch.int8) for p, t in levels.offsets.items()}
    return AffineLevels(levels.group_size, scales, offsets, halves, {p: t.half() for p, t in offset_steps.items()})


def stored_in(weight: PlaneWeight, scale_bits: int) -> PlaneWeight:
    """Return `weight` with affine levels in 8 bits when `scale_bits` says so; its codes stay."""
    if scale_bits == 16:
        return weight
    assert isinstance(weight.levels, AffineLevels)
    return replace(weight, levels=in_steps(weight.levels))
