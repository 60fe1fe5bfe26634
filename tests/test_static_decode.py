"""Decoding in a static cache is token for token what it is in a cache that grows; nothing is captured on a CPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import anybits
from anybits import AnybitsError, Recipe
from anybits.integrations import transformers as hf
from anybits.integrations.quantizing import quantize_model
from anybits.integrations.static_decode import StaticDecoder
from anybits.integrations.static_decode import cache as static
from anybits.integrations.static_decode.generation import first_positions
from anybits.kernels import step
from anybits.kernels.cuda import step as small
from anybits.kernels.reference import ReferenceBackend
from anybits.precision import ModelPrecision
from anybits.weight import PlaneWeight
from conftest import ARCHITECTURES as ARCHITECTURE_SETTINGS
from conftest import save_tiny, tiny_model, tiny_tokenizer

ARCHITECTURES = ["llama", "llama-tied-bias", "qwen3", "mistral", "gemma2", "phi3"]
NO_END = {"eos_token_id": None, "pad_token_id": 0}
MIXED = [4, 2, 3]


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    """The CPU kernels round activations, and so make 1e-3 of what the order of a sum in attention leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYBITS_BACKEND", "reference")
        yield


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    """Tiny models with precisions 2 to 4; windows are 16 positions, which every text here leaves behind."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "float", request.param)
    method = "any-precision" if request.param == "qwen3" else "anybcq"
    recipe = Recipe(method=method, preset="fast", group_size=32, precisions=(2, 3, 4))
    quantize_model(str(folder / "float"), folder / "any", recipe)
    return hf.load_model(folder / "any", dtype=torch.float32)


def prompt(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Prompts of several lengths with padding at the left."""
    ids, mask = prompt(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("length", [5, 23])
def test_greedy_tokens_are_those_of_a_growing_cache(model: transformers.PreTrainedModel, length: int) -> None:
    for precision, batch in ((2, 1), (4, 3), (MIXED, 3)):
        settings = {"input_ids": prompt(batch, length), "max_new_tokens": 20, "precision": precision} | NO_END
        grown = model.generate(**settings, do_sample=False)
        assert torch.equal(model.generate(**settings, do_sample=False, static_cache=True), grown)


def test_padded_prompts_each_at_its_own_precision(model: transformers.PreTrainedModel) -> None:
    settings = padded([20, 3, 11]) | {"max_new_tokens": 20, "do_sample": False, "precision": MIXED} | NO_END
    assert torch.equal(model.generate(**settings, static_cache=True), model.generate(**settings))


def test_sampled_tokens_are_those_of_a_growing_cache(model: transformers.PreTrainedModel) -> None:
    settings = {"input_ids": prompt(3, 7), "max_new_tokens": 25, "do_sample": True, "precision": MIXED} | NO_END
    settings |= {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.2}
    found = []
    for chosen in (False, True):
        torch.manual_seed(3)
        found.append(model.generate(**settings, static_cache=chosen))
    assert torch.equal(*found)


def grown_steps(model: transformers.PreTrainedModel, ids: torch.Tensor, wanted: list) -> torch.Tensor:
    """Logits `[B, steps, V]` of steps at the precisions `wanted`, each in transformers' own growing cache."""
    cache = transformers.DynamicCache(config=model.config)
    before = ids.shape[1] - len(wanted)
    with torch.no_grad(), anybits.precision(3):
        model(input_ids=ids[:, :before], past_key_values=cache, use_cache=True)
    rows = []
    for at, precision in enumerate(wanted, before):
        with torch.no_grad(), anybits.precision(precision):
            rows.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(rows, dim=1)


@pytest.fixture(autouse=True)
def no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybits.integrations.static_decode.decoder.new_pool", lambda device: None)


def decoder_behind(model: transformers.PreTrainedModel, ids: torch.Tensor, capacity: int, **more) -> StaticDecoder:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), anybits.precision(3):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return StaticDecoder(model, ModelPrecision(4, (2, 3, 4)), cache, capacity, **more)


def test_another_precision_at_every_token_and_row(model: transformers.PreTrainedModel) -> None:
    ids = prompt(3, 50)
    codes = [torch.tensor([2 + (i + r) % 3 for r in range(3)], dtype=torch.int32) for i in range(20)]
    for wanted in ([2 + i % 3 for i in range(20)], codes, [codes[0], 3, codes[1], 2, 4] * 4):
        logits = grown_steps(model, ids, wanted)
        decoder = decoder_behind(model, ids[:, :30], 56)
        found = torch.cat([decoder.forward(ids[:, 30 + i : 31 + i], p) for i, p in enumerate(wanted)], dim=1)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), logits.argmax(-1))


