"""A report from its figures: plots, Markdown and HTML, every number read from figures.json beside them."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybits.errors import AnybitsError
from anybits.evaluate.report import Chart, draw

FIGURES = "figures.json"
Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """A heading with sentences, a table (its first row the header), and a chart."""

    title: str
    text: str
    table: Rows
    image: str = ""
    chart: Chart | None = None


def render(folder: Path) -> None:
    """Write report.md, report.html and their plots from `folder`/figures.json and nothing else."""
    try:
        figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnybitsError(f"{folder / FIGURES} cannot be read: {error}") from None
    sections = [section for key, build in _SECTIONS.items() if figures.get(key) for section in build(figures)]
    for section in sections:
        if section.chart is not None:
            draw(section.chart, folder / section.image)
    (folder / "report.md").write_text(_markdown(_title(figures), sections), encoding="utf-8")
    (folder / "report.html").write_text(_html(_title(figures), sections), encoding="utf-8")


def _title(figures: Mapping[str, Any]) -> tuple[str, str]:
    about = figures["about"]
    text = (
        f"{about['text_tokens']} tokens in windows of {about['seq_len']} without overlap. anybits "
        f"{about['anybits']}, torch {about['torch']}, {about['threads']} threads on {about['machine']}. "
        f"All figures are in `{FIGURES}`."
    )
    return "anybits report", text


def _markdown(title: tuple[str, str], sections: list[Section]) -> str:
    parts = [f"# {title[0]}\n\n{title[1]}\n"]
    for section in sections:
        head, *body = section.table
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
        parts.append(f"## {section.title}\n\n{section.text}\n\n" + "\n".join(lines) + "\n")
        if section.image:
            parts.append(f"![{section.title}]({section.image})\n")
    return "\n".join(parts)


def _html(title: tuple[str, str], sections: list[Section]) -> str:
    style = "body{font-family:sans-serif;max-width:52em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    style += "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}img{max-width:100%}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title[0]}</title><style>{style}</style>',
        f"<h1>{title[0]}</h1><p>{html.escape(title[1])}</p>",
    ]
    for section in sections:
        head, *body = section.table
        rows = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
        rows += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body]
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        parts.append(f"<table>{''.join(rows)}</table>")
        if section.image:
            parts.append(f'<p><img src="{section.image}" alt="{html.escape(section.title)}"></p>')
    return "\n".join(parts) + "</html>\n"


def _points(
    model: Mapping[str, Any], x: str, y: str, scale: float = 1.0, profiles: bool = False
) -> list[tuple[float, float, str]]:
    """Return the points of the whole-model precisions, or of the profiles, whose precision is a name."""
    rows = [r for r in model["results"] if r[y] is not None and isinstance(r["precision"], str) == profiles]
    return sorted((r[x] * scale, r[y], str(r["precision"])) for r in rows)


def _quality(figures: Mapping[str, Any]) -> list[Section]:
    models = figures["quality"]
    reference = next((m["reference"] for m in models.values() if m["reference"]), None)
    table = [["model", "precision", "MB read", "bits/weight", "perplexity", "KL", "top-1 agreement"]]
    for label, model in models.items():
        for r in model["results"]:
            kl = "" if r["kl_divergence"] is None else f"{r['kl_divergence']:.4f}"
            top = "" if r["top1_agreement"] is None else f"{100 * r['top1_agreement']:.1f} %"
            row = [label, str(r["precision"]), f"{r['weight_bytes'] / 1e6:.2f}", f"{r['bits_per_weight']:.3f}"]
            table.append([*row, f"{r['perplexity']:.3f}", kl, top])
    levels = {}
    if reference:
        size = f"{reference['weight_bytes'] / 1e6:.2f}"
        table.append(["float model", "16", size, "16", f"{reference['perplexity']:.3f}", "", ""])
        levels[f"float model ({size} MB)"] = reference["perplexity"]
    by_bytes = {label: _points(m, "weight_bytes", "perplexity", 1e-6) for label, m in models.items()}
    by_bits = {label: _points(m, "bits_per_weight", "perplexity") for label, m in models.items()}
    profiles = {
        f"{label}: profiles": _points(m, "bits_per_weight", "perplexity", 1, True) for label, m in models.items()
    }
    by_bits |= {label: points for label, points in profiles.items() if points}
    read = "quantized weights read (MB); the number at a point is its precision"
    sections = [
        Section(
            "Perplexity against bytes read",
            "What a decoding step reads of the quantized matrices, and the perplexity it buys.",
            table,
            "perplexity.png",
            Chart(read, "perplexity", by_bytes, levels, log_y=True),
        )
    ]
    divergence = {label: _points(m, "weight_bytes", "kl_divergence", 1e-6) for label, m in models.items()}
    if all(divergence.values()):
        chart = Chart(read, "KL(float || quantized), nats a token", divergence, log_y=True)
        head = [["model", *(f"{p} bits" for _, _, p in next(iter(divergence.values())))]]
        rows = [[label, *(f"{y:.4f}" for _, y, _ in points)] for label, points in divergence.items()]
        text = "Mean divergence of the next-token distribution from the float model's."
        sections.append(Section("KL divergence against bytes read", text, head + rows, "divergence.png", chart))
    chart = Chart("bits a weight, levels included", "perplexity", by_bits, levels, log_y=True)
    rows = [[label, p, f"{x:.3f}", f"{y:.3f}"] for label, points in by_bits.items() for x, y, p in points]
    text = (
        "Scales, offsets and codebooks count: two methods at one precision do not read the same. A profile gives "
        "every matrix a precision of its own; below the line through the whole-model precisions is better."
    )
    head = [["model", "precision", "bits/weight", "perplexity"]]
    return [*sections, Section("Quality against effective bits", text, head + rows, "bits.png", chart)]


def _memory(figures: Mapping[str, Any]) -> list[Section]:
    table = [["model", "precisions", "separate MB", "one store MB", "less", "factor", "factor with float parts"]]
    for label, m in figures["memory"].items():
        less = 100 * (1 - m["one_store_bytes"] / m["separate_bytes"])
        row = [label, ", ".join(map(str, m["precisions"])), f"{m['separate_bytes'] / 1e6:.2f}"]
        row += [f"{m['one_store_bytes'] / 1e6:.2f}", f"{less:.1f} %", f"{m['factor']:.2f}x"]
        table.append([*row, f"{m['factor_with_not_quantized']:.2f}x"])
    text = "Quantized matrices of all precisions from one store, against a model for each precision."
    published = [["paper, model", "precisions", "published separate, one (GB)", "factor", "anybits (GB)", "factor"]]
    for m in figures["published_memory"]:
        ours = m["anybits"]
        published.append(
            [
                f"{m['paper']}, {m['model']}",
                f"{m['precisions'][0]}-{m['precisions'][-1]}",
                f"{m['separate_gb']}, {m['one_store_gb']}",
                f"{m['published_factor']:.2f}x",
                f"{ours['separate_bytes'] / 1e9:.2f}, {ours['one_store_bytes'] / 1e9:.2f}",
                f"{ours['factor']:.2f}x",
            ]
        )
    more = "The papers' tables beside the same matrices in this format, computed from their shapes (no embeddings)."
    return [
        Section("Memory: one store against separate models", text, table),
        Section("Memory of the papers' models", more, published),
    ]


def _speed(figures: Mapping[str, Any]) -> list[Section]:
    table = [["model", "precision", "tokens/s", "share of memory bandwidth"]]
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for label, rows in figures["speed"]["models"].items():
        lines[label] = [(r["precision"], r["tokens_per_second"], "") for r in rows]
        for r in rows:
            speed, share = f"{r['tokens_per_second']:.1f}", f"{100 * r['bandwidth_share']:.1f} %"
            table.append([label, str(r["precision"]), speed, share])
    levels = {}
    if figures["speed"]["float"]:
        table.append(["float model", "16", f"{figures['speed']['float']:.1f}", ""])
        levels["float model"] = figures["speed"]["float"]
    read = figures["speed"]["bandwidth"] / 1e9
    text = f"Greedy decoding, batch 1; this machine's torch reads {read:.1f} GB/s. A small model is bound by overhead."
    chart = Chart("precision in bits", "tokens/s", lines, levels)
    return [Section("Decoding speed", text, table, "speed.png", chart)]


def _upscaling(figures: Mapping[str, Any]) -> list[Section]:
    table = [["variant", "precision", "relative weight error", "perplexity"]]
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for r in figures["upscaling"]:
        table.append([r["variant"], str(r["precision"]), f"{100 * r['weight_error']:.3f} %", f"{r['perplexity']:.3f}"])
        lines.setdefault(r["variant"], []).append((r["precision"], r["perplexity"], ""))
    text = (
        "Open question 1 of the Any-Precision paper: a uniform seed whose bins are halved for each further bit, "
        "against the same quantizer at each precision alone; groups of 128, no planes involved."
    )
    chart = Chart("precision in bits", "perplexity", lines, log_y=True)
    return [Section("Incremental upscaling of uniform quantization", text, table, "upscaling.png", chart)]


def _sizes(figures: Mapping[str, Any]) -> list[Section]:
    table = [["size", "method", "backend", "precision", "microseconds", "GB/s", "share of reading", "against bf16"]]
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for r in figures["sizes"]:
        row = [str(r["size"]), r["method"], r["backend"], str(r["precision"]), f"{r['us']:.0f}"]
        row += [f"{r['gb_per_s']:.1f}", f"{100 * r['bandwidth_share']:.0f} %", f"{r['speedup_vs_bf16']:.2f}x"]
        table.append(row)
        lines.setdefault(f"{r['method']}, {r['precision']} bits", []).append((r["size"], r["speedup_vs_bf16"], ""))
    text = (
        "Open question 2: one row times a square matrix, against torch's bfloat16 product and against reading alone "
        "on the same machine; every call takes another copy, so that no matrix waits in a cache."
    )
    chart = Chart("rows and columns of the matrix", "times as fast as dense bfloat16", lines, log_x=True)
    return [Section("Scaling with the matrix size", text, table, "sizes.png", chart)]


def _layout(figures: Mapping[str, Any]) -> list[Section]:
    table = [["layout", "size", "precision", "microseconds", "MB read"]]
    for r in figures["layout"]:
        row = [r["layout"], str(r["size"]), str(r["precision"]), f"{1e6 * r['seconds']:.0f}"]
        table.append([*row, f"{r['bytes'] / 1e6:.2f}"])
    text = (
        "Open question 3: one bfloat16 row times a matrix in planes, against torch's kernels for bit-packed matrices, "
        "which hold a single precision."
    )
    return [Section("What the plane layout costs against bit-packing", text, table)]


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[Section]]] = {
    "quality": _quality,
    "memory": _memory,
    "speed": _speed,
    "upscaling": _upscaling,
    "sizes": _sizes,
    "layout": _layout,
}
