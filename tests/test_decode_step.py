"""A loaded model's decode steps: which modules take the kernels, what they compute, and the growing cache."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention

from anybits import Recipe, quantize
from anybits.integrations import decode_step
from anybits.integrations import transformers as hf
from anybits.integrations.decode_step import modules as step_modules
from anybits.integrations.decode_step.attention_layers import _Attention
from anybits.integrations.decode_step.cache import LEAST_ROOM, GrowingLayer
from anybits.integrations.decode_step.modules import DenseHead, _GatedMLP, _Norm
from anybits.kernels import step
from conftest import ARCHITECTURES, save_tiny, tiny_model

STANDARD_NORMS = {"llama", "llama-tied-bias", "qwen3", "mistral", "phi3", "qwen3-moe"}
STANDARD_MLPS = {"llama", "llama-tied-bias", "qwen3", "mistral"}


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "qwen3", "mistral", "gemma2", "phi3", "opt", "qwen3-moe"])
def test_modules_of_the_standard_formula_take_the_kernels_and_logits_stay(name: str) -> None:
    model = tiny_model(name, torch.bfloat16)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
    before = copy.deepcopy(model)
    decode_step.use_decode_step(model)
    assert any(isinstance(m, _Norm) for m in model.modules()) == (name in STANDARD_NORMS)
    assert any(isinstance(m, _GatedMLP) for m in model.modules()) == (name in STANDARD_MLPS)
    assert type(model.get_output_embeddings()) is DenseHead
    assert list(model.state_dict()) == list(before.state_dict())
    tokens = torch.randint(3, 64, (2, 21), generator=torch.Generator().manual_seed(1))
    found = []
    for each in (model, before):
        cache = DynamicCache(config=each.config)
        with torch.no_grad():
            each(input_ids=tokens[:, :-1], past_key_values=cache)
            found.append(each(input_ids=tokens[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_other_formulas_under_a_norms_name_are_left_alone() -> None:
    class ShiftedRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (x.float().pow(2).mean(-1, keepdim=True) + self.eps).rsqrt().to(x.dtype) * (1 + self.weight)

    class LargerRMSNorm(ShiftedRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.float().pow(2).sum(-1, keepdim=True) + self.eps).sqrt().to(x.dtype) * self.weight

    model = torch.nn.Sequential(ShiftedRMSNorm(), LargerRMSNorm())
    torch.nn.init.normal_(model[1].weight)
    step_modules.use_step_modules(model)
    assert [type(m) for m in model] == [ShiftedRMSNorm, LargerRMSNorm]


def test_training_and_other_dtypes_run_as_before() -> None:
    model = tiny_model("llama", torch.bfloat16)
    before = copy.deepcopy(model)
    decode_step.use_decode_step(model)
    tokens = torch.tensor([[5, 6, 7]])
    for each in (model, before):
        each(input_ids=tokens, labels=tokens).loss.backward()
    assert torch.equal(model.model.norm.weight.grad, before.model.norm.weight.grad)
    with torch.no_grad():
        assert torch.equal(model.float()(tokens).logits, before.float()(tokens).logits)


def test_copies_and_saved_models_are_whole(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "float", "llama")
    quantize(str(source), tmp_path / "any", Recipe(preset="fast", group_size=32, precisions=(2, 3)))
    model = hf.load_model(tmp_path / "any", dtype=torch.bfloat16)
    assert isinstance(model.model.norm, _Norm)
    assert type(model.lm_head) is DenseHead
    twin = copy.deepcopy(model)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = model(tokens).logits
        twin.model.norm.weight.mul_(2)
        assert not torch.equal(twin(tokens).logits, wanted)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(hf.load_model(tmp_path / "again", dtype=torch.bfloat16)(tokens).logits, wanted)


def new(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, count, 4), torch.randn(2, 3, count, 5)


def test_growing_layer_holds_what_transformers_own_holds() -> None:
    torch.manual_seed(0)
    grown, plain = GrowingLayer(), DynamicLayer()
    for turn in range(400):
        added = new(int(torch.randint(1, 4, ())) if turn else 150)
        for got, wanted in zip(grown.update(*added), plain.update(*added), strict=True):
            assert torch.equal(got, wanted)
        kind = turn % 11
        for layer in (grown, plain):
            if kind == 3:
                layer.crop(-2)
            elif kind == 7:
                layer.reorder_cache(torch.tensor([1, 0]))
            elif kind == 9:
                layer.batch_select_indices(torch.tensor([1, 1]))
        assert grown.get_seq_length() == plain.get_seq_length()
    for layer in (grown, plain):
        layer.reset()
    assert torch.equal(grown.update(*new(2))[0][..., :0], plain.update(*new(2))[0][..., :0])


def test_growing_layer_keeps_its_memory_while_it_has_room() -> None:
    layer = GrowingLayer()
    layer.update(*new(10))
    at = layer.keys.data_ptr()
    for _ in range(LEAST_ROOM):
        layer.update(*new(1))
    assert layer.keys.data_ptr() == at
    layer.update(*new(1))
    assert layer.keys.data_ptr() != at
    assert layer.keys.shape[2] == 10 + LEAST_ROOM + 1


def test_copies_of_a_growing_layer_do_not_share() -> None:
    layer = GrowingLayer()
    layer.update(*new(10))
    for made in (copy.copy(layer), copy.deepcopy(layer)):
        kept = made.keys.clone()
        layer.crop(-1)
        layer.update(*new(1))
        made.update(*new(1))
        assert torch.equal(made.keys[:, :, :10], kept)


def test_growing_layer_under_autograd_and_after_inference_mode() -> None:
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*new(3))
    layer.update(*new(1))
    keys, values = new(1)
    layer.update(keys.requires_grad_(), values)[0].sum().backward()
    layer.update(*new(1))
    assert layer.keys.shape[2] == 6
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_only_plain_layers_of_a_plain_cache_grow_in_place() -> None:
    model = tiny_model("mistral", torch.bfloat16)
    decode_step.use_decode_step(model)
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6]])).past_key_values
        kinds = [type(layer) for layer in cache.layers]
        model(torch.tensor([[7]]), past_key_values=cache)
        assert [type(layer) for layer in cache.layers] == kinds  # they slide
        other = tiny_model("llama", torch.bfloat16)
        decode_step.use_decode_step(other)
        cache = other(torch.tensor([[5, 6]])).past_key_values
        other(torch.tensor([[7]]), past_key_values=cache)
        assert {type(layer) for layer in cache.layers} == {GrowingLayer}
        assert hf.can_be_shortened(cache)


WIDER = {"hidden_size": 128, "head_dim": 32}
STANDARD_ATTENTION = {"llama", "llama-tied-bias", "qwen3", "mistral", "qwen3-moe"}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_attention_as_llamas_takes_the_kernel_and_gives_the_same(name: str) -> None:
    kind, settings = ARCHITECTURES[name]
    extra = {"hidden_size": 128} if name in ("opt", "phi3") else WIDER
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings | extra)).eval().to(torch.bfloat16)
    before = copy.deepcopy(model)
    decode_step.use_decode_step(model)
    assert any(isinstance(m, _Attention) for m in model.modules()) == (name in STANDARD_ATTENTION)
    tokens = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(tokens)
    found = []
    for each in (model, before):
        for mask in (None, seen.index_fill(1, torch.tensor([0, 1]), 0)):  # with padding it runs as before
            cache, logits = DynamicCache(config=each.config), []
            with torch.no_grad():
                for part in (tokens[:, :20], *tokens[:, 20:].split(1, dim=1)):
                    so_far = None if mask is None else mask[:, : cache.get_seq_length() + part.shape[1]]
                    logits.append(each(input_ids=part, attention_mask=so_far, past_key_values=cache).logits[:, -1])
            found.append(torch.stack(logits))
    for got, wanted in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_attention_of_other_kinds_is_left_alone() -> None:
    class Capped(LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            out, weights = super().forward(hidden_states, **kwargs)
            return out.tanh(), weights

    kind, settings = ARCHITECTURES["llama"]
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings | WIDER)).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Capped
    decode_step.use_decode_step(model)
    assert {type(layer.self_attn) for layer in model.model.layers} == {Capped}


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_modules_are_found_where_a_gpu_is_and_the_cpus_kernels_are_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured step on a GPU has kernels of its own, built or not what a CPU needs, and with or without AMX in it."""
    kind, settings = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings | WIDER)).eval().to(torch.bfloat16)
    before = copy.deepcopy(model)
    monkeypatch.setattr(step, "isa_number", lambda: None)
    monkeypatch.setattr(step_modules, "_gated", {})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    decode_step.use_decode_step(model)
    assert model.config._attn_implementation == "sdpa"
    for kinds, cls in ((STANDARD_NORMS, _Norm), (STANDARD_MLPS, _GatedMLP), (STANDARD_ATTENTION, _Attention)):
        assert any(isinstance(module, cls) for module in model.modules()) == (name in kinds), cls
    tokens = torch.randint(3, 64, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before(tokens).logits)
