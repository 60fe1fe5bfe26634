"""Draw docs/images/ for dynamic precision from benchmarks/results/*.jsonl: speculation, schedules and profiles."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from anybits.decode.draft_length import expected_tokens
from anybits.evaluate.report import Chart, draw

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
METHODS = {"anybcq": "AnyBCQ", "any-precision": "Any-Precision"}
Lines = list[dict[str, Any]]


def read(stem: str, table: str) -> Lines:
    """Return the lines of one table of a results file."""
    text = (RESULTS / f"{stem}.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["table"] == table]


def speed_ups(method: str, passes: Lines, acceptance: Lines) -> dict[str, list[tuple[int, float]]]:
    """Return "target, draft" -> (drafts a round, speed over plain decoding), greedy acceptance, preset default."""
    ms = {(line["precision"], line["rows"]): line["ms"] for line in passes if line["method"] == method}
    found = {}
    for line in (line for line in acceptance if line["model"] == f"{method}-default"):
        target, draft = line["target"], line["draft"]
        plain = ms[target, 1]
        counts = [k for k in range(1, 16) if (target, k + 1) in ms]
        found[f"{target} bits, drafts of {draft}"] = [
            (k, expected_tokens(line["greedy"], k) * plain / (k * ms[draft, 1] + ms[target, k + 1])) for k in counts
        ]
    return found


def draw_speculation(path: Path) -> None:
    """Draw the predicted speed against the number of drafts, a panel for each method."""
    passes, acceptance = read("speculation", "passes"), read("speculation", "acceptance")
    figure, panels = pyplot.subplots(1, len(METHODS), figsize=(9, 4), sharey=True, layout="constrained")
    for axes, (method, name) in zip(panels, METHODS.items(), strict=True):
        for label, points in speed_ups(method, passes, acceptance).items():
            dashes = "--" if label.endswith("2") else "-"
            color = {"3": "C0", "4": "C1", "8": "C2"}[label[0]]
            axes.plot(*zip(*points, strict=True), dashes, marker="o", markersize=4, color=color, label=label)
        axes.axhline(1, color="gray", linewidth=1)
        axes.set_title(name)
        axes.set_xlabel("tokens drafted a round (k)")
        axes.grid(visible=True, alpha=0.25)
    panels[0].set_ylabel("predicted speed over plain decoding")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(loc="lower left", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_schedules(path: Path, model: str = "anybcq-default") -> None:
    """Draw ln perplexity against mean bits, each the mean of the parts of the text that all rules have."""
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in read("schedules", "schedules"):
        if line["model"] == model:
            parts[line["rule"]].append((line["bits"], line["ln_ppl"]))
    means = {rule: tuple(map(statistics.fmean, zip(*points, strict=True))) for rule, points in parts.items()}
    figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    static = sorted(means.pop(rule) for rule in list(means) if rule.startswith("static"))
    axes.plot(*zip(*static, strict=True), "o-", color="gray", label="one precision throughout")
    rules = dict.fromkeys(rule.removesuffix(", upside down") for rule in means)
    for index, rule in enumerate(rules):
        shape = "s" if rule.startswith("length") else "o"
        axes.plot(*means[rule], shape, color=f"C{index}", label=rule, linestyle="none")
        turned = means.get(f"{rule}, upside down")
        if turned:
            axes.plot(*turned, "v", color=f"C{index}", fillstyle="none", linestyle="none")
    axes.plot([], [], "v", color="black", fillstyle="none", linestyle="none", label="the other way round")
    axes.set_xlabel("mean bits of a generated token")
    axes.set_ylabel("ln perplexity, held out")
    axes.grid(visible=True, alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_profiles(name: str, path: Path) -> None:
    """Draw perplexity against bits a weight: whole precisions and profiles of each model in a results file."""
    lines: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for line in read(f"profiles-{name}", "profiles"):
        label = line["model"] if isinstance(line["precision"], int) else f"{line['model']}: profiles"
        lines[label].append((line["bits_per_weight"], line["perplexity"], str(line["precision"])))
    draw(Chart("bits read for each weight, levels included", "held-out perplexity", lines, log_y=True), path)


def main() -> None:
    """Draw all of them."""
    draw_speculation(IMAGES / "speculation.png")
    draw_schedules(IMAGES / "schedules.png")
    for results in sorted(RESULTS.glob("profiles-*.jsonl")):
        draw_profiles(results.stem.removeprefix("profiles-"), IMAGES / f"{results.stem}.png")


if __name__ == "__main__":
    main()
