"""`anybits report`: every file comes from figures.json alone, and the numbers mean what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anybits
from anybits import AnybitsError, Recipe
from anybits.evaluate import document, full_report, measurements, upscaling
from anybits.evaluate.inspection import inspect_checkpoint
from conftest import save_tiny
from test_cli import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama quantized with both methods, and a report about them."""
    folder = tmp_path_factory.mktemp("report")
    save_tiny(folder / "float", "llama")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    for method in ("anybcq", "any-precision"):
        recipe = Recipe(method=method, preset="fast", group_size=32, precisions=(2, 3, 4))
        anybits.quantize(str(folder / "float"), folder / method, recipe)
    text = (folder / "text.txt").read_text()
    both = [str(folder / "anybcq"), str(folder / "any-precision")]
    full_report.report(both, folder / "report", text, str(folder / "float"), 64, 256, sizes=(64, 128))
    return folder


def test_a_report_has_its_files(models: Path) -> None:
    made = {path.name for path in (models / "report").iterdir()}
    plots = {"perplexity.png", "divergence.png", "bits.png", "speed.png", "upscaling.png", "sizes.png"}
    assert made == plots | {"figures.json", "report.md", "report.html"}
    for text in ((models / "report" / name).read_text() for name in ("report.md", "report.html")):
        assert set(re.findall(r"\w+\.png", text)) == plots


def test_everything_comes_from_the_json(models: Path, tmp_path: Path) -> None:
    """Rendered again from figures.json with one figure changed, only that figure changes."""
    figures = json.loads((models / "report" / "figures.json").read_text())
    figures["quality"]["anybcq"]["results"][0]["perplexity"] = 123456.789
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    document.render(tmp_path)
    before, after = (models / "report" / "report.md").read_text(), (tmp_path / "report.md").read_text()
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 2  # against bytes, and against bits
    assert all("123456.789" in line for line in changed)


def test_profiles_are_a_line_of_their_own(models: Path, tmp_path: Path) -> None:
    figures = json.loads((models / "report" / "figures.json").read_text())
    results = figures["quality"]["anybcq"]["results"]
    between = {"precision": "2.5", "perplexity": 54321.5, "weight_bytes": 1, "bits_per_weight": 2.9}
    results.append(results[0] | between)
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    document.render(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| anybcq: profiles | 2.5 | 2.900 | 54321.500 |" in text
    assert text.count("54321.5") == 2  # in the table of all results, and against bits
    assert "2.5 bits" not in text  # the table of divergences has a column for each whole precision


def test_memory_agrees_with_inspect(models: Path) -> None:
    for method in ("anybcq", "any-precision"):
        facts = inspect_checkpoint(str(models / method))
        memory = measurements.memory(str(models / method))
        assert memory["alone_bytes"] == {str(r["precision"]): r["weight_bytes"] for r in facts["precisions"]}
        quantized = sum(size for kind, size in facts["stored_bytes"].items() if kind != "not quantized")
        assert memory["one_store_bytes"] == quantized
        assert memory["not_quantized_bytes"] == facts["stored_bytes"]["not quantized"]


def test_the_papers_memory_tables_are_met() -> None:
    anybcq, any_precision = measurements.published_memory()
    assert anybcq["anybits"]["factor"] == pytest.approx(anybcq["published_factor"], rel=0.01)
    assert any_precision["anybits"]["factor"] == pytest.approx(any_precision["published_factor"], rel=0.01)


def test_upscaled_bins_nest_and_round_to_nearest_is_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    values = upscaling.upscaled(weight, None, (2, 3, 4), 32)
    for p in (3, 4):
        parents = torch.stack([values[p].flatten(), values[p - 1].flatten()], 1).unique(dim=0)
        assert len(parents) == len(values[p].unique())  # each value has one parent
    grid = upscaling.fit_grid(weight, 3, 32)
    error = (upscaling.alone(weight, None, 3, 32) - weight).abs().view(8, 2, 32)
    assert bool((error <= grid.step[..., None] / 2 * 1.0001).all())


def test_error_feedback_lowers_the_output_error() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 96, generator=g)
    x = torch.randn(512, 96, generator=g) @ torch.randn(96, 96, generator=g)
    total = x.T @ x + torch.eye(96)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(total)), upper=True)

    def loss(value: torch.Tensor) -> float:
        return float(((value - weight) @ x.T).square().sum())

    assert loss(upscaling.alone(weight, factor, 3, 32)) < 0.8 * loss(upscaling.alone(weight, None, 3, 32))


def test_command_and_refusals(capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path) -> None:
    assert run(capsys, "report", models / "float", "--text", models / "text.txt", "-o", tmp_path)[0] == 1
    assert run(capsys, "report", models / "anybcq", "--text", tmp_path / "none")[0] == 1
    with pytest.raises(AnybitsError):
        document.render(tmp_path)


def test_results_page_is_current() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_results.py", "--check"], check=True)
