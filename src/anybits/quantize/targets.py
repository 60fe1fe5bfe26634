"""What of a model is quantized: linear layers and fused experts of its decoder blocks, in any architecture."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch
from torch import nn

from anybits.errors import AnybitsError

logger = logging.getLogger(__name__)

# Routers decide which expert sees a token; they are tiny, and one wrong bit there costs a whole expert.
ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}


@dataclass(frozen=True)
class Target:
    """One parameter to quantize: its name inside the block, the module's stored name, and its shape as `[N, K]`.

    experts: of a stack `[E, N / E, K]`, else 1.
    """

    parameter: str
    module: str
    out_features: int
    in_features: int
    experts: int = 1

    def slices(self) -> list[slice]:
        """Return the rows of each matrix: of every expert, or all."""
        rows = self.out_features // self.experts
        return [slice(first, first + rows) for first in range(0, self.out_features, rows)]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and list of the decoder blocks: the outermost module list that holds most parameters."""
    best: tuple[int, str, nn.ModuleList | None] = (0, "", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = (size, name, module)
    if best[2] is None:
        raise AnybitsError(f"{type(model).__name__} has no list of decoder blocks to quantize")
    return best[1], best[2]


def find_targets(block: nn.Module) -> list[Target]:
    """Return the quantizable parameters of one block, in module order."""
    targets = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            if name.rpartition(".")[2] not in ROUTER_NAMES:
                targets.append(Target(f"{name}.weight", name, module.out_features, module.in_features))
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and _is_expert_stack(module, parameter):
                full = f"{name}.{leaf}" if name else leaf
                if getattr(module, "is_transposed", False):
                    logger.warning("%s keeps its dtype: expert matrices stored as [E, K, N] are not supported", full)
                    continue
                experts, rows, columns = parameter.shape
                targets.append(Target(full, full, experts * rows, columns, experts))
    return targets


def _is_expert_stack(module: nn.Module, parameter: torch.Tensor) -> bool:
    experts = getattr(module, "num_experts", getattr(module, "num_local_experts", None))
    return experts == parameter.shape[0] or "Experts" in type(module).__name__


def has_experts(targets: list[Target]) -> bool:
    """Return whether a block has stacks of experts, or lists that look like experts."""
    return any(t.experts > 1 or "expert" in t.module for t in targets)


def target_patterns(model: nn.Module) -> tuple[str, ...]:
    """Return the patterns that name every target of a model, block numbers replaced by `*`."""
    prefix, blocks = find_blocks(model)
    patterns: dict[str, None] = {}
    for block in blocks:
        for target in find_targets(block):
            patterns[f"{prefix}.*.{target.module}"] = None
    if not patterns:
        raise AnybitsError(f"{type(model).__name__} has no linear layers in {prefix} to quantize")
    return tuple(re.sub(r"\.\d+(?=\.|$)", ".*", pattern) for pattern in patterns)


def matrix(parameter: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """Return `rows` of a target's parameter as float32 `[N, K]`; the experts of a stack lie one after another."""
    return parameter.detach().reshape(-1, parameter.shape[-1])[rows].float()
