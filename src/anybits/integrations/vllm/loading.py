"""Weights on their way from the checkpoint into vLLM: checked, and no byte more than the precisions need."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from anybits.checkpoint import CheckpointReader
from anybits.config import StoredConfig
from anybits.errors import AnybitsError
from anybits.integrations.vllm.experts import PlaneExpertsMethod
from anybits.integrations.vllm.linear import PlaneLinearMethod
from anybits.weight import LEVEL_KINDS

logger = logging.getLogger(__name__)


def install() -> None:
    """Let vLLM's loader of safetensors read models that have plane layers through `CheckpointReader`; idempotent."""
    original = DefaultModelLoader.get_all_weights
    if hasattr(original, "anybits"):
        return

    @wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        layers = plane_layers(model)
        if not layers:
            return original(self, model_config, model)
        return _read(self, model_config, model, layers)

    hooked: Any = get_all_weights
    hooked.anybits = True
    DefaultModelLoader.get_all_weights = hooked


def plane_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a vLLM model that run on planes."""
    methods = (PlaneLinearMethod, PlaneExpertsMethod)
    return [module for module in model.modules() if isinstance(getattr(module, "quant_method", None), methods)]


def _read(loader: Any, model_config: Any, model: nn.Module, layers: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (stored name, tensor); stacks of experts go directly to their layers."""
    _, files, safetensors, _ = loader._prepare_weights(model_config.model, None, model_config.revision, False, None)
    if not safetensors:
        raise AnybitsError("an anybits checkpoint is read from safetensors files, and none were found")
    stored = layers[0].quant_method.stored
    reader = CheckpointReader(map(Path, files), stored)
    _take_dtype(layers, reader)
    if loader.counter_before_loading_weights == 0.0:
        loader.counter_before_loading_weights = time.perf_counter()
    yield from stream(reader, stored, model, layers)
    total = sum(reader.stored_bytes(name) for name in reader.names())
    logger.info("anybits: %d of %d bytes read for precisions up to %d", reader.bytes_read, total, stored.precisions[-1])
    for source in getattr(model, "secondary_weights", ()):
        yield from loader._get_weights_iterator(source)


def stream(
    reader: CheckpointReader, stored: StoredConfig, model: nn.Module, layers: list[Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what `stored`'s precisions need of a checkpoint, without the empty `weight` of plane modules."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renamed = mapper.get_rename_mapper().map_name if mapper is not None else str
    stacks = {layer.layer_name: layer.anybits_stacks for layer in layers if hasattr(layer, "anybits_stacks")}
    for name in reader.names():
        module, _, leaf = name.rpartition(".")
        if not reader.has(module):
            yield name, reader.read_tensor(name)
            continue
        if leaf != "bias" and not _needed(leaf, stored.precisions):
            continue
        tensor = reader.read_tensor(name, first=stored.precisions[-1] if leaf == "planes" else None)
        parent, _, stack = (renamed(module) or module).rpartition(".")
        if parent not in stacks:
            yield name, tensor
        elif stack in stacks[parent]:
            stacks[parent][stack][leaf] = tensor
        else:
            raise AnybitsError(f"{name} is stored as planes, but {parent} has no {stack}")


def _needed(leaf: str, precisions: tuple[int, ...]) -> bool:
    kind, _, precision = leaf.rpartition("_")
    return leaf == "planes" or (kind in LEVEL_KINDS and int(precision) in precisions)


def _take_dtype(layers: list[Any], reader: CheckpointReader) -> None:
    """Give the layers' empty levels the dtype of the stored ones, or float32 when they differ among themselves."""
    names = (name for name in reader.names() if name.rpartition(".")[2].rpartition("_")[0] in LEVEL_KINDS)
    dtypes = {reader.dtype(name) for name in names if reader.has(name.rpartition(".")[0])} - {torch.int8}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            if hasattr(parameter, "anybits_level") and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
