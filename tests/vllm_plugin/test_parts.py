"""The plugin's parts by themselves: no engine is started."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

import vllm
import vllm.config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from anybits.config import StoredConfig
from anybits.errors import AnybitsError
from anybits.integrations.vllm import SUPPORTED, frontend, register, runner, unsupported_version
from anybits.integrations.vllm.config import AnybitsQuantization
from anybits.integrations.vllm.limits import check_engine
from anybits.integrations.vllm.linear import PlaneLinearMethod, Served
from anybits.integrations.vllm.options import EngineOptions, parse_precision
from anybits.integrations.vllm.rows import RowPrecisions
from anybits.integrations.vllm.shards import check_columns, select_columns, select_rows
from conftest import random_weight

STORED = StoredConfig("anybcq", (2, 3, 4), ("model.layers.*.self_attn.*", "model.layers.0.mlp.gate_proj"), 32, False)
OPTIONS = EngineOptions((2, 3, 4), 4)
ATTENTION = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
PROFILED = replace(
    STORED, profiles={"2.5": dict(zip(ATTENTION, (2, 2, 3), strict=True)), "small": dict.fromkeys(ATTENTION, 2)}
)
MIXED = EngineOptions((2, 3, 4), "small", ("2.5", "small"))


def request(precision) -> SimpleNamespace:
    extra = None if precision is None else {"precision": precision}
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))


def test_registering_twice_is_the_same_as_once():
    register()
    register()
    assert get_quantization_config("anybits") is AnybitsQuantization
    assert unsupported_version(vllm.__version__) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "dev"])
def test_another_version_is_refused_in_one_sentence(version):
    assert f"vLLM {version} is installed" in unsupported_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.dev3+g123", "0.32.0+cpu"])
def test_supported_versions(version):
    assert SUPPORTED == ((0, 32), (0, 33))
    assert unsupported_version(version) is None


def test_a_checkpoint_is_refused_outside_the_range(monkeypatch):
    from anybits.integrations.vllm import refusal

    known = {}
    monkeypatch.setattr(refusal, "QUANTIZATION_METHODS", [])
    monkeypatch.setattr(refusal, "register_quantization_config", lambda name: lambda cls: known.setdefault(name, cls))
    refusal.refuse("too old")
    with pytest.raises(AnybitsError, match="too old"):
        known["anybits"].from_config({})


@pytest.mark.parametrize(("value", "wanted"), [(3, 3), ("4", 4), (" 2 ", 2), (3.0, 3)])
def test_a_precision_is_an_int_or_its_digits(value, wanted):
    assert parse_precision(value, (2, 3, 4)) == wanted


@pytest.mark.parametrize("value", [5, "five", 2.5, "2.5", True, None, [3], {}])
def test_other_values_are_refused_with_the_choice(value):
    with pytest.raises(AnybitsError, match="choose one of 2, 3, 4"):
        parse_precision(value, (2, 3, 4))
    assert OPTIONS.in_worker({"precision": value}) == 4, "a worker must never raise"


def test_engine_options():
    assert EngineOptions.read({}, STORED) == OPTIONS
    assert EngineOptions.read({"anybits": {"max_precision": 3}}, STORED) == EngineOptions((2, 3), 3)
    assert EngineOptions.read({"anybits": {"precision": 2}, "other": 1}, STORED) == EngineOptions((2, 3, 4), 2)
    assert EngineOptions.read({"anybits": {"precision": "small"}}, PROFILED) == MIXED
    assert EngineOptions.read({"anybits": {"max_precision": 2.5}}, PROFILED) == EngineOptions(
        (2, 3), 3, ("2.5", "small")
    )
    assert EngineOptions.read({"anybits": {"max_precision": 2}}, PROFILED) == EngineOptions((2,), 2, ("small",))
    for wrong in ({"max": 3}, {"max_precision": 8}, {"max_precision": 2, "precision": 3}, 3):
        with pytest.raises(AnybitsError):
            EngineOptions.read({"anybits": wrong}, STORED)


@pytest.mark.parametrize(("value", "wanted"), [(None, 17), (3, 3), ("2.5", 16), (2.5, 16), ("2.50", 16), ("small", 17)])
def test_profiles_have_codes_of_their_own(value, wanted):
    assert MIXED.in_worker({"precision": value}) == wanted
    with pytest.raises(AnybitsError, match="choose one of 2, 2.5, 3, 4, small$"):
        MIXED.of_request({"precision": "2.7"})


def test_rows_are_filled_request_after_request_and_padded_with_the_cheapest():
    rows = RowPrecisions(OPTIONS, capacity=8)
    address = rows.buffer.data_ptr()
    assert rows.of(torch.empty(3, 1)) == 4
    rows.fill([3, 2, 4], [2, 1, 3])
    assert rows.buffer.tolist() == [3, 3, 2, 4, 4, 4, 2, 2]
    assert rows.of(torch.empty(5, 1)).tolist() == [3, 3, 2, 4, 4]
    rows.fill([3, 3], [1, 1])
    assert rows.of(torch.empty(2, 1)) == 3
    rows.fill([2, 3], [1, 9])
    assert rows.buffer.tolist() == [2, *[3] * 7]
    assert rows.of(torch.empty(9, 1)) == 4
    assert rows.buffer.data_ptr() == address


def fused(rows: RowPrecisions, profiles: list[tuple[int, ...]]) -> tuple:
    """Return a matrix of three parts of 8 rows, and how it is served."""
    weight = random_weight(24, 64, (2, 3, 4), 32)
    method = PlaneLinearMethod(PROFILED, rows, "qkv_proj", ATTENTION, capturing=False)
    method.profiles = profiles
    return weight, method._serve(weight, [8, 8, 8])


@pytest.mark.parametrize("codes", [[2, 16, 3, 17, 4], [16], [4]])
def test_parts_of_a_fused_layer_have_the_precisions_of_their_profiles(codes):
    rows, profiles = RowPrecisions(MIXED, capacity=8), [(2, 2), (2, 2), (3, 2)]
    weight, served = fused(rows, profiles)
    assert len(served.parts) == 2, "neighbours that agree stay together"
    x = torch.randn(len(codes), 64)
    rows.fill(codes, [1] * len(codes))
    y = served(x)
    for row, code in enumerate(codes):
        own = [code if code < 16 else profile[code - 16] for profile in profiles]
        matrix = torch.cat([weight.rows(8 * i, 8 * i + 8).dequantize(p) for i, p in enumerate(own)])
        torch.testing.assert_close(y[row], matrix @ x[row], rtol=1e-3, atol=1e-3)


def test_a_fused_layer_whose_parts_agree_stays_whole():
    assert isinstance(fused(RowPrecisions(MIXED, capacity=8), [(2, 2)] * 3)[1], Served)


def test_a_profile_must_name_every_matrix():
    assert tuple(PROFILED.profiles_of(ATTENTION[2]).values()) == (3, 2)
    with pytest.raises(AnybitsError, match="profile 2.5 lacks o_proj"):
        PROFILED.profiles_of("o_proj")


class State(ModelState):
    """The least that vLLM's ModelState asks for."""

    prepare_inputs_embeds = prepare_dummy_inputs = prepare_attn = None

    def prepare_inputs(self, input_batch, req_states):
        return {"own": input_batch}


