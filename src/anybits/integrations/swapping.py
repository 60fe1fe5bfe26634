"""Plane modules in the place of a model's linear layers and expert stacks."""

from __future__ import annotations

import torch
from torch import nn

from anybits.config import Single, StoredConfig
from anybits.errors import AnybitsError
from anybits.linear import PlaneLinear, PlaneModule, PlaneStack
from anybits.precision import ModelPrecision
from anybits.quantize.targets import is_linear, is_transposed, linear_shape


def plane_modules(model: nn.Module) -> dict[str, PlaneModule]:
    """Return the plane modules of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PlaneModule)}


def swap_in_planes(
    model: nn.Module, stored: StoredConfig, default: ModelPrecision, dtype: torch.dtype | None
) -> dict[str, PlaneModule]:
    """Replace every target of `stored` by an empty plane module; return them by name.

    A target is an nn.Linear, a Conv1D, or a 3-D parameter of fused experts, `[E, N, K]` or `[E, K, N]`.
    """
    swapped: dict[str, PlaneModule] = {}
    for name, module in list(model.named_modules()):
        if is_linear(module) and stored.is_target(name):
            rows, columns = linear_shape(module)
            has_bias, turned = module.bias is not None, not isinstance(module, nn.Linear)
            new: PlaneModule = PlaneLinear(columns, rows, stored.group_size, default, has_bias, dtype, turned)
            swapped[name] = new
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
        stacks = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.ndim == 3}
        layouts = {leaf: bool(is_transposed(module, leaf)) for leaf in stacks}  # asked while all are there
        for leaf, parameter in stacks.items():
            full = f"{name}.{leaf}"
            if stored.is_target(full):
                delattr(module, leaf)
                swapped[full] = PlaneStack(parameter.shape, stored.group_size, default, dtype, layouts[leaf])
                setattr(module, leaf, swapped[full])
                run_experts_eagerly(model)
    if not swapped:
        raise AnybitsError(
            f"none of the checkpoint's quantized modules ({', '.join(stored.targets[:3])} ...) is in the model: "
            "config.json does not belong to these weights"
        )
    stored.check_modules(swapped)
    for name, module in swapped.items():
        module.profiles = stored.profiles_of(name)
    return swapped


def model_precision(stored: StoredConfig) -> ModelPrecision:
    """Return the precision state of a model that `stored` describes: at first the highest."""
    return ModelPrecision(stored.precisions[-1], stored.precisions, tuple(stored.profiles))


def run_experts_eagerly(model: nn.Module) -> None:
    """Let fused experts run expert by expert: the batched forms need all their matrices as one dense tensor."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


def weight_facts(model: nn.Module) -> dict[Single, tuple[int, int]]:
    """Return precision or profile -> (bytes of quantized weights read, number of quantized weights) of a model."""
    modules = list(plane_modules(model).values())
    count = sum(module.in_features * module.out_features for module in modules)
    singles: tuple[Single, ...] = (*modules[0].stored_precisions, *modules[0].profiles) if modules else ()
    return {p: (sum(m.weight_bytes(p) for m in modules), count) for p in singles}
