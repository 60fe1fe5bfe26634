"""What of a model is quantized: linear layers and fused experts of its decoder blocks, in any architecture."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from anybits.config import names
from anybits.errors import AnybitsError

logger = logging.getLogger(__name__)

ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "modality_router"}
"""Routers decide which expert sees a token; they are tiny, and one wrong bit there costs a whole expert."""

READ_DIRECTLY = {"dt_proj"}
"""Linear layers that are not called: Mamba multiplies with their weight itself."""

LEAST_COLUMNS = 32
"""Planes are padded to words of 32 columns, so a narrower matrix would take more bytes than it has."""


@dataclass(frozen=True)
class Target:
    """One parameter to quantize: its name inside the block, the module's stored name, and its shape as `[N, K]`.

    experts: of a stack `[E, N / E, K]`, else 1; transposed: whether the parameter is `[K, N]` or `[E, K, N / E]`.
    """

    parameter: str
    module: str
    out_features: int
    in_features: int
    experts: int = 1
    transposed: bool = False

    def slices(self) -> list[slice]:
        """Return the rows of each matrix: of every expert, or all."""
        rows = self.out_features // self.experts
        return [slice(first, first + rows) for first in range(0, self.out_features, rows)]

    def rows(self, parameter: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Return `rows` of this target's parameter, or of what has its shape, as float32 `[N, K]`."""
        return matrix(parameter, rows, self.transposed)

    def turned(self, own: torch.Tensor) -> torch.Tensor:
        """Return one expert's matrix `[N, K]` as the parameter holds it, a view."""
        return own.mT if self.transposed else own

    def shaped(self, dense: torch.Tensor) -> torch.Tensor:
        """Return float `[N, K]` in the shape of the parameter, a view."""
        stacked = dense if self.experts == 1 else dense.view(self.experts, -1, self.in_features)
        return self.turned(stacked)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and list of the decoder blocks: the outermost module list that holds most parameters.

    Of a model that also sees or hears, the one of its language model.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    own = {id(module) for module in decoder.modules()}
    inside = {name: module for name, module in lists.items() if id(module) in own} or lists
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in inside.items()}
    if not any(sizes.values()):
        raise AnybitsError(f"{type(model).__name__} has no list of decoder blocks to quantize")
    best = max(sizes, key=lambda name: sizes[name])
    return best, inside[best]


def find_targets(block: nn.Module) -> list[Target]:
    """Return the quantizable parameters of one block, in module order."""
    targets = []
    for name, module in block.named_modules():
        if is_linear(module):
            rows, columns = linear_shape(module)
            if columns >= LEAST_COLUMNS and not set(name.split(".")) & (ROUTER_NAMES | READ_DIRECTLY):
                turned = not isinstance(module, nn.Linear)
                targets.append(Target(f"{name}.weight", name, rows, columns, transposed=turned))
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and _is_expert_stack(module, parameter):
                full = f"{name}.{leaf}" if name else leaf
                turned_stack = is_transposed(module, leaf)
                if turned_stack is None:
                    logger.warning("%s keeps its dtype: %s is no module of experts that is known", full, type(module))
                    continue
                experts, *sizes = parameter.shape
                columns, rows = sizes if turned_stack else sizes[::-1]
                if columns >= LEAST_COLUMNS:
                    targets.append(Target(full, full, experts * rows, columns, experts, turned_stack))
    return targets


def is_linear(module: object) -> bool:
    """Return whether `module` is an nn.Linear, or transformers' Conv1D, the same with a weight `[K, N]`."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return N and K of what `is_linear`."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    assert isinstance(module.weight, torch.Tensor)
    return module.weight.shape[1], module.weight.shape[0]


def is_transposed(module: nn.Module, leaf: str) -> bool | None:
    """Return whether the stack `leaf` of a module of experts is `[E, K, N]`, as gpt-oss has it, and not `[E, N, K]`.

    transformers' modules of experts say so themselves; otherwise what goes from one stack into the other tells: gates
    and ups side by side are twice as wide as what the down projection sees. None where nothing tells.
    """
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    stacks = {name: p.shape[1:] for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if {"gate_up_proj", "down_proj"} <= set(stacks):
        (a, b), (c, d) = stacks["gate_up_proj"], stacks["down_proj"]
        if (b, a) == (c, 2 * d) or (a, b) == (d, 2 * c):
            return (a, b) == (d, 2 * c)
    sizes = getattr(module, "output_size", None), getattr(module, "input_size", None)
    return False if tuple(stacks[leaf]) == sizes else None


def _is_expert_stack(module: nn.Module, parameter: torch.Tensor) -> bool:
    experts = getattr(module, "num_experts", getattr(module, "num_local_experts", None))
    return experts == parameter.shape[0] or "Experts" in type(module).__name__


def has_experts(targets: list[Target]) -> bool:
    """Return whether a block has stacks of experts, or lists that look like experts."""
    return any(t.experts > 1 or "expert" in t.module for t in targets)


def all_targets(model: nn.Module) -> list[list[Target]]:
    """Return the targets of every block of a model; raise AnybitsError when there are none."""
    prefix, blocks = find_blocks(model)
    found = [find_targets(block) for block in blocks]
    if not any(found):
        raise AnybitsError(f"{type(model).__name__} has no linear layers in {prefix} to quantize")
    return found


def target_patterns(model: nn.Module) -> tuple[str, ...]:
    """Return the patterns that name every target of a model and nothing else, with `*` for numbers where that goes."""
    prefix, _ = find_blocks(model)
    wanted = [f"{prefix}.{i}.{t.module}" for i, targets in enumerate(all_targets(model)) for t in targets]
    others = set(_candidates(model)) - set(wanted)
    found: dict[str, list[str]] = {}
    for name in wanted:
        found.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
    patterns: list[str] = []
    for pattern, own in found.items():
        patterns += own if any(names(pattern, other) for other in others) else [pattern]
    return tuple(patterns)


def _candidates(model: nn.Module) -> Iterator[str]:
    """Yield the names of all that a pattern may name: linear layers, and 3-D parameters."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield name
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                yield f"{name}.{leaf}"


def matrix(parameter: torch.Tensor, rows: slice = slice(None), transposed: bool = False) -> torch.Tensor:
    """Return `rows` of a target's parameter as float32 `[N, K]`; the experts of a stack lie one after another."""
    found = parameter.detach().mT if transposed else parameter.detach()
    if found.ndim == 3 and rows.stop is not None:  # without copying other experts, which a transposed stack needs
        each = found.shape[1]
        first, last = rows.start // each, -(-rows.stop // each)
        found, rows = found[first:last], slice(rows.start - first * each, rows.stop - first * each)
    return found.reshape(-1, found.shape[-1])[rows].float().contiguous()
