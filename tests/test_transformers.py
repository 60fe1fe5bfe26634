"""The life of a model: quantize, save, load, run at each precision, for every architecture listed in the README."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import anybits
from anybits import AnybitsError, Recipe
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.integrations.quantizing import quantize_model
from anybits.linear import PlaneLinear
from conftest import ARCHITECTURES, save_tiny

TOKENS = torch.tensor([[5, 9, 33, 7, 12, 40, 8, 21]])
FAST = Recipe(preset="fast", group_size=32, precisions=(2, 3, 4))
TEXT = ["the quick brown fox jumps over the lazy dog 0123456 " * 20]


def logits(model: torch.nn.Module, p: int) -> torch.Tensor:
    with torch.no_grad(), anybits.precision(p):
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A tiny Llama quantized without calibration text."""
    out = tmp_path_factory.mktemp("quantized") / "llama-any"
    quantize_model(str(llama_folder), out, FAST)
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_through(tmp_path: Path, architecture: str) -> None:
    source = save_tiny(tmp_path / "float", architecture)
    quantize_model(str(source), tmp_path / "any", FAST)
    model = hf.load_model(tmp_path / "any")
    modules = hf.plane_modules(model)
    assert modules
    original = hf.load_float_model(str(source))
    swapping.run_experts_eagerly(original)
    # The float model with dequantized weights put in by hand is what the quantized model must compute.
    with torch.no_grad():
        for name, module in modules.items():
            holder = original.get_submodule(name) if isinstance(module, PlaneLinear) else None
            parameter = holder.weight if holder is not None else original.get_parameter(name)
            parameter.copy_(module.plane_weight.dequantize(4).view(parameter.shape))
    with torch.no_grad():
        expected = original(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(model, 4), expected, rtol=1e-3, atol=1e-3)
    for p in (2, 3, 4):
        generated = model.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False, precision=p)
        assert generated.shape[1] > TOKENS.shape[1]
    assert not torch.equal(logits(model, 2), logits(model, 4))
    model.save_pretrained(tmp_path / "again")
    again = hf.load_model(tmp_path / "again")
    assert torch.equal(logits(again, 4), logits(model, 4))


@pytest.mark.parametrize("architecture", ["llama-tied-bias", "qwen3-moe"])
def test_scales_in_8_bits_live_as_long(tmp_path: Path, architecture: str) -> None:
    source = save_tiny(tmp_path / "float", architecture)
    recipe = replace(FAST, scale_bits=8)
    stored = quantize_model(str(source), tmp_path / "any", recipe)
    assert (stored.scale_bits, stored.format_version) == (8, 2)
    model = hf.load_model(tmp_path / "any", dtype=torch.bfloat16)
    for module in hf.plane_modules(model).values():
        kinds = {name.rpartition("_")[0]: t.dtype for name, t in module.plane_weight.tensors().items() if "_" in name}
        assert kinds["scales"] == kinds["offsets"] == torch.int8
        assert kinds["scale_steps"] == kinds["offset_steps"] == torch.float16
    quantize_model(str(source), tmp_path / "wide", replace(recipe, scale_bits=16))
    wide = hf.load_model(tmp_path / "wide", dtype=torch.bfloat16)
    for p in (2, 3, 4):
        one, other = logits(model, p).float(), logits(wide, p).float()
        assert (one - other).norm() < 0.1 * other.norm()
    model.save_pretrained(tmp_path / "again")
    again = hf.load_model(tmp_path / "again", max_precision=3, dtype=torch.bfloat16)
    assert again.precisions == (2, 3)
    assert torch.equal(logits(again, 3), logits(model, 3))


