"""AnybitsQuantization: which layers of a vLLM model run on planes. Importing this registers it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from anybits.config import QUANT_METHOD, StoredConfig
from anybits.errors import AnybitsError
from anybits.integrations.vllm import frontend, loading, runner
from anybits.integrations.vllm.experts import STACKS, PlaneExpertsMethod
from anybits.integrations.vllm.limits import check_engine, check_experts
from anybits.integrations.vllm.linear import PlaneLinearMethod
from anybits.integrations.vllm.options import EngineOptions
from anybits.integrations.vllm.rows import RowPrecisions

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Parts of vLLM's fused layers by their usual names, for models that do not list theirs."""


@register_quantization_config(QUANT_METHOD)
class AnybitsQuantization(QuantizationConfig):
    """A checkpoint's `quantization_config` inside vLLM."""

    def __init__(self, stored: StoredConfig) -> None:
        super().__init__()
        self.stored = stored
        self._rows: RowPrecisions | None = None
        frontend.install()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the worker's buffer out of copies."""
        return self.__dict__ | {"_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, which may be a front end."""
        self.__dict__.update(state)
        frontend.install()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AnybitsQuantization:
        """Read config.json's object; raise AnybitsError when it cannot be right."""
        return cls(StoredConfig.from_dict(config))

    def get_name(self) -> str:
        """Return the method's name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability, as vLLM counts it."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: all is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the targets, and the modules of profiles, as the model renames its modules."""
        targets = tuple(hf_to_vllm_mapper.apply_list(list(self.stored.targets)))
        profiles = {name: hf_to_vllm_mapper.apply_dict(modules) for name, modules in self.stored.profiles.items()}
        self.stored = replace(self.stored, targets=targets, profiles=profiles)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return how the layer called `prefix` runs: on planes when the checkpoint stores it so."""
        if isinstance(layer, LinearBase):
            modules = self._modules(prefix)
            if not modules:
                return UnquantizedLinearMethod()
            stored, rows = self._start()
            config = get_current_vllm_config()
            return PlaneLinearMethod(stored, rows, prefix, modules, capturing=not config.model_config.enforce_eager)
        if isinstance(layer, RoutedExperts) and any(self.stored.is_target(f"{prefix}.{name}") for name in STACKS):
            stored, rows = self._start()
            check_experts(get_current_vllm_config(), layer)
            return PlaneExpertsMethod(layer, stored, rows)
        if isinstance(layer, VocabParallelEmbedding) and self.stored.is_target(prefix):
            raise AnybitsError(f"{prefix} is stored as planes: in vLLM embeddings and the output head must be dense")
        return None

    def _modules(self, prefix: str) -> list[str]:
        """Return the stored matrices that make up a linear layer: itself, all parts of a fused one, or none."""
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf) or FUSED.get(leaf, ())]
        if self.stored.is_target(prefix):  # stored fused, or matched by a pattern like mlp.*: profiles tell which
            stored_fused = any(prefix in modules for modules in self.stored.profiles.values())
            return [prefix] if stored_fused else names or [prefix]
        quantized = [name for name in names if self.stored.is_target(name)]
        if quantized and len(quantized) < len(names):
            dense = ", ".join(name for name in names if name not in quantized)
            raise AnybitsError(f"vLLM fuses {quantized[0]} with {dense}: quantize all of them, or none")
        return quantized

    def _start(self) -> tuple[StoredConfig, RowPrecisions]:
        """Return what is loaded and the worker's rows, hooking the worker at the first plane layer."""
        config = get_current_vllm_config()
        if self._rows is None:
            check_engine(config)
            options = EngineOptions.read(config.additional_config, self.stored)
            runner.install(config.use_v2_model_runner)
            loading.install()
            graphs = config.compilation_config.max_cudagraph_capture_size or 0
            self._rows = RowPrecisions(options, max(config.scheduler_config.max_num_batched_tokens, graphs))
        return self.stored.up_to(self._rows.options.precisions[-1]), self._rows
