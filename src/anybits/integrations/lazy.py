"""A float model whose weights stay in their files: a skeleton on the meta device, and a mapping that reads them.

transformers' own offloading does the work: it knows which file holds which weight, under which name, and rewrites
only what it has to convert.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf


def skeleton(path: str) -> hf.PreTrainedModel:
    """Return the float model on the meta device, in its stored dtype; raises AnybitsError like load_float_model."""
    config = hf.float_config(path)
    with hf.quiet_transformers():
        try:
            with torch.device("meta"):
                return hf.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        except (OSError, ValueError, KeyError) as error:
            reason = hf.first_line(error)
            if reason.startswith("Unrecognized configuration class"):
                reason = f"{config.model_type} is another kind of model; its language model has to be saved by itself"
            raise AnybitsError(f"{path} cannot be loaded as a causal language model: {reason}") from None


def load_lazily(path: str, offload: Path) -> tuple[hf.PreTrainedModel, Mapping[str, torch.Tensor]]:
    """Return a float model on the meta device, and its weights by name, each read from its file when it is asked for.

    offload: folder for weights that transformers converts while loading, such as fused experts; the files serve
    all others as they are. Raises AnybitsError like load_float_model.
    """
    model = hf.load_float_model(path, device_map=_all_on_disk(skeleton(path)), offload_folder=str(offload))
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    weights = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
    remove_hook_from_submodules(model)
    return model, weights


def _all_on_disk(model: nn.Module) -> dict[str, str]:
    """Return a device map that leaves every module that has parameters on disk, except for the smallest.

    One has to be in memory: accelerate refuses to load nothing. What lies inside of a module with parameters or stored
    buffers of its own has no entry, because accelerate gives the whole of it one place.
    """
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if (next(module.children(), None) is None or _has_own(module)) and not any(
            outer in sizes for outer in _outer(name)
        ):
            sizes[name] = sum(p.numel() for p in module.parameters())
    smallest = min((size, name) for name, size in sizes.items() if size)[1]
    return {name: "disk" if size and name != smallest else "cpu" for name, size in sizes.items()}


def _has_own(module: nn.Module) -> bool:
    """Return whether `module` itself has parameters, or buffers that are stored."""
    return bool(module._parameters) or bool(set(module._buffers) - module._non_persistent_buffers_set)


def _outer(name: str) -> list[str]:
    """Return the names of the modules around the one called `name`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
