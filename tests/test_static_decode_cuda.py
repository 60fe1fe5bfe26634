"""Captured decode steps on a real GPU: the bits of the same steps uncaptured, and nothing that waits in between."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import anybits
from anybits import AnybitsError, Recipe
from anybits.integrations import transformers as hf
from anybits.integrations.quantizing import quantize_model
from anybits.integrations.static_decode import StaticDecoder
from anybits.integrations.static_decode.capture import Graph
from anybits.kernels.cuda import step as small
from anybits.kernels.cuda import toolchain
from anybits.precision import ModelPrecision
from conftest import ARCHITECTURES, save_tiny, tiny_tokenizer


def reason() -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is here"
    return toolchain.unsupported(torch.cuda.get_device_capability())


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason() is not None, reason=f"CUDA graphs: {reason()}")]
NO_END = {"eos_token_id": None, "pad_token_id": 0}
DEFAULT = ModelPrecision(4, (2, 3, 4))


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "float", request.param)
    method = "any-precision" if request.param == "qwen3" else "anybcq"
    quantize_model(
        str(folder / "float"),
        folder / "any",
        Recipe(method=method, preset="fast", group_size=32, precisions=(2, 3, 4)),
    )
    return hf.load_model(folder / "any", dtype=torch.float32).to("cuda")


def prompt(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1)).cuda()


def decoder(model: transformers.PreTrainedModel, ids: torch.Tensor, **more) -> StaticDecoder:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), anybits.precision(3):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return StaticDecoder(model, DEFAULT, cache, 64, **more)


def test_replays_have_the_bits_of_uncaptured_steps(model: transformers.PreTrainedModel) -> None:
    ids = prompt(2, 60)
    mixed = torch.tensor([2, 4], dtype=torch.int32, device="cuda")
    for own in (False, True):
        captured = decoder(model, ids[:, :12], own_graphs=own)
        plain = decoder(model, ids[:, :12], own_graphs=own, capture=False)
        for at, precision in enumerate([2, 3, mixed, 4, 2, mixed, 3] * 6, 12):  # past a window of 16
            tokens = ids[:, at : at + 1]
            assert torch.equal(captured.forward(tokens, precision), plain.forward(tokens, precision)), (at, precision)
    found = captured.forward(ids[:, 54:58], 3)
    captured.drop(2)
    assert torch.equal(found, plain.forward(ids[:, 54:58], 3))


def test_switching_captures_nothing_and_waits_for_nothing(model: transformers.PreTrainedModel) -> None:
    ids = prompt(2, 40)
    mixed = [torch.tensor(p, dtype=torch.int32, device="cuda") for p in ([2, 4], [3, 3], [4, 2])]
    run = decoder(model, ids[:, :12])
    run.forward(ids[:, 12:13], 2)
    graph = run._graphs[1, None]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at, precision in enumerate((3, mixed[0], 4, 2, mixed[1], mixed[2], 3), 13):
            run.forward(ids[:, at : at + 1], precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run._graphs == {(1, None): graph}


def test_generated_tokens_are_those_of_a_growing_cache(model: transformers.PreTrainedModel) -> None:
    ids = prompt(3, 20)
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    for precision in (2, [4, 2, 3]):
        for length in (30, 25):  # the second time with the first one's graphs
            settings = {"max_new_tokens": length, "do_sample": False, "precision": precision} | NO_END
            grown = model.generate(ids, attention_mask=mask, **settings)
            assert torch.equal(model.generate(ids, attention_mask=mask, **settings, static_cache=True), grown)
    settings = {"max_new_tokens": 30, "do_sample": False, "schedule": "entropy:2,4@1.5"} | NO_END
    assert torch.equal(model.generate(ids[:1], **settings, static_cache=True), model.generate(ids[:1], **settings))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fused_steps_are_plain_ones_up_to_rounding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = kind(**settings | {"head_dim": 32})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    quantize_model(
        str(tmp_path / "float"), tmp_path / "any", Recipe(preset="fast", group_size=32, precisions=(2, 3, 4))
    )
    loaded = hf.load_model(tmp_path / "any", dtype=torch.bfloat16).to("cuda")
    ids, calls = prompt(2, 30), []
    run = small._run
    monkeypatch.setattr(small, "_run", lambda launch, *rest: calls.append(launch.kernel.source) or run(launch, *rest))
    fused, plain = decoder(loaded, ids[:, :20]), decoder(loaded, ids[:, :20])
    plain._fused = False
    for at, precision in enumerate((2, 3, 4, 2), 20):
        a, b = (one.forward(ids[:, at : at + 1], precision) for one in (fused, plain))
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert set(calls) == {"norm.cu", "gated.cu", "rotary.cu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_kernels(dtype: torch.dtype) -> None:
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 2e-3}
    x = torch.randn(3, 4096, device="cuda").to(dtype)
    norm = LlamaRMSNorm(4096, eps=1e-5).to("cuda", dtype)
    with torch.no_grad():
        torch.testing.assert_close(small.rms_norm(x, norm.weight, 1e-5), norm(x), **close)
        up = torch.randn_like(x)
        torch.testing.assert_close(small.silu_mul(x, up), torch.nn.functional.silu(x) * up, **close)
        new = [torch.randn(2, 3, heads * 128, device="cuda").to(dtype) for heads in (8, 2, 2)]
        turns = torch.rand(1, 3, 64, device="cuda").repeat(1, 1, 2) * 6
        cos, sin, slots = turns.cos().to(dtype), turns.sin().to(dtype), torch.tensor([5, 6, 0], device="cuda")
        keys, values = (torch.zeros(2, 2, 16, 128, device="cuda", dtype=dtype) for _ in range(2))
        rotated = small.rotate_into(tuple(new), (cos, sin), (keys, values), slots)
        query, key, value = (t.view(2, 3, -1, 128).transpose(1, 2) for t in new)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        torch.testing.assert_close(rotated, query, **close)
        torch.testing.assert_close(keys[:, :, slots], key, **close)
        assert torch.equal(values[:, :, slots], value)


def test_a_step_that_cannot_be_captured_is_named(tmp_path: Path) -> None:
    waits = torch.ones(3, device="cuda")

    def step() -> torch.Tensor:
        return waits * float(waits.sum())  # asks the GPU for a number

    with pytest.raises(AnybitsError, match="cannot be captured in a CUDA graph"):
        Graph(step, torch.device("cuda", 0), torch.cuda.graph_pool_handle())
