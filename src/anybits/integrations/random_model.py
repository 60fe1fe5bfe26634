"""Llama models of random weights, for timing: as large as wanted, from as many distinct layers as memory holds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from anybits.integrations import transformers as hf
from anybits.integrations.decode_step import use_decode_step


def llama(sizes: dict[str, Any], distinct: int) -> hf.PreTrainedModel:
    """Return a Llama on the meta device, in bfloat16, of which only the first `distinct` layers are its own.

    sizes: arguments of LlamaConfig; the layers after the first `distinct` repeat those, sharing their weights.
    """
    config = hf.transformers.LlamaConfig(**sizes)
    with torch.device("meta"), hf.quiet_transformers():
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    layers = list(model.model.layers)[:distinct]
    model.model.layers = nn.ModuleList(layers)
    return model


def repeat_layers(model: hf.PreTrainedModel, total: int) -> None:
    """Let the layers of `model` be followed by views of themselves until there are `total`; each has its own cache."""
    own = list(model.model.layers)
    layers = []
    for index in range(total):
        layer = copy.copy(own[index % len(own)])
        layer._modules = dict(layer._modules)
        attention = copy.copy(layer.self_attn)
        attention.layer_idx = index
        layer._modules["self_attn"] = attention
        layers.append(layer)
    model.model.layers = nn.ModuleList(layers)


def fill(model: nn.Module, device: str = "cpu") -> None:
    """Give every parameter that is on the meta device values, and make decode steps as fast as a loaded model's.

    Buffers are computed from the config.
    """
    noise = torch.randn(1 << 22, device=device).mul_(0.02).bfloat16()  # drawn once: timing does not depend on values
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                flat = data.view(-1)
                for start in range(0, len(flat), len(noise)):
                    part = flat[start : start + len(noise)]
                    part.copy_(noise[: len(part)])
                setattr(module, name, nn.Parameter(data, requires_grad=False))
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    model.model.rotary_emb = type(rotary)(model.config).to(device)  # type: ignore[union-attr]
    use_decode_step(model)


def context_of(model: hf.PreTrainedModel, positions: int) -> Any:
    """Return a cache that holds `positions` random positions of one sequence in every layer."""
    config = model.config
    cache = hf.transformers.DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, positions, config.head_dim)
    for layer in range(len(model.model.layers)):
        keys, values = (torch.randn(shape, device=model.device).bfloat16() for _ in range(2))
        cache.update(keys, values, layer)
    return cache
