"""Tiny models of the decoder families that docs/models.md names, by transformers' model type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

TOKENS: dict[str, Any] = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
PLAIN = TOKENS | dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
LLAMA = PLAIN | dict(num_key_value_heads=2, intermediate_size=96)
HEAD16, HEAD32 = LLAMA | dict(head_dim=16), LLAMA | dict(head_dim=32)
GPT2 = TOKENS | dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
FINE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
SHARED = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
MLA = dict(
    num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
)
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
DELTA = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16, mamba_expand=2)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
SCALED = dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=4.0)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ALTUP = dict(
    num_hidden_layers=4,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=32,
    laurel_rank=8,
    altup_num_inputs=2,
    intermediate_size=[96] * 4,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
)


@dataclass(frozen=True)
class FamilyModel:
    """A config class of transformers with its settings, and what docs/models.md says of the family.

    model_type: the row of the table; calibrated: whether presets that read text work; served: whether `serve` does.
    """

    model_type: str
    config: str
    settings: dict[str, Any] = field(repr=False)
    calibrated: bool = True
    served: bool = True


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


MODELS: dict[str, FamilyModel] = {
    "llama": FamilyModel("llama", "LlamaConfig", HEAD32),
    "llama-3": FamilyModel(
        "llama", "LlamaConfig", HEAD32 | dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
    ),
    "llama-dynamic": FamilyModel("llama", "LlamaConfig", HEAD32 | _rope(rope_type="dynamic", factor=4.0)),
    "llama-yarn-bias": FamilyModel(
        "llama",
        "LlamaConfig",
        HEAD32
        | dict(attention_bias=True, mlp_bias=True)
        | _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "llama4": FamilyModel(
        "llama4_text",
        "Llama4TextConfig",
        HEAD16
        | dict(intermediate_size=48, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1)
        | dict(interleave_moe_layer_step=1, attention_chunk_size=16, rope_parameters=LLAMA3_ROPE),
        served=False,
    ),
    "mistral": FamilyModel("mistral", "MistralConfig", HEAD32 | dict(sliding_window=8)),
    "mixtral": FamilyModel("mixtral", "MixtralConfig", HEAD32 | LOCAL | dict(sliding_window=None)),
    "ministral": FamilyModel("ministral", "MinistralConfig", HEAD32 | SLIDING),
    "ministral3": FamilyModel("ministral3", "Ministral3Config", HEAD32),
    "qwen2": FamilyModel("qwen2", "Qwen2Config", LLAMA),
    "qwen2-sliding": FamilyModel(
        "qwen2", "Qwen2Config", LLAMA | dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "qwen2-moe": FamilyModel("qwen2_moe", "Qwen2MoeConfig", LLAMA | FINE | dict(shared_expert_intermediate_size=64)),
    "qwen3": FamilyModel("qwen3", "Qwen3Config", HEAD32 | dict(tie_word_embeddings=True)),
    "qwen3-moe": FamilyModel("qwen3_moe", "Qwen3MoeConfig", HEAD32 | FINE),
    "qwen3-next": FamilyModel(
        "qwen3_next",
        "Qwen3NextConfig",
        HEAD32 | FINE | DELTA | dict(shared_expert_intermediate_size=64),
        served=False,
    ),
    "qwen3.5": FamilyModel("qwen3_5_text", "Qwen3_5TextConfig", HEAD32 | DELTA, served=False),
    "gemma": FamilyModel("gemma", "GemmaConfig", HEAD32),
    "gemma2": FamilyModel("gemma2", "Gemma2Config", HEAD32 | dict(sliding_window=8, query_pre_attn_scalar=20)),
    "gemma3": FamilyModel("gemma3_text", "Gemma3TextConfig", HEAD32 | SLIDING | dict(query_pre_attn_scalar=20)),
    "gemma3-vision": FamilyModel(
        "gemma3",
        "Gemma3Config",
        dict(
            text_config=HEAD32 | SLIDING,
            vision_config=VISION | dict(image_size=28, patch_size=14, num_hidden_layers=8),
            mm_tokens_per_image=4,
        ),
    ),
    "gemma3n": FamilyModel("gemma3n_text", "Gemma3nTextConfig", HEAD32 | ALTUP, calibrated=False),
    "gemma4": FamilyModel(
        "gemma4_text",
        "Gemma4TextConfig",
        HEAD32 | SLIDING | dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=32),
        calibrated=False,
    ),
    "phi": FamilyModel("phi", "PhiConfig", LLAMA | dict(num_key_value_heads=4)),
    "phi3": FamilyModel("phi3", "Phi3Config", LLAMA | dict(partial_rotary_factor=0.5, sliding_window=8)),
    "phi3-longrope": FamilyModel(
        "phi3",
        "Phi3Config",
        LLAMA
        | dict(original_max_position_embeddings=64)
        | _rope(
            rope_type="longrope",
            short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
            original_max_position_embeddings=64,
        ),
    ),
    "phimoe": FamilyModel("phimoe", "PhimoeConfig", LLAMA | LOCAL | dict(sliding_window=None)),
    "olmo": FamilyModel("olmo", "OlmoConfig", LLAMA | dict(clip_qkv=0.5)),
    "olmo2": FamilyModel("olmo2", "Olmo2Config", LLAMA),
    "olmo3": FamilyModel("olmo3", "Olmo3Config", LLAMA | SLIDING),
    "olmoe": FamilyModel("olmoe", "OlmoeConfig", LLAMA | dict(num_experts=4, num_experts_per_tok=2)),
    "gpt-oss": FamilyModel("gpt_oss", "GptOssConfig", HEAD16 | LOCAL | SLIDING | dict(intermediate_size=48)),
    "deepseek-v2": FamilyModel("deepseek_v2", "DeepseekV2Config", LLAMA | MLA | SHARED | dict(q_lora_rank=None)),
    "deepseek-v3": FamilyModel("deepseek_v3", "DeepseekV3Config", LLAMA | MLA | SHARED | dict(n_group=2)),
    "glm": FamilyModel("glm", "GlmConfig", HEAD16),
    "glm4": FamilyModel("glm4", "Glm4Config", HEAD32),
    "glm4-moe": FamilyModel("glm4_moe", "Glm4MoeConfig", HEAD32 | SHARED | dict(use_qk_norm=True)),
    "dots1": FamilyModel("dots1", "Dots1Config", HEAD32 | SHARED),
    "granite": FamilyModel("granite", "GraniteConfig", HEAD32 | SCALED | dict(hidden_size=128)),
    "granite-moe": FamilyModel("granitemoe", "GraniteMoeConfig", LLAMA | LOCAL | SCALED),
    "granite-moe-shared": FamilyModel(
        "granitemoeshared", "GraniteMoeSharedConfig", LLAMA | LOCAL | dict(shared_intermediate_size=64)
    ),
    "granite-moe-hybrid": FamilyModel(
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        LLAMA | LOCAL | MAMBA2 | dict(shared_intermediate_size=64, layer_types=["mamba", "attention"]),
        served=False,
    ),
    "cohere": FamilyModel("cohere", "CohereConfig", LLAMA | dict(logit_scale=0.25, use_qk_norm=True)),
    "cohere2": FamilyModel("cohere2", "Cohere2Config", HEAD32 | SLIDING | dict(logit_scale=0.25)),
    "stablelm": FamilyModel(
        "stablelm", "StableLmConfig", LLAMA | dict(partial_rotary_factor=0.5, use_qkv_bias=True, qk_layernorm=True)
    ),
    "falcon": FamilyModel(
        "falcon", "FalconConfig", PLAIN | dict(new_decoder_architecture=True, num_kv_heads=2), served=False
    ),
    "falcon-alibi": FamilyModel(
        "falcon",
        "FalconConfig",
        PLAIN | dict(multi_query=False, parallel_attn=False, alibi=True, bias=True),
        served=False,
    ),
    "gpt-neox": FamilyModel("gpt_neox", "GPTNeoXConfig", PLAIN | dict(intermediate_size=96, rotary_pct=0.5)),
    "gpt2": FamilyModel("gpt2", "GPT2Config", GPT2),
    "gpt-bigcode": FamilyModel("gpt_bigcode", "GPTBigCodeConfig", GPT2 | dict(multi_query=True)),
    "bloom": FamilyModel("bloom", "BloomConfig", TOKENS | dict(hidden_size=64, n_layer=2, n_head=4), served=False),
    "mpt": FamilyModel(
        "mpt",
        "MptConfig",
        TOKENS | dict(d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128),
        served=False,
    ),
    "opt": FamilyModel("opt", "OPTConfig", PLAIN | dict(ffn_dim=96, word_embed_proj_dim=64)),
    "opt-350m": FamilyModel(
        "opt", "OPTConfig", PLAIN | dict(ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False)
    ),
    "starcoder2": FamilyModel("starcoder2", "Starcoder2Config", LLAMA | dict(use_bias=True, sliding_window=8)),
    "smollm3": FamilyModel("smollm3", "SmolLM3Config", HEAD32 | dict(no_rope_layers=[1, 0])),
    "exaone4": FamilyModel("exaone4", "Exaone4Config", HEAD32 | SLIDING),
    "nemotron": FamilyModel("nemotron", "NemotronConfig", HEAD32 | dict(partial_rotary_factor=0.5)),
    "nemotron-h": FamilyModel(
        "nemotron_h",
        "NemotronHConfig",
        HEAD32
        | dict(num_hidden_layers=3, layers_block_type=["mamba", "attention", "mlp"])
        | dict(mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=1, chunk_size=16),
        served=False,
    ),
    "minicpm3": FamilyModel("minicpm3", "MiniCPM3Config", LLAMA | MLA),
    "minimax-m2": FamilyModel("minimax_m2", "MiniMaxM2Config", HEAD16 | LOCAL),
    "mamba": FamilyModel(
        "mamba",
        "MambaConfig",
        TOKENS | dict(hidden_size=64, num_hidden_layers=2, state_size=16, time_step_rank=32),
        served=False,
    ),
    "mamba2": FamilyModel(
        "mamba2",
        "Mamba2Config",
        TOKENS
        | dict(hidden_size=64, num_hidden_layers=2, num_heads=4, head_dim=32)
        | dict(state_size=16, n_groups=1, chunk_size=16),
        served=False,
    ),
    "jamba": FamilyModel(
        "jamba",
        "JambaConfig",
        LLAMA
        | dict(num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1)
        | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=32, use_mamba_kernels=False),
        served=False,
    ),
    "bamba": FamilyModel("bamba", "BambaConfig", LLAMA | MAMBA2 | dict(attn_layer_indices=[1]), served=False),
    "falcon-h1": FamilyModel("falcon_h1", "FalconH1Config", HEAD16 | MAMBA2 | dict(mamba_d_ssm=128), served=False),
    "zamba2": FamilyModel(
        "zamba2",
        "Zamba2Config",
        LLAMA
        | dict(num_key_value_heads=4, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2)
        | dict(mamba_d_state=16, n_mamba_heads=4, mamba_headdim=32, mamba_ngroups=1, chunk_size=16)
        | dict(num_mem_blocks=1, adapter_rank=8, use_mem_rope=True),
        calibrated=False,
        served=False,
    ),
    "lfm2": FamilyModel("lfm2", "Lfm2Config", LLAMA | dict(layer_types=["conv", "full_attention"]), served=False),
    "lfm2-moe": FamilyModel(
        "lfm2_moe",
        "Lfm2MoeConfig",
        LLAMA | FINE | dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
        served=False,
    ),
    "hunyuan": FamilyModel("hunyuan_v1_dense", "HunYuanDenseV1Config", HEAD32),
    "hunyuan-moe": FamilyModel(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        HEAD32 | dict(num_experts=4, moe_topk=2, moe_intermediate_size=[48, 48]),
    ),
    "ernie4.5": FamilyModel("ernie4_5", "Ernie4_5Config", HEAD32),
    "ernie4.5-moe": FamilyModel(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        LLAMA
        | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=48)
        | dict(moe_num_shared_experts=1, moe_layer_start_index=1),
    ),
    "seed-oss": FamilyModel("seed_oss", "SeedOssConfig", HEAD32),
    "apertus": FamilyModel("apertus", "ApertusConfig", HEAD32),
    "arcee": FamilyModel("arcee", "ArceeConfig", HEAD32),
    "helium": FamilyModel("helium", "HeliumConfig", HEAD16),
    "jetmoe": FamilyModel(
        "jetmoe",
        "JetMoeConfig",
        TOKENS
        | dict(hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16, num_local_experts=4)
        | dict(num_experts_per_tok=2, intermediate_size=96, max_position_embeddings=128),
    ),
}


def family_model(name: str) -> transformers.PreTrainedModel:
    """Return a random float32 model whose logits differ, biases and sinks being no zeros."""
    model = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, model.config)(**model.settings)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif key.endswith(("bias", "sinks")):
                parameter.normal_(std=0.3)
    return made