def test_the_state_of_model_runner_v2(monkeypatch):
    from vllm.v1.worker.gpu import model_states

    rows, model = RowPrecisions(OPTIONS, capacity=8), torch.nn.Linear(1, 1)
    model.get_model_state_cls = lambda: State
    monkeypatch.setattr(model_states, "resolve_model_state_cls", model_states.resolve_model_state_cls)
    runner.install(use_v2_model_runner=True)
    runner.install(use_v2_model_runner=True)
    assert model_states.resolve_model_state_cls(None, model) is State, "a model without planes keeps its own"
    model.anybits_rows = rows
    made = model_states.resolve_model_state_cls(None, model)
    assert made.__mro__.count(runner.PrecisionState) == 1

    config = SimpleNamespace(
        model_config=SimpleNamespace(get_inputs_embeds_size=lambda: 1, dtype=torch.float32, max_model_len=8),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=8),
    )
    state = made(config, model, None, torch.device("cpu"))
    for slot, precision in enumerate([2, None, 3]):
        state.add_request(slot, request(precision))
    state.add_request(3, SimpleNamespace(sampling_params=None))
    batch = SimpleNamespace(
        num_reqs=3, idx_mapping_np=np.array([2, 0, 1]), query_start_loc_np=np.array([0, 1, 4, 6, 6])
    )
    assert state.prepare_inputs(batch, None) == {"own": batch}
    assert rows.buffer.tolist() == [3, 2, 2, 2, 4, 4, 2, 2]
    state.add_request(2, request(4))  # the slot is used again
    state.prepare_inputs(batch, None)
    assert rows.buffer.tolist() == [4, 2, 2, 2, 4, 4, 2, 2]


def test_what_the_hooks_reach_into_is_still_there():
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parameters = {
        GPUModelRunner._model_forward: {"self"},
        DefaultModelState.__init__: {"vllm_config", "model", "encoder_cache", "device"},
        DefaultModelState.add_request: {"req_index", "new_req_data"},
        DefaultModelState.prepare_inputs: {"input_batch", "req_states"},
        DefaultModelLoader.get_all_weights: {"model_config", "model"},
    }
    for function, names in parameters.items():
        assert names <= set(inspect.signature(function).parameters), function
    assert {"idx_mapping_np", "query_start_loc_np", "num_reqs"} <= set(InputBatch.__annotations__)
    assert {"cache_salt", "sampling_params"} <= set(EngineCoreRequest.__annotations__)


