"""Turn the lines of benchmarks/gpu.py into a text table, a page with tables, and a plot; needs no GPU.

    python benchmarks/gpu_report.py gpu.jsonl [--out FOLDER] [--publish]

Writes gpu.md and gpu.png into the folder (default: beside the lines). --publish also puts the lines into
benchmarks/results/gpu.jsonl and the plot into docs/images/, and makes docs/results.md anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"anybcq": "AnyBCQ", "any-precision": "Any-Precision"}
RUN = ("commit", "machine", "threads", "anybits", "torch", "date")
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Return the lines of a file; a stopped run may have left half of the last one."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"{path}: left out a line that is no JSON object", file=sys.stderr)
    return lines


def of(lines: list[Line], stage: str) -> list[Line]:
    """Return the lines of one stage that have a figure."""
    return [line for line in lines if line["stage"] == stage and "failed" not in line]


def precision_name(line: Line) -> str:
    """Return what a line ran at."""
    return {16: "bf16", 0: "switching" if line["stage"] == "e2e" else "mixed"}.get(
        line["precision"], f"{line['precision']} bits"
    )


def products(lines: list[Line], stage: str) -> Iterator[str]:
    """Yield products beside the bandwidth and cuBLAS."""
    for line in of(lines, stage):
        n, k = line["shape"]
        text = f"{stage} {n:5d}x{k:<5d} {line['method']:13s} m {line['m']:3d} p {line['precision']}"
        text += f" {line['us']:8.2f} us {100 * line['bandwidth_share']:4.0f} % {line['speedup_vs_bf16']:5.2f}x bf16"
        yield text + (f"  dense path {line['dense_path_us']:8.2f} us" if "dense_path_us" in line else "")


def steps(lines: list[Line]) -> Iterator[str]:
    """Yield whole decode steps."""
    for line in of(lines, "e2e"):
        yield (
            f"e2e {line['model']} {line['method']:13s} {precision_name(line):9s} graph {line['graph']:6s} "
            f"{line['ms']:8.3f} ms {line['tokens_per_s']:7.1f} tokens/s {line['speedup_vs_bf16']:5.2f}x bf16"
        )


def others(lines: list[Line]) -> Iterator[str]:
    """Yield the smaller stages."""
    for line in of(lines, "rivals"):
        n, k = line["shape"]
        start = f"rivals {n:5d}x{k:<5d} {line['name']:13s} m {line['m']:3d} p {line['precision']}"
        if line["us"] is None:
            yield f"{start} is wrong by {line['error']:.3g}: not timed"
        else:
            yield f"{start} {line['us']:8.2f} us, ours {line['our_us']:8.2f} us = {line['our_gain']:.2f}x as fast"
    for line in of(lines, "together"):
        yield (
            f"together {line['name']:17s} {line['method']:13s} m {line['m']:3d} {precision_name(line):9s} "
            f"{line['us']:8.2f} us = {line['ratio']:.2f} of a launch each"
        )
    for line in of(lines, "rates"):
        yield f"rate {line['name']:12s} {line['tera_multiply_adds']:7.0f} tera multiply-adds a second"
    for line in of(lines, "mixed"):
        yield f"mixed {line['method']:13s} m {line['m']:3d} {line['us']:8.2f} us = {line['ratio']:.2f} of highest"
    tuned = [line for line in of(lines, "tune") if line["us"]]
    for key, group in itertools.groupby(tuned, lambda line: (line["shape"], line["precision"])):
        for line in sorted(group, key=lambda line: line["us"])[:3]:
            yield f"tune {key[0]} p {key[1]} {line['us']:8.2f} us {100 * line['plane_share']:3.0f} % {line['tuning']}"


def text_table(lines: list[Line]) -> str:
    """Return what matters, for a terminal."""
    if not lines:
        return "nothing was measured"
    checks, ran = of(lines, "check"), next((line for line in reversed(lines) if "device" in line), None)
    head = [f"{ran['device']}, driver {ran['driver']}, copy {ran['copy_gb_per_s']} GB/s"] if ran else []
    if checks:
        head.append(f"check: {sum(line['ok'] for line in checks)} of {len(checks)} right and the same ten times")
    parts = [*head, *failures(lines), *products(lines, "time"), *steps(lines), *products(lines, "rows"), *others(lines)]
    return "\n".join(parts)


def failures(lines: list[Line]) -> Iterator[str]:
    """Yield what is wrong, and what could not be measured with its reason."""
    for line in of(lines, "check"):
        if not line["ok"]:
            yield f"WRONG {line['method']} m {line['m']} p {line['precision']}: {line}"
    for line in lines:
        if "failed" in line:
            names = ("stage", "name", "model", "shape", "method", "m", "precision", "tuning")
            key = " ".join(f"{name} {line[name]}" for name in names if name in line)
            yield f"FAILED {key}: {line['failed']}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def kernel_table(lines: list[Line]) -> str:
    """Return one row of x: microseconds, share of the bandwidth and gain over cuBLAS, by shape and precision."""
    found: dict[tuple[str, str], dict[int, Line]] = defaultdict(dict)
    for line in of(lines, "time"):
        found[line["method"], "{} × {}".format(*line["shape"])][line["precision"]] = line
    bits = sorted({p for rows in found.values() for p in rows})
    body = []
    for (method, shape), rows in found.items():
        cells = [
            f"{rows[p]['us']:.1f} µs, {100 * rows[p]['bandwidth_share']:.0f} %, {rows[p]['speedup_vs_bf16']:.1f}×"
            if p in rows
            else ""
            for p in bits
        ]
        body.append([METHODS[method], shape, *cells])
    return table(["levels", "shape", *(f"{p} bits" for p in bits)], body)


def step_table(lines: list[Line]) -> str:
    """Return whole decode steps, by precision."""
    rows = [
        [
            METHODS[line["method"]], precision_name(line), line["graph"], f"{line['ms']:.3f}",
            f"{line['tokens_per_s']:.0f}", f"{line['speedup_vs_bf16']:.2f}", f"{100 * line['bandwidth_share']:.0f} %",
        ]
        for line in of(lines, "e2e")
    ]  # fmt: skip
    return table(["levels", "precision", "graph", "ms", "tokens/s", "of bf16", "of the bandwidth"], rows)


def rival_table(lines: list[Line]) -> str:
    """Return the papers' kernels beside ours."""
    rows = [
        [line["name"], "{} × {}".format(*line["shape"]), str(line["m"]), str(line["precision"]), f"{line['us']:.1f}",
         f"{line['our_us']:.1f}", f"{line['our_gain']:.2f}"]
        for line in of(lines, "rivals")
        if line["us"] is not None
    ]  # fmt: skip
    return table(["kernel", "shape", "rows", "bits", "µs", "ours, µs", "times as fast"], rows)


