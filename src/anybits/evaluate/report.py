"""The result of an evaluation as JSON, as a table, and as a plot of perplexity against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anybits.errors import AnybitsError


@dataclass(frozen=True)
class Result:
    """One precision of one model; the last two are None without a reference model."""

    precision: int
    perplexity: float
    weight_bytes: int
    bits_per_weight: float
    kl_divergence: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Reference:
    """The float model on the same text."""

    perplexity: float
    weight_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """A model at several precisions on one text, in windows of seq_len tokens without overlap."""

    model: str
    text_tokens: int
    seq_len: int
    results: tuple[Result, ...]
    reference: Reference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that docs/evaluation.md describes."""
        return asdict(self) | {"results": [asdict(r) for r in self.results]}


def plot(evaluations: Sequence[tuple[str, Evaluation]], path: Path) -> None:
    """Draw perplexity against bytes read, one line for each (label, evaluation), the reference as a level."""
    try:
        import matplotlib
    except ImportError:
        raise AnybitsError("drawing a plot needs: pip install 'anybits[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, evaluation in evaluations:
        results = evaluation.results
        axes.plot([r.weight_bytes / 1e6 for r in results], [r.perplexity for r in results], marker="o", label=label)
        for r in results:
            axes.annotate(
                f"{r.precision}", (r.weight_bytes / 1e6, r.perplexity), xytext=(5, 5), textcoords="offset points"
            )
    reference = next((e.reference for _, e in evaluations if e.reference is not None), None)
    if reference is not None:
        text = f"float model ({reference.weight_bytes / 1e6:.1f} MB): {reference.perplexity:.2f}"
        axes.axhline(reference.perplexity, color="gray", linestyle="--", label=text)
    axes.set_xlabel("quantized weights read (MB); the number at a point is its precision in bits")
    axes.set_ylabel("held-out perplexity")
    axes.set_yscale("log")
    ticks = matplotlib.ticker.ScalarFormatter()
    axes.yaxis.set_major_formatter(ticks)
    axes.yaxis.set_minor_formatter(ticks)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
