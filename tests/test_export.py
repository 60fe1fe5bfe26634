"""A dense export is an ordinary model: it loads without anybits and has the quantized model's logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import anybits
from anybits import AnybitsError, Recipe
from anybits.integrations.exporting import export_model
from conftest import save_tiny
from test_cli import run

# The CPU kernel is about 1e-4 from float32 products (docs/kernels.md), torch's about 1e-7; in 16 bits the dense
# matrix is rounded once more, by 2**-9 (bfloat16) or 2**-12 (float16) of each weight, which the layers add up.
TOLERANCE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.08}


def quantized(folder: Path, architecture: str, method: str = "anybcq") -> Path:
    save_tiny(folder / "float", architecture)
    recipe = Recipe(method=method, preset="fast", group_size=32, precisions=(2, 4))
    anybits.quantize(str(folder / "float"), folder / "any", recipe)
    return folder / "any"


@pytest.mark.parametrize("architecture", ["llama", "llama-tied-bias", "gemma2", "opt", "qwen3-moe"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_equal_the_quantized_model(tmp_path: Path, architecture: str, dtype: str) -> None:
    folder = quantized(tmp_path, architecture)
    export_model(folder, tmp_path / "dense", 2, dtype)
    ours = anybits.load(folder, dtype=getattr(torch, dtype))
    ours.set_precision(2)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == getattr(torch, dtype)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        wanted, got = ours(ids).logits.float(), dense(ids).logits.float()
    assert float((got - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_weights_are_dequantized_exactly(tmp_path: Path, method: str) -> None:
    folder = quantized(tmp_path, "llama", method)
    export_model(folder, tmp_path / "dense", 4, "float32")
    ours, dense = anybits.load(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    weight = ours.get_submodule("model.layers.1.mlp.down_proj").plane_weight
    assert torch.equal(dense.get_submodule("model.layers.1.mlp.down_proj").weight, weight.dequantize(4))


def test_loads_where_anybits_is_unknown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = quantized(tmp_path, "llama-tied-bias")
    assert run(capsys, "export", folder, "--precision", 2, "-o", tmp_path / "dense")[0] == 0
    code = (
        "import sys, transformers\n"
        f"m, info = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r}, "
        "output_loading_info=True)\n"
        "assert 'anybits' not in sys.modules and not any(info.values()), info\n"
        "assert m.lm_head.weight is m.model.embed_tokens.weight\n"
        f"transformers.AutoTokenizer.from_pretrained({str(tmp_path / 'dense')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    folder = quantized(tmp_path, "llama")
    for precision, dtype, out in ((3, "bfloat16", "dense"), (2, "int8", "dense"), (2, "bfloat16", "any")):
        with pytest.raises(AnybitsError):
            export_model(folder, tmp_path / out, precision, dtype)
