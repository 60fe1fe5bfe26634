"""Decoder layers in one call: the same bits as their parts, and the parts wherever somebody changed or watches one."""

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import anybits
from anybits import AnybitsError
from anybits.integrations import decode_step
from anybits.integrations.decode_step.layers import _Layer
from anybits.kernels import cpu, layer, native, step
from anybits.linear import PlaneLinear
from anybits.precision import ModelPrecision
from conftest import ARCHITECTURES, random_weight

LIBRARY = native.library()
ISAS = [name for i, name in enumerate(native.ISAS) if LIBRARY is not None and LIBRARY.isa_usable(i)]
WIDER = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 272, "vocab_size": 64}
KINDS = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied-bias": ("llama-tied-bias", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "mistral": ("mistral", {"sliding_window": None}),
}
MIXED = {"q_proj": 3, "k_proj": 2, "v_proj": 3, "o_proj": 2, "gate_proj": 3, "up_proj": 2, "down_proj": 3}


def planes(like: torch.nn.Linear, group: int | None, default: ModelPrecision, seed: int) -> PlaneLinear:
    weight = random_weight(like.out_features, like.in_features, (2, 3), group, seed=seed)
    made = PlaneLinear(like.in_features, like.out_features, group, default, like.bias is not None, torch.bfloat16)
    levels = weight.levels.tensors(3)
    size = 0.2 / like.in_features**0.5 / float(next(iter(levels.values())).float().std())
    for name, tensor in weight.tensors().items():
        if name != "planes" and tensor.is_floating_point():
            tensor.mul_(size)
    made.set_plane_weight(weight)
    if like.bias is not None:
        made.bias.data = (torch.randn(like.out_features) * 0.3).bfloat16()
    return made


def model_of(name: str, group: int | None = 32, **changed: Any) -> Any:
    """Return a model of random planes and one whose layers call their parts, over the same parameters."""
    base, settings = KINDS[name]
    kind, others = ARCHITECTURES[base]
    torch.manual_seed(0)
    config = kind(**others | WIDER | settings | changed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)
    default = ModelPrecision(3, (2, 3))
    for seed, one in enumerate(model.model.layers):
        for parent in (one.self_attn, one.mlp):
            for child, module in list(parent.named_children()):
                if type(module) is torch.nn.Linear:
                    setattr(parent, child, planes(module, group, default, seed))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
    decode_step.use_decode_step(model)
    parts = copy.deepcopy(model)
    for one in parts.model.layers:
        if isinstance(one, _Layer):
            one.__class__ = type(one).__mro__[2]
    return model, parts


def decoded(model: Any, tokens: torch.Tensor, prompt: int, **arguments: Any) -> torch.Tensor:
    """Return logits of a prompt and then one token at a time, and at last all keys."""
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in (tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)):
            logits.append(model(input_ids=part, past_key_values=cache, **arguments).logits[:, -1])
    kept = [tensor.flatten() for one in cache.layers for tensor in (one.keys, one.values)]
    return torch.cat([*(one.flatten() for one in logits), *kept])