def test_several_rows_at_once_and_rows_that_are_dropped(model: transformers.PreTrainedModel) -> None:
    """What drafts do: rows of a few positions, of which some are taken back, behind a window that is long full."""
    ids = prompt(2, 60)
    logits = grown_steps(model, ids, [3] * 30)
    decoder = decoder_behind(model, ids[:, :30], 64)
    for at, rows, dropped in ((30, 1, 0), (31, 4, 2), (33, 7, 7), (33, 8, 1), (40, 1, 0), (41, 8, 0)):
        assert decoder.length == at
        tokens = ids[:, at : at + rows].clone()
        tokens[:, rows - dropped :] = 5  # what is taken back was another token
        found = decoder.forward(tokens, 3)
        kept = slice(at - 30, at - 30 + rows - dropped)
        torch.testing.assert_close(found[:, : rows - dropped], logits[:, kept], rtol=1e-4, atol=1e-4)
        decoder.drop(dropped)


def test_a_step_reads_only_memory_that_stays(model: transformers.PreTrainedModel) -> None:
    """A graph replays addresses: the inputs, the slots' keys and values are the same tensors at every step."""
    decoder = decoder_behind(model, prompt(2, 30), 64)
    seen = set()
    for precision in (2, torch.tensor([3, 4], dtype=torch.int32), 4):
        decoder.forward(prompt(2, 1), precision)
        tensors = [decoder._position, decoder._first, decoder._inputs[1].tokens, decoder._inputs[1].codes]
        tensors += [t for layer in decoder.cache.layers for t in (layer.keys, layer.values)]
        seen.add(tuple(t.data_ptr() for t in tensors))
    assert len(seen) == 1
    assert len(decoder._graphs) == 1  # one for all precisions


