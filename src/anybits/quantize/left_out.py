"""What a quantized model keeps in its dtype though it takes room: said once, so that nobody expects it in planes."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from anybits.quantize.source import Source
from anybits.quantize.targets import ROUTER_NAMES, Target

LEAST_SHARE = 0.01
_SHOWN = 4


def left_out(source: Source, targets: list[list[Target]], head: Target | None) -> dict[str, float]:
    """Return name -> share of the model's weights of all that is not quantized and has a hundredth of them, or more.

    In decoder blocks that are matrices, their numbers replaced by `*`; elsewhere whole parts of the model, such as a
    vision tower. Embeddings, the output layer, routers and what is no matrix are left out of this.
    """
    quantized = {f"{source.prefix}.{i}.{t.parameter}" for i, own in enumerate(targets) for t in own}
    quantized |= {head.parameter} if head else set()
    expected = {id(module) for module in source.model.modules() if isinstance(module, nn.Embedding)}
    if hasattr(source.model, "get_output_embeddings"):
        expected.add(id(source.model.get_output_embeddings()))  # type: ignore[operator]
    total, found = 0, Counter[str]()
    for name, module in source.model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            total += parameter.numel()
            plain = parameter.ndim < 2 or leaf.endswith("bias") or bool(set(full.split(".")) & ROUTER_NAMES)
            if not plain and full not in quantized and id(module) not in expected:
                inside = full.startswith(f"{source.prefix}.")
                where = re.sub(r"\.\d+(?=\.|$)", ".*", full) if inside else ".".join(full.split(".")[:2])
                found[where] += parameter.numel()
    return {name: size / total for name, size in found.most_common() if size >= LEAST_SHARE * total}


def sentence(left: dict[str, float]) -> str:
    """Return what to tell the user of what `left_out` found."""
    named = [f"{name} ({share:.0%})" for name, share in list(left.items())[:_SHOWN]]
    more = [f"{len(left) - _SHOWN} more"] if len(left) > _SHOWN else []
    return f"{sum(left.values()):.0%} of the weights keep their dtype: {', '.join(named + more)}"
