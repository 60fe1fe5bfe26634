"""The bundled model: what its training record states holds, and the demo's claims hold on a part of the text."""

import ast
import json
from pathlib import Path

import pytest
import torch

from anybits import Recipe
from anybits.demo import CALIBRATION, HELD_OUT, MODEL
from anybits.demo.run import PROMPT
from anybits.evaluate.evaluation import evaluate
from anybits.integrations import transformers as hf
from anybits.integrations.quantizing import quantize_model


def test_the_model_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 20e6
    record = json.loads((MODEL / "training.json").read_text())
    assert record["held_out_perplexity"] < 20


def test_held_out_text_was_kept_apart() -> None:
    def lines(path: Path) -> set[str]:
        return {line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 60}

    held_out = lines(HELD_OUT)
    # Licence headers and a few idioms occur in many files; whole files do not.
    assert len(held_out & lines(CALIBRATION)) < 0.01 * len(held_out)


def test_the_model_writes_python() -> None:
    """What it adds to the demo's prompt, up to the last blank line, is a function that Python's parser accepts."""
    model, tokenizer = hf.load_float_model(str(MODEL), dtype=torch.float32), hf.load_tokenizer(MODEL)
    text, _ = hf.generate_text(model, tokenizer, PROMPT, 40)
    tree = ast.parse((PROMPT + text).rpartition("\n\n")[0])
    assert isinstance(tree.body[-1], ast.FunctionDef)


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_perplexity_falls_with_every_bit(tmp_path: Path, method: str) -> None:
    precisions = (2, 3, 4, 5, 6)
    recipe = Recipe(method=method, preset="fast", precisions=precisions)
    quantize_model(str(MODEL), tmp_path / "any", recipe)
    text = HELD_OUT.read_text(encoding="utf-8")
    found = evaluate(str(tmp_path / "any"), precisions, text, max_tokens=8192, reference=str(MODEL))
    values = [result.perplexity for result in found.results]
    assert values == sorted(values, reverse=True)
    assert found.reference is not None
    assert values[-1] < 1.01 * found.reference.perplexity
    divergences = [result.kl_divergence or 0.0 for result in found.results]
    assert divergences == sorted(divergences, reverse=True)
