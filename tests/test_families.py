"""Every decoder family that docs/models.md names: planes against plain torch, decode steps, export, serving."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import anybits
from anybits import AnybitsError, Recipe
from anybits.integrations import exporting
from anybits.integrations import transformers as hf
from anybits.integrations.quantizing import quantize_model
from anybits.quantize.blocks import block_arguments
from anybits.quantize.source import Source
from anybits.serve.engine import Engine, Limits
from anybits.serve.sampling import Sampling
from anybits.serve.sequence import Fixed, Sequence
from conftest import tiny_tokenizer
from families import MODELS, family_model

PRECISIONS, GROUP, NEW = (2, 3), 32, 6
TEXT = ["the quick brown fox jumps over the lazy dog 0123456 " * 20]
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
GREEDY = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
PROMPT = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(3))


def dequantized(tensors: dict[str, torch.Tensor], name: str, precision: int, columns: int) -> torch.Tensor:
    """Return `[N, K]` by the formulas of docs/format.md, column by column, without anybits."""
    words = tensors[f"{name}.planes"][:precision].long()
    bits = torch.stack([words[..., k // 32] >> (k % 32) & 1 for k in range(columns)], dim=-1)
    if f"{name}.centroids_{precision}" in tensors:
        code = sum(bits[i] << (precision - 1 - i) for i in range(precision))
        return tensors[f"{name}.centroids_{precision}"].float().gather(1, code)
    scales = tensors[f"{name}.scales_{precision}"].float()
    group = torch.arange(columns) // GROUP
    return ((2 * bits - 1) * scales[:, :, group]).sum(0) + tensors[f"{name}.offsets_{precision}"].float()[:, group]


def reference(source: Path, quantized: Path, precision: int) -> tuple[nn.Module, list[str]]:
    """Return the float model with dequantized levels in the place of what is quantized, and the names of that."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(quantized.glob("*.safetensors")):
        tensors |= load_file(file)
    names = [name.removesuffix(".planes") for name in tensors if name.endswith(".planes")]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        parameter = parameters.get(f"{name}.weight", parameters.get(name))
        rows = tensors[f"{name}.planes"].shape[1] // (len(parameter) if parameter.ndim == 3 else 1)
        turned = _turned(model, name)
        columns = parameter.shape[-2 if turned else -1]
        dense = dequantized(tensors, name, precision, columns).view(*parameter.shape[:-2], rows, columns)
        parameter.data.copy_(dense.mT if turned else dense)
    return model, names