class Recorded(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the operators of one run, run again on the tensors that they had."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.operators: list[tuple] = []
        with self:
            self.result = run()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert "_local_scalar_dense" not in str(function), "a number was asked for: a GPU would wait, a capture fail"
        self.operators.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        for function, args, kwargs, result in self.operators:
            if any(r.alias_info is not None for r in function._schema.returns):
                if function._schema.is_mutable:
                    function(*args, **kwargs)
                continue  # a view of memory that is written elsewhere
            again = function(*args, **kwargs)
            pairs = zip(result, again, strict=True) if isinstance(result, tuple | list) else [(result, again)]
            for old, new in pairs:
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
        return self.result


def test_a_recorded_step_replays_at_any_position_and_precision(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture's contract without a GPU: nothing in a step depends on Python, nothing asks for a number."""

    def matmul(self, x: torch.Tensor, weight: PlaneWeight, rows: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(x.shape[0], weight.out_features)
        for p in weight.precisions:
            y = torch.where((rows == p)[:, None], x @ weight.dequantize(p).t(), y)
        return y

    ids = prompt(2, 60)
    mixed = torch.tensor([2, 4], dtype=torch.int32)
    wanted = [3, 2, mixed, 4, 3, mixed.flip(0), 2] * 4  # far past the window of 16 positions
    logits = grown_steps(model, ids[:, :48], wanted)
    decoder = decoder_behind(model, ids[:, :20], 64, capture=True)
    monkeypatch.setattr(ReferenceBackend, "matmul", matmul)
    made = []

    def graph(step: Callable[[], torch.Tensor], *_: object) -> Recorded:
        made.append(Recorded(step))
        return made[-1]

    monkeypatch.setattr("anybits.integrations.static_decode.decoder.Graph", graph)
    found = [decoder.forward(ids[:, 20 + i : 21 + i], p) for i, p in enumerate(wanted)]
    torch.testing.assert_close(torch.cat(found, dim=1), logits, rtol=1e-4, atol=1e-4)
    assert len(made) == 1


def test_own_graphs_are_made_for_each_precision_once(model: transformers.PreTrainedModel) -> None:
    ids = prompt(1, 40)
    decoder = decoder_behind(model, ids[:, :30], 40, own_graphs=True)
    wanted = [2, 3, 2, 4, torch.tensor([3], dtype=torch.int32), 3, 2]
    found = torch.cat([decoder.forward(ids[:, 30 + i : 31 + i], p) for i, p in enumerate(wanted)], dim=1)
    torch.testing.assert_close(found, grown_steps(model, ids[:, :37], wanted), rtol=1e-4, atol=1e-4)
    assert set(decoder._graphs) == {(1, 2), (1, 3), (1, 4), (1, None)}


@pytest.mark.parametrize("amx", [False, True])
def test_small_kernels_take_their_places_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    """On a GPU norms, gated activations and rotations run as one kernel each; here torch stands in for them."""
    calls = Counter()

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        calls["norm"] += 1
        return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        calls["gated"] += 1
        return torch.nn.functional.silu(gate) * up

    def rotate_into(new, angles, cache, slots) -> torch.Tensor:
        calls["rotary"] += 1
        dim = cache[0].shape[3]
        query, key, value = (t.view(*t.shape[:2], -1, dim).transpose(1, 2) for t in new)
        query, key = apply_rotary_pos_emb(query, key, *angles)
        cache[0].index_copy_(2, slots, key), cache[1].index_copy_(2, slots, value)
        return query

    torch.manual_seed(1)
    settings = ARCHITECTURE_SETTINGS["qwen3"][1] | {"head_dim": 32}
    transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**settings)).save_pretrained(tmp_path / "f")
    tiny_tokenizer().save_pretrained(tmp_path / "f")
    recipe = Recipe(preset="fast", group_size=32, precisions=(2, 3, 4))
    quantize_model(str(tmp_path / "f"), tmp_path / "any", recipe)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    model = hf.load_model(tmp_path / "any", dtype=torch.bfloat16)
    monkeypatch.setattr(step, "usable", lambda *tensors: False)
    for name, function in {"rms_norm": rms_norm, "silu_mul": silu_mul, "rotate_into": rotate_into}.items():
        monkeypatch.setattr(small, name, function)
    ids = prompt(2, 30)
    logits = grown_steps(model, ids, [3, 2, 4])
    for fused in (False, True):
        monkeypatch.setattr(small, "usable", lambda *tensors, fused=fused: fused and small._on.get())
        decoder = decoder_behind(model, ids[:, :27], 32)
        calls.clear()
        found = [decoder.forward(ids[:, 27 + i : 28 + i], p) for i, p in enumerate((3, 2, 4))]
        torch.testing.assert_close(torch.cat(found, dim=1), logits.float(), rtol=0.05, atol=0.05)
        layers, steps = 2, 4  # the first step runs once more, to compare
        wanted = {"norm": (4 * layers + 1) * steps, "gated": layers * steps, "rotary": layers * steps}
        assert dict(calls) == (wanted if fused else {})


@pytest.mark.parametrize("mutates", [False, True])
def test_projections_share_launches_unless_the_model_changes_what_they_get(
    llama: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, mutates: bool
) -> None:
    calls = []

    def products(self, x: torch.Tensor, weights: list, precision: torch.Tensor) -> list[torch.Tensor]:
        calls.append(len(weights))
        return [self.matmul(x, weight, precision) for weight in weights]

    monkeypatch.setattr(ReferenceBackend, "products", products, raising=False)

    def double(module: torch.nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
        args[0].mul_(2)

    changed = [layer.mlp.gate_proj for layer in llama.model.layers] if mutates else []
    handles = [module.register_forward_hook(double) for module in changed]
    try:
        ids = prompt(2, 30)
        logits = grown_steps(llama, ids, [2, 3])
        calls.clear()
        decoder = decoder_behind(llama, ids[:, :28], 64)
        found = torch.cat([decoder.forward(ids[:, 28 + i : 29 + i], p) for i, p in enumerate((2, 3))], dim=1)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert decoder._fused is not mutates
    assert calls == [3, 2] * 2 * (1 if mutates else 3)  # the step that is compared, then both steps


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny(folder / "float", "llama")
    quantize_model(str(folder / "float"), folder / "any", Recipe(preset="fast", group_size=32, precisions=(2, 3, 4)))
    return hf.load_model(folder / "any", dtype=torch.float32)


@pytest.mark.parametrize("draft", [{"draft_precision": 2, "draft_tokens": 4}, {"draft_precision": 3}])
def test_drafts_in_a_static_cache(llama: transformers.PreTrainedModel, draft: dict) -> None:
    for seed in range(2):
        settings = {"input_ids": prompt(1, 9, seed=seed), "max_new_tokens": 30, "do_sample": False} | NO_END
        assert torch.equal(
            llama.generate(**settings, precision=4, **draft, static_cache=True), llama.generate(**settings, precision=4)
        )


def test_schedules_in_a_static_cache(llama: transformers.PreTrainedModel) -> None:
    for schedule in ("split:4,2", "length:4,3@5,2@20", "entropy:2,3@1.5,4@2.5"):
        settings = {"input_ids": prompt(1, 9), "max_new_tokens": 30, "do_sample": False, "schedule": schedule} | NO_END
        assert torch.equal(llama.generate(**settings, static_cache=True), llama.generate(**settings))


def test_ends_streams_and_criteria_are_those_of_plain_generation(llama: transformers.PreTrainedModel) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.seen.append(tokens.clone())

        def end(self) -> None:
            self.seen.append(torch.tensor([]))

    plain = llama.generate(prompt(1, 8), max_new_tokens=20, do_sample=False, precision=4, **NO_END)
    for end in plain[0, 9:14].tolist():
        found = []
        for chosen in (False, True):
            streamer = Streamer()
            settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
            ids = llama.generate(prompt(1, 8), precision=4, streamer=streamer, static_cache=chosen, **settings)
            found.append((ids.tolist(), [tokens.tolist() for tokens in streamer.seen]))
            batch = llama.generate(prompt(3, 8), precision=4, static_cache=chosen, **settings)
            found[-1] += (batch.tolist(),)
        assert found[0] == found[1]
    out = llama.generate(
        prompt(1, 8), max_new_tokens=3, do_sample=False, static_cache=True, return_dict_in_generate=True, **NO_END
    )
    assert out.sequences.shape == (1, 11)
    assert out.past_key_values is None


def test_a_decoder_is_kept_for_the_next_call_of_like_size(
    llama: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    build = static.build
    monkeypatch.setattr("anybits.integrations.static_decode.decoder.build", lambda *a: made.append(a[1]) or build(*a))

    def run(batch: int, length: int, new: int) -> None:
        settings = {"input_ids": prompt(batch, length, seed=length), "max_new_tokens": new} | NO_END
        settings |= {"do_sample": False, "precision": 3}
        assert torch.equal(llama.generate(**settings, static_cache=True), llama.generate(**settings))

    with torch.inference_mode():  # memory made here must also serve outside
        run(4, 70, 16)
    run(4, 100, 20)
    assert made == [128]
    run(2, 70, 16)  # another batch
    run(2, 5, 5)  # much shorter: attention would go through 128 slots for 10 positions
    assert made == [128, 128, 64]
    llama.to(torch.float32)  # nothing moves, but products are prepared anew
    run(2, 5, 5)
    assert made == [128, 128, 64, 64]


def test_what_cannot_be_static_is_named(llama: transformers.PreTrainedModel, tmp_path: Path) -> None:
    settings = {"input_ids": prompt(2, 6), "max_new_tokens": 4, "static_cache": True} | NO_END
    for more, said in (
        ({"num_beams": 2}, "runs one beam"),
        ({"output_scores": True, "return_dict_in_generate": True}, "returns tokens only"),
        ({"use_cache": False}, "leave use_cache on"),
        ({"attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]])}, "padded at the left"),
        ({"precision": [2, 3, 4]}, "3 entries"),
    ):
        with pytest.raises(AnybitsError, match=said):
            llama.generate(**settings | more)
    decoder = decoder_behind(llama, prompt(1, 6), 8)
    decoder.forward(prompt(1, 2), 3)
    with pytest.raises(AnybitsError, match="1 tokens do not fit behind 8 in a static cache of 8"):
        decoder.forward(prompt(1, 1), 3)
    with pytest.raises(AnybitsError, match="9 positions do not fit"):
        decoder_behind(llama, prompt(1, 9), 8)
    for name, said in (("qwen3-moe", "fused experts choose their matrices"), ("opt", "asks the cache for its length")):
        save_tiny(tmp_path / name, name)
        recipe = Recipe(preset="fast", group_size=32, precisions=(2, 3))
        quantize_model(str(tmp_path / name), tmp_path / f"{name}-any", recipe)
        with pytest.raises(AnybitsError, match=said):
            hf.load_model(tmp_path / f"{name}-any").generate(**settings)
    other = tiny_model("llama")
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AnybitsError, match="not flash_attention_2"):
        decoder_behind(llama, prompt(1, 6), 8).__class__(other, None, transformers.DynamicCache(), 8)


def test_first_positions() -> None:
    assert first_positions(None) is None
    assert first_positions(torch.tensor([[0, 0, 1], [1, 1, 1]])).tolist() == [2, 0]