def page(lines: list[Line]) -> str:
    """Return the page: where, then each table that has rows."""
    last = next(line for line in reversed(lines) if "device" in line)
    checks = of(lines, "check")
    parts = [
        f"# {last['device']}\n",
        f"Driver {last['driver']}, NVRTC {last['nvrtc']}, torch {last['torch']}, commit {last['commit']}; a large copy "
        f"moves {last['copy_gb_per_s']} GB/s. {sum(line['ok'] for line in checks)} of {len(checks)} products right "
        "against float64 and the same in ten runs.\n",
    ]
    sections = {
        "time": ("One row: time, share of the copy bandwidth, times cuBLAS's bf16", kernel_table),
        "e2e": ("Whole decode steps of random weights, all captured", step_table),
        "rivals": ("Beside the papers' own kernels, queued launches of both", rival_table),
    }
    for stage, (title, make) in sections.items():
        if of(lines, stage):
            parts += [f"## {title}\n", make(lines) + "\n"]
    return "\n".join(parts)


def draw(lines: list[Line], path: Path) -> None:
    """Write the plot: share of the bandwidth against precision for each shape, and tokens/s against precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = next(line for line in reversed(lines) if "device" in line)
    figure, panels = pyplot.subplots(1, len(METHODS) + 1, figsize=(13, 4.2), layout="constrained")
    for (method, name), axes in zip(METHODS.items(), panels, strict=False):
        shapes: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for line in of(lines, "time"):
            if line["method"] == method:
                label = "{} × {}".format(*line["shape"])
                shapes[label].append((line["precision"], 100 * line["bandwidth_share"]))
        for label, points in shapes.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.axhline(100, color="gray", linestyle="--")
        finish(axes, f"{name}, one row", "bits", "% of the copy bandwidth")
    for method, name in METHODS.items():
        for graph, style in (("shared", "-"), ("own", ":")):
            points = [
                (line["precision"], line["tokens_per_s"])
                for line in of(lines, "e2e")
                if (line["method"], line["graph"]) == (method, graph) and 0 < line["precision"] < 16
            ]
            if points:
                axes = panels[-1]
                axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=f"{name}, graph {graph}")
    bf16 = [line["tokens_per_s"] for line in of(lines, "e2e") if line.get("precision") == 16]
    if bf16:
        panels[-1].axhline(max(bf16), color="gray", linestyle="--", label="bf16")
    finish(panels[-1], "decode steps, batch 1", "bits", "tokens/s")
    figure.suptitle(f"{last['device']}, commit {last['commit']}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def finish(axes: Any, title: str, x: str, y: str) -> None:
    """Label one panel."""
    from matplotlib.ticker import MaxNLocator

    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def published(lines: list[Line]) -> list[Line]:
    """Return the lines as benchmarks/results has them: a table's name, and the facts that docs/results.md shows."""
    made = []
    for line in (line for line in lines if "failed" not in line):
        machine = f"{line['device']}, driver {line['driver']}, NVRTC {line['nvrtc']}"
        rest = {k: v for k, v in line.items() if k not in ("stage", "device", "driver", "nvrtc", *RUN)}
        facts = {k: line[k] for k in RUN if k != "machine"} | {"machine": machine}
        made.append({"table": line["stage"]} | {k: _flat(v) for k, v in rest.items()} | facts)
    return made


def _flat(value: Any) -> Any:
    return "{}x{}".format(*value) if isinstance(value, list) else value


def write(lines: list[Line], folder: Path) -> None:
    """Write gpu.md and gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.md").write_text(page(lines), encoding="utf-8")
    draw(lines, folder / "gpu.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--out", type=Path, help="folder for gpu.md and gpu.png")
    parser.add_argument("--publish", action="store_true", help="also into benchmarks/results and docs")
    arguments = parser.parse_args()
    lines = read(arguments.lines)
    if not lines:
        sys.exit(f"{arguments.lines} holds no lines")
    print(text_table(lines))
    write(lines, arguments.out or arguments.lines.parent)
    if arguments.publish:
        texts = [json.dumps(line) for line in published(lines)]
        (ROOT / "benchmarks" / "results" / "gpu.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        draw(lines, ROOT / "docs" / "images" / "gpu.png")
        subprocess.run([sys.executable, ROOT / "scripts" / "make_results.py"], check=True)


if __name__ == "__main__":
    main()