def tokens(batch: int, count: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, count), generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the kernel."""
    made: list[int] = []
    real = layer.run
    monkeypatch.setattr(layer, "run", lambda *a: made.append(a[1].shape[0]) or real(*a))
    return made


@pytest.mark.parametrize("batch", [1, 3, 11])
@pytest.mark.parametrize("group", [32, None], ids=["affine", "codebook"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_same_bits_as_the_parts(name: str, group: int | None, batch: int, calls: list[int]) -> None:
    model, parts = model_of(name, group)
    ids = tokens(batch, 12)
    for p in (2, 3):
        calls.clear()
        with anybits.precision(p):
            assert torch.equal(decoded(model, ids, 4), decoded(parts, ids, 4))
        assert calls == [batch] * (8 * len(model.model.layers))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_on_any_threads_and_instruction_set(
    isa: str, threads: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    monkeypatch.setenv("ANYBITS_CPU_ISA", isa)
    step.isa_number.cache_clear()
    before = torch.get_num_threads()
    try:
        for group, batch in ((32, 1), (None, 2), (128, 5)):
            model, parts = model_of("qwen3", group, intermediate_size=400)
            torch.set_num_threads(1)
            wanted = decoded(parts, tokens(batch, 7), 3)
            torch.set_num_threads(threads)
            assert torch.equal(decoded(model, tokens(batch, 7), 3), wanted)
        assert len(calls) == 3 * 4 * 2
    finally:
        torch.set_num_threads(before)
        step.isa_number.cache_clear()


@pytest.mark.parametrize("group", [32, None], ids=["affine", "codebook"])
def test_the_same_bits_with_activations_in_8_bits(
    group: int | None, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    monkeypatch.setattr(cpu, "_activation_bits_by_environment", lambda: 8)
    model, parts = model_of("llama", group)
    for batch in (1, 3, 11):
        assert torch.equal(decoded(model, tokens(batch, 6), 3), decoded(parts, tokens(batch, 6), 3))
    assert len(calls) == 3 * 3 * 2


def test_long_contexts_and_caches_that_are_changed(calls: list[int]) -> None:
    model, parts = model_of("llama", max_position_embeddings=1024)
    ids, found = tokens(2, 500), []
    for each in (model, parts):
        cache, logits = DynamicCache(config=each.config), []
        with torch.no_grad():
            each(input_ids=ids[:, :150], past_key_values=cache)
            for turn, part in enumerate(ids[:, 150:].split(1, dim=1)):
                logits.append(each(input_ids=part, past_key_values=cache).logits)
                if turn % 50 == 20:
                    cache.crop(-3)
                elif turn % 50 == 30:
                    cache.reorder_cache(torch.tensor([1, 0]))
                elif turn % 50 == 40:
                    cache = copy.deepcopy(cache) if turn % 100 == 40 else cache
        found.append(torch.stack(logits))
    assert torch.equal(*found)
    assert len(calls) == 2 * 350


def test_precisions_of_scopes_profiles_and_rows(calls: list[int]) -> None:
    model, parts = model_of("llama")
    for each in (model, parts):
        for one in each.model.layers:
            for parent in (one.self_attn, one.mlp):
                for child, module in parent.named_children():
                    if isinstance(module, PlaneLinear):
                        module.profiles = {"2.5": MIXED[child]}
    ids = tokens(2, 6)
    at_three = decoded(model, ids, 3)
    assert calls == [2] * 6
    with anybits.precision("2.5"):
        mixed = decoded(model, ids, 3)
        assert torch.equal(mixed, decoded(parts, ids, 3))
    assert calls == [2] * 12
    assert not torch.equal(mixed, at_three)
    rows = torch.tensor([2, 3], dtype=torch.int32)
    with anybits.precision(rows):
        assert torch.equal(decoded(model, ids, 3), decoded(parts, ids, 3))
    assert calls == [2] * 12
    with anybits.precision(4), pytest.raises(AnybitsError, match="4"):
        decoded(model, ids, 3)


def scaled_by_hook(module: Any, args: Any, output: Any) -> Any:
    return output * 2 if isinstance(output, torch.Tensor) else (output[0] * 2, *output[1:])


@pytest.mark.parametrize(
    "watched", ["self_attn", "mlp", "input_layernorm", "self_attn.k_proj", "mlp.act_fn", "mlp.down_proj"]
)
def test_hooks_of_parts_are_called(watched: str, calls: list[int]) -> None:
    model, parts = model_of("llama")
    ids = tokens(1, 6)
    plain = decoded(model, ids, 3)
    handles = [
        each.model.layers[0].get_submodule(watched).register_forward_hook(scaled_by_hook) for each in (model, parts)
    ]
    calls.clear()
    hooked = decoded(model, ids, 3)
    assert torch.equal(hooked, decoded(parts, ids, 3))
    assert not torch.equal(hooked, plain)
    assert len(calls) == 3  # the other layer's
    for handle in handles:
        handle.remove()
    assert torch.equal(decoded(model, ids, 3), plain)
    seen: list[Any] = []
    handle = model.model.layers[0].get_submodule(watched).register_forward_pre_hook(lambda m, a: seen.append(m))
    assert torch.equal(decoded(model, ids, 3), plain)
    handle.remove()
    assert len(seen) == 4


def test_hooks_of_every_module_and_of_the_layer_itself(calls: list[int]) -> None:
    model, _ = model_of("llama")
    ids, seen = tokens(1, 6), []
    plain = decoded(model, ids, 3)
    calls.clear()
    handle = model.model.layers[0].register_forward_hook(lambda m, a, y: seen.append(y))
    assert torch.equal(decoded(model, ids, 3), plain)
    handle.remove()
    assert (len(seen), len(calls)) == (4, 6)  # it sees the layer's output, whoever computes it
    calls.clear()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: None)
    assert torch.equal(decoded(model, ids, 3), plain)
    handle.remove()
    assert not calls


def test_parts_that_are_exchanged_or_changed(calls: list[int]) -> None:
    model, parts = model_of("llama")
    ids = tokens(1, 6)
    decoded(model, ids, 3)

    class Twice(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 2

    def changed(change: Any, expected: int) -> None:
        before = decoded(model, ids, 3)
        for each in (model, parts):
            change(each.model.layers[0])
        calls.clear()
        after = decoded(model, ids, 3)
        assert torch.equal(after, decoded(parts, ids, 3))
        assert not torch.equal(after, before)
        assert len(calls) == expected

    def other_weight(one: Any) -> None:
        new = random_weight(one.mlp.up_proj.out_features, 128, (2, 3), 32, seed=9)
        one.mlp.up_proj.set_plane_weight(new)

    def other_forward(one: Any) -> None:
        real = one.self_attn.o_proj.forward
        one.self_attn.o_proj.forward = lambda x: real(x) + 1

    with torch.no_grad():
        changed(lambda one: one.input_layernorm.weight.mul_(1.5), 6)
        changed(lambda one: setattr(one.input_layernorm.weight, "data", one.input_layernorm.weight.data * 2), 6)
        changed(lambda one: setattr(one.input_layernorm, "weight", torch.nn.Parameter(torch.ones(128).bfloat16())), 6)
        changed(other_weight, 6)
        changed(lambda one: setattr(one.self_attn, "scaling", 0.5), 6)
        changed(other_forward, 3)
        changed(lambda one: setattr(one.mlp, "gate_proj", Twice(one.mlp.gate_proj)), 3)


def test_masks_captured_outputs_training_and_many_rows(calls: list[int]) -> None:
    model, parts = model_of("llama")
    ids = tokens(2, 6)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    for start in (1, 0):  # the first position unseen, then none
        mask[:, 0] = 1 - start
        found = []
        for each in (model, parts):
            cache = DynamicCache(config=each.config)
            with torch.no_grad():
                each(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
                found.append(each(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache).logits)
        assert torch.equal(*found)
        assert len(calls) == (0 if start else 2)
    calls.clear()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5]).past_key_values
        states = model(input_ids=ids[:, 5:], past_key_values=cache, output_hidden_states=True).hidden_states
    assert (len(states), len(calls)) == (3, 2)
    assert torch.equal(decoded(model, ids, 5), decoded(parts, ids, 5))  # its hooks stay, and do nothing
    calls.clear()
    many = tokens(12, 5)
    assert torch.equal(decoded(model, many, 4), decoded(parts, many, 4))
    model.train()
    decoded(model, ids, 4)
    model.eval()
    cache = DynamicCache(config=model.config)
    for part in (ids[:1, :3], ids[:1, 3:4]):
        model(input_ids=part, past_key_values=cache).logits.sum().item()  # with autograd
    assert not calls


def test_layers_of_another_formula_are_left_alone() -> None:
    class Scaled(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return super().forward(hidden_states, **kwargs) * 0.5

    model, _ = model_of("llama")
    for one in model.model.layers:
        one.__class__ = Scaled
    decode_step.use_decode_step(model)
    assert {type(one) for one in model.model.layers} == {Scaled}
    kind, settings = ARCHITECTURES["gemma2"]
    gemma = transformers.AutoModelForCausalLM.from_config(kind(**settings | WIDER)).eval().to(torch.bfloat16)
    before = copy.deepcopy(gemma)
    decode_step.use_decode_step(gemma)
    assert not any(isinstance(module, _Layer) for module in gemma.modules())
    torch.testing.assert_close(decoded(gemma, tokens(1, 6), 3), decoded(before, tokens(1, 6), 3), rtol=0.05, atol=0.05)


def test_copies_have_plans_of_their_own() -> None:
    model, parts = model_of("llama")
    ids = tokens(1, 6)
    wanted = decoded(model, ids, 3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(0.5), twin.model.layers[0].input_layernorm.weight.mul_(2)
        parts.model.norm.weight.mul_(0.5), parts.model.layers[0].input_layernorm.weight.mul_(2)
    assert torch.equal(decoded(model, ids, 3), wanted)
    assert torch.equal(decoded(twin, ids, 3), decoded(parts, ids, 3))
    with torch.inference_mode():
        assert torch.equal(decoded(model, ids, 3), wanted)


def test_what_does_not_fit_is_refused() -> None:
    x, angles = torch.zeros(1, 1, 64).bfloat16(), (torch.zeros(1, 1, 32).bfloat16(),) * 2
    with pytest.raises(ValueError, match="a layer has"):
        layer.run(b"short", x, angles, 1, (0,) * 8)
    empty = bytes(layer._LAYER.size)
    with pytest.raises(AnybitsError, match="refused their arguments"):
        layer.run(empty, x, angles, 1, (x.data_ptr(), x.data_ptr(), 1, 1, 1, 1, 1, 1))