def test_logits_before_saving_equal_those_after_loading(tmp_path: Path, llama_folder: Path, quantized: Path) -> None:
    """The weights in memory when the checkpoint is written, put into the float model, against a fresh load."""
    loaded = hf.load_model(quantized)
    weights = {name: module.plane_weight for name, module in hf.plane_modules(loaded).items()}
    in_memory = hf.load_float_model(str(llama_folder))
    hf.make_planes(in_memory, weights, loaded.config.quantization_config.stored)
    for p in (2, 3, 4):
        assert torch.equal(logits(in_memory, p), logits(loaded, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_loaded_models_agree_to_the_bit(tmp_path: Path, quantized: Path, dtype: torch.dtype) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    for p in (2, 3, 4):
        assert torch.equal(logits(model, p), logits(again, p))
    for name, module in hf.plane_modules(model).items():
        for key, tensor in module.plane_weight.tensors().items():
            other = hf.plane_modules(again)[name].plane_weight.tensors()[key]
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other)


def test_three_ways_to_choose_a_precision(quantized: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized)
    assert model.precisions == (2, 3, 4)
    at_4 = model(input_ids=TOKENS).logits  # the highest stored, unless told otherwise
    assert torch.equal(at_4, logits(model, 4))
    at_2 = logits(model, 2)
    model.set_precision(2)
    assert torch.equal(model(input_ids=TOKENS).logits, at_2)
    assert torch.equal(logits(model, 4), at_4)  # a scope wins
    out = model.generate(input_ids=TOKENS, max_new_tokens=5, do_sample=False, precision=4)
    with anybits.precision(4):
        assert torch.equal(model.generate(input_ids=TOKENS, max_new_tokens=5, do_sample=False), out)


def test_a_batch_may_mix_precisions(quantized: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized)
    batch = TOKENS.repeat(3, 1)
    mixed = model.generate(input_ids=batch, max_new_tokens=6, do_sample=False, precision=[4, 2, 3])
    for row, p in enumerate((4, 2, 3)):
        alone = model.generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False, precision=p)
        length = alone.shape[1]
        assert torch.equal(mixed[row, :length], alone[0])


@pytest.mark.parametrize("bad", [5, 1, [2, 5, 3]])
def test_precisions_that_are_not_stored_are_refused(quantized: Path, bad: object) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized)
    with pytest.raises(AnybitsError, match="is not stored: choose one of 2, 3, 4"):
        model.generate(input_ids=TOKENS.repeat(3, 1), max_new_tokens=2, precision=bad)
    with pytest.raises(AnybitsError, match="is not stored"):
        model.set_precision(bad)


def test_a_maximum_precision_loads_fewer_bytes(tmp_path: Path, quantized: Path) -> None:
    whole, small = hf.load_model(quantized), hf.load_model(quantized, max_precision=2)
    assert small.precisions == (2,)
    assert small.anybits_bytes_read < whole.anybits_bytes_read
    assert torch.equal(logits(small, 2), logits(whole, 2))
    with pytest.raises(AnybitsError, match="precision 3 is not stored"):
        logits(small, 3)
    small.save_pretrained(tmp_path)
    again = hf.load_model(tmp_path)
    assert again.precisions == (2,)
    assert torch.equal(logits(again, 2), logits(whole, 2))
    with pytest.raises(AnybitsError, match="precision 6 is not stored: choose one of 2, 3, 4"):
        hf.load_model(quantized, max_precision=6)


def test_a_load_without_anybits_fails_loudly(quantized: Path) -> None:
    import subprocess
    import sys

    code = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(quantized)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr.lower()