def test_cache_salts():
    assert frontend.salted(None, 3) == "anybits:3"
    salts = [frontend.salted(*asked) for asked in [(None, 2), (None, 3), (None, "2.5"), ("mine", 2), ("mine", "2.5")]]
    assert len(set(salts)) == len(salts)


def layer(kind: type) -> torch.nn.Module:
    return kind.__new__(kind)


def test_fused_layers_must_be_stored_whole():
    quantization = AnybitsQuantization(STORED)
    assert quantization._modules("model.layers.0.self_attn.qkv_proj") == ATTENTION
    assert not quantization._modules("model.layers.1.mlp.gate_up_proj")
    fused = replace(STORED, profiles={"2.5": {"model.layers.0.self_attn.qkv_proj": 3}})
    assert AnybitsQuantization(fused)._modules("model.layers.0.self_attn.qkv_proj") == [*fused.profiles["2.5"]]
    with pytest.raises(AnybitsError, match="fuses model.layers.0.mlp.gate_proj with model.layers.0.mlp.up_proj"):
        quantization.get_quant_method(layer(LinearBase), "model.layers.0.mlp.gate_up_proj")


def test_modules_are_renamed_as_the_model_renames_them():
    quantization = AnybitsQuantization(PROFILED)
    quantization.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model."}))
    assert all(target.startswith("language_model.layers.") for target in quantization.stored.targets)
    assert [*quantization.stored.profiles["2.5"]] == [name.replace("model.", "language_model.") for name in ATTENTION]


def test_a_head_of_planes_is_refused():
    quantization = AnybitsQuantization(StoredConfig("anybcq", (2,), ("lm_head",), 32, False))
    with pytest.raises(AnybitsError, match="output head must be dense"):
        quantization.get_quant_method(layer(ParallelLMHead), "lm_head")


def test_the_worker_s_buffer_stays_out_of_copies():
    quantization = AnybitsQuantization(STORED)
    quantization._rows = RowPrecisions(OPTIONS, 4)
    for copied in (pickle.loads(pickle.dumps(quantization)), copy.deepcopy(quantization)):
        assert (copied.stored, copied._rows) == (STORED, None)


def engine_config(**changes) -> SimpleNamespace:
    values = dict(load_format="auto", use_ubatching=False, pcp=1, fast_prefill=False, lora=None, draft=None) | changes
    method = values.get("method", "draft_model")
    return SimpleNamespace(
        load_config=SimpleNamespace(load_format=values["load_format"]),
        parallel_config=SimpleNamespace(
            use_ubatching=values["use_ubatching"], prefill_context_parallel_size=values["pcp"]
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=values["fast_prefill"]),
        lora_config=values["lora"],
        speculative_config=values["draft"]
        and SimpleNamespace(method=method, draft_model_config=SimpleNamespace(quantization=values["draft"])),
    )


def test_engines_that_shift_rows_are_refused():
    check_engine(engine_config())
    check_engine(engine_config(draft="fp8"))
    check_engine(engine_config(draft="anybits", method="ngram"))
    wrong = dict(load_format="tensorizer", use_ubatching=True, pcp=2, fast_prefill=True, lora=object(), draft="anybits")
    for name, value in wrong.items():
        with pytest.raises(AnybitsError, match="start vLLM without it"):
            check_engine(engine_config(**{name: value}))


@pytest.mark.parametrize("group_size", [None, 32, 64, -1])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_a_shard_has_the_columns_and_rows_of_the_whole(group_size, scale_bits):
    whole = random_weight(24, 256, (2, 3), group_size, scale_bits=scale_bits)
    rows = torch.randperm(24)[:10]
    shard = select_columns(select_rows(whole, rows), 64, 192)
    for p in (2, 3):
        assert torch.equal(shard.dequantize(p), whole.dequantize(p)[rows, 64:192])


def test_shards_that_cut_words_or_groups_are_refused():
    check_columns("x", 100, 100, 64)  # whole: may be ragged
    check_columns("x", 256, 128, 128)
    check_columns("x", 256, 32, None)
    check_columns("x", 64, 32, 128)  # one group: each shard keeps its scale
    with pytest.raises(AnybitsError, match="must be a multiple of 128 .the group size.; use fewer ranks"):
        check_columns("model.layers.0.mlp.down_proj", 384, 192, 128)
    with pytest.raises(AnybitsError, match="must be a multiple of 32 .the bits of a word."):
        check_columns("x", 96, 48, None)
