"""What of vLLM does not go together with anybits, said when the engine starts."""

from __future__ import annotations

from typing import Any

from anybits.config import QUANT_METHOD
from anybits.errors import AnybitsError

LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")

MODELLESS = ("ngram", "ngram_gpu", "suffix")
"""Ways to draft without a model; vLLM then names the served model as the draft model."""


def check_engine(vllm_config: Any) -> None:
    """Raise AnybitsError naming the first option of the engine that is not supported."""
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    drafts = speculative is not None and speculative.method not in MODELLESS
    draft = speculative.draft_model_config if drafts else None
    refused = {
        f"--load-format {vllm_config.load_config.load_format}": vllm_config.load_config.load_format not in LOAD_FORMATS,
        "micro-batching (--enable-dbo)": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "LoRA (--enable-lora)": vllm_config.lora_config is not None,
        "a draft model that is an anybits checkpoint itself": getattr(draft, "quantization", None) == QUANT_METHOD,
    }
    for option, used in refused.items():
        if used:
            raise AnybitsError(f"{option} does not work with anybits checkpoints: start vLLM without it")


def check_experts(vllm_config: Any, layer: Any) -> None:
    """Raise AnybitsError naming the first thing about a layer of fused experts that is not supported."""
    parallel, moe = vllm_config.parallel_config, layer.moe_config
    graphs = vllm_config.device_config.device_type == "cuda" and not vllm_config.model_config.enforce_eager
    refused = {
        "CUDA graphs (start with --enforce-eager)": graphs,
        "data parallelism": parallel.data_parallel_size > 1,
        "sequence parallelism of experts": parallel.use_sequence_parallel_moe,
        "experts with biases": moe.has_bias,
        "experts without a gate": not moe.is_act_and_mul,
        "routing weights applied to the experts' input": layer.apply_router_weight_on_input,
    }
    for option, used in refused.items():
        if used:
            raise AnybitsError(f"{layer.layer_name}: {option} cannot be combined with experts stored as planes")
