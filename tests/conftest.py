"""Shared builders: random plane weights, tiny models of many architectures, and a tiny tokenizer."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

torch.set_num_threads(1)  # matrices this small are slower on many threads

from anybits import bits
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, group_count

COMMON = dict(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WITH_KV = COMMON | dict(num_key_value_heads=2, intermediate_size=96)
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, WITH_KV),
    "llama-tied-bias": (
        transformers.LlamaConfig,
        WITH_KV | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "qwen3": (transformers.Qwen3Config, WITH_KV | dict(head_dim=16)),
    "mistral": (transformers.MistralConfig, WITH_KV | dict(sliding_window=16)),
    "gemma2": (transformers.Gemma2Config, WITH_KV | dict(head_dim=16, sliding_window=16)),
    "phi3": (transformers.Phi3Config, WITH_KV),
    "opt": (transformers.OPTConfig, COMMON | dict(ffn_dim=96, word_embed_proj_dim=64)),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        WITH_KV | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Return a randomly initialised model whose weights are large enough for its logits to differ."""
    torch.manual_seed(0)
    kind, settings = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.to(dtype)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of single characters with 64 entries."""
    characters = ["<pad>", "<s>", "</s>", "<unk>"]
    characters += "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456 ."
    vocabulary = {character: index for index, character in enumerate(characters[:64])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model with its tokenizer and return the folder."""
    tiny_model(name, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def random_weight(
    out_features: int,
    in_features: int,
    precisions: tuple[int, ...],
    group_size: int | None = None,
    symmetric: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    scale_bits: int = 16,
) -> PlaneWeight:
    """Return a PlaneWeight with random planes and levels; codebook levels when group_size is None.

    dtype: of the levels, or with scale_bits 8 of the rows' steps.
    """
    g = torch.Generator().manual_seed(seed)
    top = precisions[-1]
    codes = torch.randint(0, 2**top, (out_features, in_features), generator=g, dtype=torch.uint8)
    planes = bits.codes_to_planes(codes, top)
    if group_size is None:
        centroids = {p: torch.randn(out_features, 2**p, generator=g).to(dtype) for p in precisions}
        return PlaneWeight(planes, in_features, CodebookLevels(centroids))
    groups = group_count(group_size, in_features)
    if scale_bits == 8:
        return PlaneWeight(
            planes, in_features, _in_steps(out_features, precisions, group_size, groups, symmetric, g, dtype)
        )
    scales = {p: torch.randn(p, out_features, groups, generator=g).to(dtype) for p in precisions}
    offsets = None if symmetric else {p: torch.randn(out_features, groups, generator=g).to(dtype) for p in precisions}
    return PlaneWeight(planes, in_features, AffineLevels(group_size, scales, offsets))


def _in_steps(
    rows: int,
    precisions: tuple[int, ...],
    group_size: int,
    groups: int,
    symmetric: bool,
    g: torch.Generator,
    dtype: torch.dtype,
) -> AffineLevels:
    def counts(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)

    def sizes(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, 1, generator=g) * 0.02).to(dtype)

    scales, scale_steps = {p: counts(p, rows, groups) for p in precisions}, {p: sizes(p, rows) for p in precisions}
    if symmetric:
        return AffineLevels(group_size, scales, None, scale_steps)
    offsets, offset_steps = {p: counts(rows, groups) for p in precisions}, {p: sizes(rows) for p in precisions}
    return AffineLevels(group_size, scales, offsets, scale_steps, offset_steps)
