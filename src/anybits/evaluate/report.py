"""The result of an evaluation as JSON, as a table, and as a plot of perplexity against bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anybits.config import Single
from anybits.errors import AnybitsError


@dataclass(frozen=True)
class Result:
    """One precision of one model; the last two are None without a reference model."""

    precision: Single
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
    """A model at several precisions on one text, in windows of seq_len tokens; stride None: without overlap."""

    model: str
    text_tokens: int
    seq_len: int
    results: tuple[Result, ...]
    reference: Reference | None = None
    stride: int | None = None
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that docs/evaluation.md describes."""
        return asdict(self) | {"stride": self.stride or self.seq_len, "results": [asdict(r) for r in self.results]}


@dataclass(frozen=True)
class Chart:
    """Lines of points for one plot: label -> (x, y, text beside the point), and levels: label -> y."""

    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float, str]]]
    levels: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False


PLOT_KINDS = (".png", ".svg", ".pdf")


def check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Raise AnybitsError, before anything is measured, when a result could not be written afterwards."""
    for path in (json_file, plot_file):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            why = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
            raise AnybitsError(f"{path} {why}")
    if plot_file is not None and plot_file.suffix.lower() not in PLOT_KINDS:
        raise AnybitsError(f"plot {plot_file} must be named {' or '.join(PLOT_KINDS)}")
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise AnybitsError(_NO_MATPLOTLIB)


_NO_MATPLOTLIB = "drawing a plot needs: pip install 'anybits[plot]'"


def draw(chart: Chart, path: Path) -> None:
    """Write a chart as PNG, SVG or PDF; raise AnybitsError when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise AnybitsError(_NO_MATPLOTLIB) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for index, (label, points) in enumerate(chart.lines.items()):
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=label)
        # Falling lines that lie close: the first half has its numbers above, the others below, so that none meet.
        above = index < len(chart.lines) / 2
        place = {"xytext": (5, 5)} if above else {"xytext": (-5, -5), "ha": "right", "va": "top"}
        ground = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}  # keeps them legible on another line
        for x, y, text in points:
            axes.annotate(text, (x, y), textcoords="offset points", fontsize=8, bbox=ground, **place)
    for label, y in chart.levels.items():
        axes.axhline(y, color="gray", linestyle="--", label=label)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    numbers = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    if chart.log_x:  # only the measured sizes, which are powers of two
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(numbers)
    elif all(x == int(x) for points in chart.lines.values() for x, _, _ in points):
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(numbers)
        heights = [*(y for points in chart.lines.values() for _, y, _ in points), *chart.levels.values()]
        narrow = max(heights) < 30 * min(heights)  # labels between powers of ten would overlap on a wide range
        axes.yaxis.set_minor_formatter(numbers if narrow else matplotlib.ticker.NullFormatter())
    if not chart.log_y:
        axes.set_ylim(bottom=0)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot(evaluations: Sequence[tuple[str, Evaluation]], path: Path) -> None:
    """Draw perplexity against bytes read, one line for each (label, evaluation), the reference as a level."""
    lines = {
        label: [(r.weight_bytes / 1e6, r.perplexity, f"{r.precision}") for r in evaluation.results]
        for label, evaluation in evaluations
    }
    reference = next((e.reference for _, e in evaluations if e.reference is not None), None)
    levels = {}
    if reference is not None:
        text = f"float model ({reference.weight_bytes / 1e6:.1f} MB): {reference.perplexity:.2f}"
        levels[text] = reference.perplexity
    x_label = "quantized weights read (MB); the number at a point is its precision in bits"
    draw(Chart(x_label, "held-out perplexity", lines, levels, log_y=True), path)