def test_the_same_command_writes_the_same_bytes(tmp_path: Path, llama_folder: Path) -> None:
    for method in ("anybcq", "any-precision"):
        recipe = Recipe(method=method, group_size=32, samples=4, seq_len=32)
        folders = [tmp_path / f"{method}-{i}" / "same" for i in range(2)]
        for folder in folders:
            quantize_model(str(llama_folder), folder, recipe, TEXT)
        for path in sorted(folders[0].iterdir()):
            assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_block_reconstruction_brings_the_model_closer(tmp_path: Path, llama_folder: Path, method: str) -> None:
    original = hf.load_float_model(str(llama_folder))
    with torch.no_grad():
        wanted = original(input_ids=TOKENS).logits
    errors = {}
    for preset, steps in (("default", 0), ("best", 60)):
        # From the published codes: data-aware ones leave it little to do with as few tokens as these.
        small = {
            "group_size": 32,
            "samples": 8,
            "seq_len": 32,
            "learning_rate": 1e-3,
            "data_aware": None,
            "distillation_steps": 0,
        }
        recipe = Recipe(method=method, preset=preset, steps=steps, **small)
        quantize_model(str(llama_folder), tmp_path / preset, recipe, TEXT)
        model = hf.load_model(tmp_path / preset)
        errors[preset] = [float((logits(model, p) - wanted).square().mean()) for p in (2, 3, 4)]
    assert sum(errors["best"]) < sum(errors["default"])


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, llama_folder: Path) -> None:
    recipe = Recipe(preset="best", group_size=32, samples=4, seq_len=32, steps=3, distillation_steps=2)
    quantize_model(str(llama_folder), tmp_path / "whole", recipe, TEXT)

    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        raise Stop

    from anybits.quantize.pipeline import Progress

    with pytest.raises(Stop):
        quantize_model(str(llama_folder), tmp_path / "cut", recipe, TEXT, progress=Progress(block_done=stop))
    assert not (tmp_path / "cut" / "config.json").exists()
    with pytest.raises(AnybitsError, match="unfinished run with another model, data, settings or version"):
        quantize_model(str(llama_folder), tmp_path / "cut", Recipe(preset="fast"), None)
    reports = []
    quantize_model(str(llama_folder), tmp_path / "cut", recipe, TEXT, progress=Progress(block_done=reports.append))
    assert [report.resumed for report in reports] == [True, False]
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def test_text_ends_where_the_context_does(
    quantized: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = hf.load_model(quantized), hf.load_tokenizer(quantized)
    prompt = len(tokenizer("abc")["input_ids"])
    monkeypatch.setattr(model.config, "max_position_embeddings", prompt + 4)
    assert hf.generate_text(model, tokenizer, "abc", 100)[1] <= 4
    assert f"4 new tokens at most: the model's context ends at {prompt + 4} tokens" in caplog.text
    monkeypatch.setattr(model.config, "max_position_embeddings", prompt)
    with pytest.raises(AnybitsError, match=f"the prompt has {prompt} tokens, and the model's context {prompt}"):
        hf.generate_text(model, tokenizer, "abc", 1)


def test_a_damaged_source_gets_one_sentence(tmp_path: Path, llama_folder: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AnybitsError, match="cut cannot be loaded as a causal language model"):
        quantize_model(str(tmp_path / "cut"), tmp_path / "out", FAST)


def test_a_default_without_its_dataset_says_what_to_give(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(AnybitsError, match="give a text file with --calibration, or choose --preset fast"):
        quantize_model(str(llama_folder), tmp_path / "out", Recipe())


def test_bad_sources_get_one_sentence(tmp_path: Path, llama_folder: Path, quantized: Path) -> None:
    def quantize(source: Path, out: str = "o", recipe: Recipe = FAST, text: list[str] | None = None) -> object:
        return lambda: quantize_model(str(source), tmp_path / out, recipe, text)

    cases = {
        "does not exist: give a model's folder": quantize(tmp_path / "none"),
        "already holds a model": lambda: quantize_model(str(llama_folder), quantized, FAST),
        "is quantized already": quantize(quantized),
        "cannot be read|pip install": quantize(llama_folder, recipe=Recipe()),
        "fewer than one calibration window": quantize(llama_folder, recipe=Recipe(), text=["ab"]),
        "uses no calibration text": quantize(llama_folder, text=TEXT),
        "neither a model folder nor": lambda: hf.load_model(tmp_path / "o2"),
        "no config.json": lambda: hf.load_model(tmp_path),
        "is not quantized": lambda: hf.load_model(llama_folder),
    }
    for message, call in cases.items():
        with pytest.raises(AnybitsError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_gives_no_model(tmp_path: Path, quantized: Path) -> None:
    shutil.copytree(quantized, tmp_path / "bad")
    path = tmp_path / "bad" / "model-block-00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(AnybitsError, match="truncated or corrupted"):
        hf.load_model(tmp_path / "bad")
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(AnybitsError, match="corrupted"):
        hf.load_model(tmp_path / "bad")
    path.write_bytes(good)
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config["quantization_config"]["targets"] = ["other.*"]
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnybitsError, match="none of the checkpoint's quantized modules"):
        hf.load_model(tmp_path / "bad")