def _turned(model: nn.Module, name: str) -> bool:
    """Return whether a parameter is `[K, N]`: Conv1D, and the experts of gpt-oss and Llama 4."""
    held = (
        model.get_submodule(name) if f"{name}.weight" in dict(model.named_parameters(remove_duplicate=False)) else None
    )
    if held is not None:
        return type(held).__name__ == "Conv1D"
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ in ("GptOssExperts", "Llama4TextExperts")


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(params=MODELS, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family's name, its float model on disk and what `quantize` made of it."""
    made = tmp_path_factory.mktemp(request.param)
    family_model(request.param).save_pretrained(made / "float", max_shard_size="200KB")
    quantize_model(str(made / "float"), made / "planes", Recipe(preset="fast", precisions=PRECISIONS, group_size=GROUP))
    return request.param, made / "float", made / "planes"


def test_planes_are_what_their_formulas_say(family: tuple[str, Path, Path]) -> None:
    """Logits, decode steps and the exported model agree with plain torch, in float32 up to the kernels' own error."""
    name, source, planes = family
    wanted, quantized = reference(source, planes, 3)
    model = hf.load_model(planes, dtype=torch.float32).eval()
    with torch.no_grad(), anybits.precision(3):
        assert distance(model(PROMPT).logits, wanted(PROMPT).logits) < 1e-3
        assert torch.equal(model.generate(PROMPT, **GREEDY), wanted.generate(PROMPT, **GREEDY))
    exporting.make_dense(model, 3)
    dense = model.state_dict()
    assert all(torch.equal(dense[key], value) for key, value in wanted.state_dict().items())
    assert not any(part in ("router", "gate", "shared_expert_gate") for key in quantized for part in key.split("."))
    if name.endswith("vision"):
        assert all("language_model" in key for key in quantized)


def test_bfloat16_steps_are_as_near_to_the_truth_as_those_of_transformers(family: tuple[str, Path, Path]) -> None:
    """The modules that were replaced by kernels of a decode step compute what theirs did."""
    _, source, planes = family
    wanted, _ = reference(source, planes, 3)
    model = hf.load_model(planes, dtype=torch.bfloat16).eval()
    with torch.no_grad(), anybits.precision(3):
        exact = steps(wanted)
        ours, theirs = steps(model), steps(wanted.bfloat16())
    # Position by position, since rounding may send a token to another expert; then all that follows differs.
    errors = [[distance(found[:, i], exact[:, i]) for i in range(exact.shape[1])] for found in (ours, theirs)]
    assert sorted(errors[0])[len(errors[0]) // 3] < 1.6 * sorted(errors[1])[len(errors[1]) // 3] + 0.01


def steps(model: nn.Module) -> torch.Tensor:
    """Return the logits of PROMPT, its last positions one at a time."""
    parts, cache = [], {}
    for first, last in [(0, 5), *((i, i + 1) for i in range(5, PROMPT.shape[1]))]:
        out = model(PROMPT[:, first:last], use_cache=True, **cache)
        key = "past_key_values" if hasattr(out, "past_key_values") else "cache_params"
        cache = {key: getattr(out, key)}
        parts.append(out.logits.float())
    return torch.cat(parts, dim=1)


def test_serving_gives_the_tokens_of_generate_or_says_why_not(family: tuple[str, Path, Path]) -> None:
    """Two requests at two precisions in one batch."""
    name, _, planes = family
    model = hf.load_model(planes, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = {p: model.generate(PROMPT, precision=p, **GREEDY)[0].tolist() for p in PRECISIONS}
    limits = Limits(max_model_len=32, kv_cache_bytes=1e6)
    if not MODELS[name].served:
        with pytest.raises(AnybitsError, match=r"served$"):
            Engine(model, limits)
        return
    engine = Engine(model, limits)
    made = {p: Sequence(PROMPT[0].tolist(), NEW, Fixed(p), Sampling(temperature=0.0)) for p in PRECISIONS}
    for sequence in made.values():
        engine.add(sequence)
    while not engine.idle:
        engine.step()
        assert not engine.failed
    assert {p: sequence.tokens for p, sequence in made.items()} == wanted


@pytest.mark.parametrize("name", MODELS)
def test_text_runs_through_the_blocks_or_quantize_says_why_not(name: str) -> None:
    """What calibration takes for granted holds, or it refuses."""
    source = Source(family_model(name))
    if MODELS[name].calibrated:
        assert source.shared() is None
        arguments = block_arguments(source.model, source.blocks, PROMPT)
        assert len(arguments) == len(source.blocks)
    else:
        with pytest.raises(AnybitsError, match="use preset fast"):
            block_arguments(source.model, source.blocks, PROMPT)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("gpt2", "anybcq"),
        ("gpt-oss", "any-precision"),
        ("llama4", "any-precision"),
        ("jamba", "anybcq"),
    ],
)
def test_calibrated_planes_are_nearer_than_those_from_weights_alone(name: str, method: str, tmp_path: Path) -> None:
    """Levels that follow the data belong to the right rows, whatever axis the parameter has them on."""
    family_model(name).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    settings = dict(method=method, precisions=PRECISIONS, samples=6, seq_len=32)
    if method == "anybcq":
        settings["group_size"] = GROUP
    float_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    ids = torch.tensor(tiny_tokenizer()(TEXT[0][:40])["input_ids"])[None]
    apart = {}
    for preset in ("fast", "default"):
        text = None if preset == "fast" else TEXT
        quantize_model(str(tmp_path / "float"), tmp_path / preset, Recipe(preset=preset, **settings), text)
        wanted, _ = reference(tmp_path / "float", tmp_path / preset, 3)
        model = hf.load_model(tmp_path / preset, dtype=torch.float32).eval()
        with torch.no_grad(), anybits.precision(3):
            logits = model(ids).logits
            assert distance(logits, wanted(ids).logits) < 2e-3
            apart[preset] = distance(logits, float_model(ids).logits)
    assert apart["default"] < apart["fast"]


def test_a_model_that_is_no_causal_one_is_refused_with_what_to_do(tmp_path: Path) -> None:
    transformers.Qwen3VLConfig().save_pretrained(tmp_path / "float")
    with pytest.raises(AnybitsError, match="qwen3_vl is another kind of model"):
        quantize_model(str(tmp_path / "float"), tmp_path / "planes", Recipe(preset="fast", precisions=PRECISIONS))


def test_the_page_names_these_families() -> None:
    """Row by row: model type, presets that read text, serve."""
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    stated = {
        kind: (calibrated.strip() == "yes", served.strip() == "yes")
        for kinds, calibrated, served in rows
        for kind in re.findall(r"`(\w+)`", kinds)
    }
    tested: dict[str, tuple[bool, bool]] = {}
    for model in MODELS.values():
        assert tested.setdefault(model.model_type, (model.calibrated, model.served)) == (model.calibrated, model.served)
    assert stated == tested
