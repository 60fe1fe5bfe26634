"""`anybits demo`: quantize the bundled model with both methods and compare every precision with the original."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from anybits.checkpoint import write_json
from anybits.config import METHODS, Recipe, Single
from anybits.demo import CALIBRATION, HELD_OUT, MODEL
from anybits.evaluate import report
from anybits.evaluate.evaluation import evaluate
from anybits.integrations import transformers as hf
from anybits.integrations.quantizing import quantize_model
from anybits.precision import precision as scoped
from anybits.terminal import counted, program, shown_progress

PRECISIONS = (2, 3, 4, 5)
PROMPT = "import os\nimport sys\n\ndef main("
NEW_TOKENS = 48
SAMPLES = 16  # of 512 tokens: ten times as many as the widest layer has inputs
EVALUATED_TOKENS = 16_384
TITLES = {"anybcq": "AnyBCQ", "any-precision": "Any-Precision"}


@dataclass(frozen=True)
class Sample:
    """A continuation of the prompt and how fast it came."""

    text: str
    tokens_per_second: float


def run_demo(out: Path, console: Console) -> None:
    """Write both quantized models, demo.json and demo.png into `out`, and print samples and the table."""
    evaluations: dict[str, report.Evaluation] = {}
    samples: dict[str, dict[Single, Sample]] = {}
    for method in METHODS:
        folder = out / method
        shutil.rmtree(folder, ignore_errors=True)
        recipe = Recipe(method=method, precisions=PRECISIONS, samples=SAMPLES)
        with shown_progress(console, f"quantizing with {TITLES[method]}") as progress:
            quantize_model(str(MODEL), folder, recipe, str(CALIBRATION), progress=progress)
        with counted(console, "evaluating") as step:
            text = HELD_OUT.read_text(encoding="utf-8")
            evaluations[method] = evaluate(
                str(folder), PRECISIONS, text, max_tokens=EVALUATED_TOKENS, reference=str(MODEL), progress=step
            )
        samples[method] = _samples(folder)
    original = _sample(hf.load_float_model(str(MODEL), dtype=torch.float32))
    _show_samples(console, samples, original)
    console.print(_table(evaluations, samples, original))
    write_json(out / "demo.json", {method: e.to_dict() for method, e in evaluations.items()})
    report.plot([(TITLES[m], e) for m, e in evaluations.items()], out / "demo.png")
    console.print(f"plot: {out / 'demo.png'}   figures: {out / 'demo.json'}", highlight=False)
    command = f"{program()} generate {out / METHODS[0]} --precision 3 --prompt 'import os'"
    console.print(f"try: {command}", highlight=False, soft_wrap=True)


def _samples(folder: Path) -> dict[Single, Sample]:
    model = hf.load_model(folder, dtype=torch.float32)
    samples: dict[Single, Sample] = {}
    for p in PRECISIONS:
        with scoped(p):
            samples[p] = _sample(model)
    return samples


def _sample(model: torch.nn.Module) -> Sample:
    tokenizer = hf.load_tokenizer(MODEL)
    hf.generate_text(model, tokenizer, PROMPT, 2)
    started = time.perf_counter()
    text, tokens = hf.generate_text(model, tokenizer, PROMPT, NEW_TOKENS)
    return Sample(text, tokens / (time.perf_counter() - started))


def _show_samples(console: Console, samples: dict[str, dict[Single, Sample]], original: Sample) -> None:
    console.print(Panel(PROMPT.rstrip(), title="prompt", title_align="left"), highlight=False, markup=False)
    for method, by_precision in samples.items():
        for p, sample in by_precision.items():
            _show(console, f"{TITLES[method]}, {p} bits", sample.text)
    _show(console, "original, 16 bits", original.text)


def _show(console: Console, title: str, text: str) -> None:
    console.print(Panel(Text(text.rstrip()), title=title, title_align="left", border_style="dim"))


def _table(
    evaluations: dict[str, report.Evaluation], samples: dict[str, dict[Single, Sample]], original: Sample
) -> Table:
    any_evaluation = next(iter(evaluations.values()))
    table = Table(title=f"Held-out text, {any_evaluation.text_tokens} tokens; bytes of quantized weights read")
    for column in ("method", "precision", "bytes", "perplexity", "vs 16 bits", "tokens/s"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    reference = any_evaluation.reference
    assert reference is not None
    for method, evaluation in evaluations.items():
        for result in evaluation.results:
            speed = samples[method][result.precision].tokens_per_second
            more = f"{100 * (result.perplexity / reference.perplexity - 1):+.2f} %"
            row = (f"{result.weight_bytes:,}", f"{result.perplexity:.3f}", more, f"{speed:.1f}")
            table.add_row(TITLES[method], str(result.precision), *row)
        table.add_section()
    row = (f"{reference.weight_bytes:,}", f"{reference.perplexity:.3f}", "", f"{original.tokens_per_second:.1f}")
    table.add_row("original", "16", *row)
    return table
