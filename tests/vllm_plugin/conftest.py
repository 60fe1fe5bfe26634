"""Checkpoints, engines and the transformers path that vLLM is held to. vLLM is imported by the tests that use it."""

from __future__ import annotations

import os

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
)

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import anybits
from anybits import checkpoint
from anybits.config import Single, StoredConfig
from anybits.integrations import transformers as hf
from conftest import random_weight, tiny_tokenizer

TOKENS = 12
SERVED = (2, "2.5", 3, 4, 5)
"""Precisions and the profile of the checkpoints `llama` and `moe`."""

SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA = transformers.LlamaConfig(
    **SIZES, intermediate_size=128, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
)
QWEN = transformers.Qwen3Config(**SIZES, intermediate_size=96, tie_word_embeddings=False)
MOE = transformers.Qwen3MoeConfig(
    **SIZES, intermediate_size=128, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
)


def float_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Return a random model whose weights and biases are large enough for its logits to differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(std=0.15)
    return model


def checkpoint_of(config: transformers.PretrainedConfig, folder: Path) -> Path:
    float_model(config).save_pretrained(folder / "float")
    tiny_tokenizer().save_pretrained(folder / "float")
    recipe = anybits.Recipe(preset="fast", group_size=32, precisions=(2, 3, 4, 5))
    anybits.quantize(str(folder / "float"), folder / "planes", recipe)
    add_profile(folder / "planes")
    return folder / "planes"


def add_profile(folder: Path) -> None:
    """Store the profile 2.5: one precision for all of layer 0, and in layer 1 another for each neighbour."""
    stored = checkpoint.read_stored_config(folder)
    modules = checkpoint.CheckpointReader(checkpoint.checkpoint_files(folder), stored).modules()
    profile = {module: 3 if ".0." in module else 2 + i % 4 for i, module in enumerate(sorted(modules))}
    checkpoint.update_stored_config(folder, replace(stored, profiles={"2.5": profile}))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AnyBCQ, biases, tied embeddings, precisions 2 to 5 and a profile."""
    return checkpoint_of(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AnyBCQ, fused experts, precisions 2 to 5 and a profile."""
    return checkpoint_of(MOE, tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Any-Precision with bfloat16 centroids, precisions 3 to 6, some layers left as they are."""
    folder, model, weights = tmp_path_factory.mktemp("codebooks"), float_model(QWEN), {}
    targets = [f"model.layers.*.self_attn.{part}_proj" for part in "qkvo"] + ["model.layers.1.mlp.*"]
    stored = StoredConfig("any-precision", (3, 4, 5, 6), tuple(targets))
    for name, module in model.named_modules():
        if stored.is_target(name) and isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
            weights[name] = random_weight(*shape, (3, 4, 5, 6), seed=len(weights), dtype=torch.bfloat16)
    hf.make_planes(model, weights, stored)
    model.save_pretrained(folder)
    config = hf.plain_config(model) | {"quantization_config": stored.to_dict()}
    checkpoint.write_json(folder / "config.json", config)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Return random prompts as token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 64) for _ in range(rng.randint(3, longest))] for _ in range(count)]


@cache
def _transformers(folder: Path) -> Any:
    return hf.load_model(folder, dtype=torch.float32)


def _generated(folder: Path, prompt: Sequence[int], precision: Single) -> Any:
    ids = torch.tensor([list(prompt)])
    settings = dict(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return _transformers(folder).generate(
        ids, precision=precision, return_dict_in_generate=True, output_scores=True, **settings
    )


@pytest.fixture(scope="session")
def expected() -> Callable[[Path, Sequence[int], Single], list[int]]:
    """(folder, prompt, precision) -> the greedy tokens of transformers' own generate."""
    return lambda folder, prompt, precision: _generated(folder, prompt, precision).sequences[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def margin() -> Callable[[Path, Sequence[int], Single], float]:
    """(folder, prompt, precision) -> the least distance of the two best logits along those tokens.

    The kernels' error in fp32 is 1e-4: below that, two engines that add in other orders may each choose another token.
    """

    def least(folder: Path, prompt: Sequence[int], precision: Single) -> float:
        scores = torch.cat(_generated(folder, prompt, precision).scores)
        best = scores.topk(2).values
        return float((best[:, 0] - best[:, 1]).min())

    return least


def mixed(count: int, seed: int, longest: int = 40) -> list[tuple[list[int], Single]]:
    """Return random prompts, each with one of what `llama` and `moe` serve."""
    return [(prompt, SERVED[i % len(SERVED)]) for i, prompt in enumerate(prompts(count, longest, seed))]


def engine_arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """Return LLM's arguments for a small engine."""
    small = dict(dtype="float32", max_model_len=192, max_num_seqs=8, block_size=32, enforce_eager=True)
    return small | dict(model=str(folder), disable_log_stats=False) | options


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """Start vLLM in this process and shut it down at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**engine_arguments(folder, distributed_executor_backend="uni", **options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def generate(llm: Any, asked: Sequence[tuple[list[int], Single | None]]) -> list[Any]:
    """Generate greedily for (prompt, precision or None) pairs in one batch; return vLLM's outputs."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=None if p is None else {"precision": p}
        )
        for _, p in asked
    ]
    return llm.generate([{"prompt_token_ids": prompt} for prompt, _ in asked], params, use_tqdm=False)


def answer(output: Any) -> list[int]:
    """Return the generated tokens of one output."""
    return list(output.outputs[0].token_ids)
