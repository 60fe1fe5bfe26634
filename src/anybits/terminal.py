"""What a person sees while anybits works: a bar on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from anybits.config import Single
from anybits.decode.statistics import Statistics
from anybits.errors import AnybitsError
from anybits.evaluate.end_to_end import DecodeTiming
from anybits.evaluate.kernels import KernelTiming
from anybits.evaluate.profiling import Found
from anybits.evaluate.profiling import Progress as Profiling
from anybits.evaluate.report import Evaluation
from anybits.quantize.distillation import Outcome
from anybits.quantize.estimate import Estimate
from anybits.quantize.pipeline import BlockReport, Progress


def program() -> str:
    """Return what to type for anybits: its path where the shell does not find the name."""
    return "anybits" if shutil.which("anybits") else os.path.relpath(sys.argv[0])


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _errors(report: BlockReport) -> str:
    return " ".join(f"{p} bits {100 * error:.2f} %" for p, error in report.error.items())


def _outcome(outcome: Outcome) -> str:
    change = f"divergence from the float model {outcome.before:.4f} to {outcome.after:.4f}"
    return change if outcome.kept else f"{change}: levels left as they were"


@contextmanager
def shown_progress(console: Console, label: str = "quantizing") -> Iterator[Progress]:
    """Give callbacks that show the block, its weight error, and the time left."""
    if console.is_terminal:
        with _bar(console) as bar:
            tasks: dict[str | int, Any] = {}

            def calibrating(done: int, total: int) -> None:
                if "text" not in tasks:
                    tasks["text"] = bar.add_task("calibrating", note="", total=total)
                bar.update(tasks["text"], completed=done)

            def block_done(report: BlockReport) -> None:
                if "blocks" not in tasks:
                    tasks["blocks"] = bar.add_task(label, note="", total=report.total)
                note = "resumed" if report.resumed else f"weight error {_errors(report)}"
                bar.update(tasks["blocks"], completed=report.index + 1, note=note)

            def distilling(precision: int, done: int, total: int) -> None:
                if precision not in tasks:
                    tasks[precision] = bar.add_task(f"tuning {precision} bits", note="", total=total)
                bar.update(tasks[precision], completed=done)

            def distilled(outcome: Outcome) -> None:
                bar.update(tasks[outcome.precision], note=_outcome(outcome))

            yield Progress(calibrating, block_done, distilling, distilled)
        return
    yield _logged(console, label)


def _logged(console: Console, label: str) -> Progress:
    started = time.monotonic()

    def calibrating(done: int, total: int) -> None:
        if done == total or done % max(1, total // 4) == 0:
            console.print(f"calibrating: {done}/{total}", highlight=False, soft_wrap=True)

    def block_done(report: BlockReport) -> None:
        done = report.index + 1
        left = (time.monotonic() - started) / done * (report.total - done)
        note = "resumed" if report.resumed else f"weight error {_errors(report)}"
        line = f"{label}: block {done}/{report.total}, {note}, {left:.0f} s left"
        console.print(line, highlight=False, soft_wrap=True)

    def distilled(outcome: Outcome) -> None:
        console.print(f"tuned {outcome.precision} bits: {_outcome(outcome)}", highlight=False, soft_wrap=True)

    return Progress(calibrating, block_done, distilled=distilled)


@contextmanager
def counted(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callback(done, total) shown as a bar on a terminal and not at all elsewhere."""
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with _bar(console) as bar:
        task = bar.add_task(label, note="", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def estimate_table(model: str, out: Path, estimate: Estimate) -> Table:
    """Return what a run will take: sums first, then their parts."""
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    title = f"{model}: {estimate.weights / 1e6:.1f} M weights to quantize; time is known within a factor of about two"
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(justify="right")

    def add(name: str, parts: dict[str, str], total: str) -> None:
        table.add_row(name, "", total)
        for part, value in parts.items():
            table.add_row("", part, value)
        table.add_section()

    def gigabytes(size: float) -> str:
        return f"{size / 1e9:.2f} GB"

    def minutes(seconds: float) -> str:
        return f"{seconds / 60:.1f} min"

    add("time", {k: minutes(v) for k, v in estimate.seconds.items()}, minutes(sum(estimate.seconds.values())))
    add("memory", {k: gigabytes(v) for k, v in estimate.memory.items()}, gigabytes(sum(estimate.memory.values())))
    add("disk", {k: gigabytes(v) for k, v in estimate.disk.items()}, gigabytes(sum(estimate.disk.values())))
    table.add_row("disk", "free where the result goes", gigabytes(shutil.disk_usage(folder).free))
    return table


@contextmanager
def profiling_progress(console: Console) -> Iterator[Profiling]:
    """Give callbacks that show sensitivities and searches, and a line for each profile found."""

    def found(one: Found) -> None:
        how = "found before" if one.kept else f"divergence {one.knapsack_loss:.5f} -> {one.loss:.5f}"
        size = f"{one.weight_bytes:,} of {one.budget_bytes:,} bytes"
        console.print(f"profile {one.name}: {size}, {how}", highlight=False, soft_wrap=True)

    if console.is_terminal:
        with _bar(console) as bar:
            tasks: dict[str | int, Any] = {}

            def step(label: str, done: int, total: int) -> None:
                if label not in tasks:
                    tasks[label] = bar.add_task(label, note="", total=total)
                bar.update(tasks[label], completed=done)

            yield Profiling(
                lambda done, total: step("sensitivities", done, total),
                lambda name, done, total: step(f"searching {name}", done, total),
                found,
            )
        return

    def measured(done: int, total: int) -> None:
        if done == total or done % max(1, total // 8) == 0:
            console.print(f"sensitivities: {done}/{total} matrices", highlight=False)

    yield Profiling(measured, found=found)


def result_table(evaluation: Evaluation) -> Table:
    """Return the table of an evaluation."""
    windows = f"windows of {evaluation.seq_len} {_overlap(evaluation.stride)}"
    about = f"{evaluation.text}, " if evaluation.text else ""
    table = Table(title=f"{evaluation.model}: {about}{evaluation.text_tokens} tokens in {windows}")
    for column in ("precision", "MB read", "bits/weight", "perplexity", "KL", "top-1 agreement"):
        table.add_column(column, justify="right")
    for r in evaluation.results:
        kl = "" if r.kl_divergence is None else f"{r.kl_divergence:.4f}"
        top = "" if r.top1_agreement is None else f"{100 * r.top1_agreement:.1f} %"
        size, bits = f"{r.weight_bytes / 1e6:.2f}", f"{r.bits_per_weight:.3f}"
        table.add_row(str(r.precision), size, bits, f"{r.perplexity:.3f}", kl, top)
    if evaluation.reference is not None:
        reference = evaluation.reference
        table.add_row("float", f"{reference.weight_bytes / 1e6:.2f}", "", f"{reference.perplexity:.3f}", "", "")
    return table


def _overlap(stride: int | None) -> str:
    return "without overlap" if stride is None else f"every {stride} tokens, each token counted once"


def task_table(model: str, results: dict[Single, dict[str, dict[str, Any]]]) -> Table:
    """Return the table of lm-eval results: a row for each task and metric, a column for each precision."""
    table = Table(title=model)
    table.add_column("task")
    table.add_column("metric")
    for p in results:
        table.add_column(f"{p} bits", justify="right")
    first = next(iter(results.values()))
    for task, metrics in first.items():
        for metric in metrics:
            table.add_row(task, metric, *(f"{results[p][task][metric]:.4f}" for p in results))
    return table


def whole_numbers(text: str, name: str) -> list[int]:
    """Read "1,4,16" as whole numbers; raise AnybitsError naming `name` when it is something else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise AnybitsError(f"{name} '{text}' must be whole numbers, comma-separated, such as 1,4,16") from None


def timing_line(timing: KernelTiming) -> str:
    """Return one line about one timed kernel."""
    n, k = timing.shape
    return (
        f"{n:6d} x {k:5d}  m {timing.m:3d}  {timing.method:13s} p {timing.precision}  {timing.backend:9s} "
        f"{timing.us:9.1f} us  {timing.gb_per_s:6.1f} GB/s  {100 * timing.bandwidth_share:4.0f} % of reading  "
        f"{timing.speedup_vs_bf16:5.1f} x bf16"
    )


def passes_line(statistics: Statistics) -> str:
    """Return one line about a generation with drafts or a schedule."""
    rate = f"{statistics.tokens / statistics.seconds:.1f} tokens/s"
    at = ", ".join(f"{count} at {p} bits" for p, count in sorted(statistics.steps_at.items(), key=str))
    if not statistics.drafted:
        return f"{statistics.tokens} tokens after the first, {rate}; passes of one token: {at}"
    gain = "" if statistics.speed_up is None else f", {statistics.speed_up:.2f} times the speed of plain passes"
    kept = f"{100 * (statistics.acceptance or 0):.0f} % accepted"
    return (
        f"{statistics.tokens} tokens after the first, {rate}{gain}; {statistics.drafted} drafted in "
        f"{statistics.rounds} rounds, {kept}; {statistics.steps} plain passes"
    )


def decode_line(timing: DecodeTiming) -> str:
    """Return one line about one timed decode step."""
    name = {16: "bf16", 0: f"{timing.method} switching"}.get(
        timing.precision, f"{timing.method} {timing.precision} bits"
    )
    layers = f"{timing.layers} layers"
    if timing.distinct_layers < timing.layers:
        layers += f", {timing.distinct_layers} of them distinct"
    head = ", head quantized" if timing.quantized_head and timing.precision != 16 else ""
    head += ", a graph of its own" if getattr(timing, "graph", "") == "own" else ""
    return (
        f"{timing.model}  {name:20s} context {timing.context:6d}  {timing.ms:8.1f} ms  "
        f"{timing.tokens_per_s:7.2f} tokens/s  {timing.gb_per_s:6.1f} GB/s  "
        f"{timing.speedup_vs_bf16:5.1f} x bf16  ({layers}{head})"
    )


def inspection_tables(facts: dict[str, Any]) -> list[Table]:
    """Return the tables of `anybits inspect`."""
    head = Table(title=f"{facts['model']}: {facts['method']}, format version {facts['format_version']}")
    for column in ("precision", "MB read", "bits/weight", "share of 16 bits"):
        head.add_column(column, justify="right")
    for row in facts["precisions"]:
        share = f"{100 * row['bits_per_weight'] / 16:.1f} %"
        head.add_row(str(row["precision"]), f"{row['weight_bytes'] / 1e6:.2f}", f"{row['bits_per_weight']:.3f}", share)
    parts = Table(title=f"{facts['quantized_modules']} quantized modules, {facts['quantized_weights']} weights")
    for column in ("stored", "MB"):
        parts.add_column(column, justify="right")
    for name, size in facts["stored_bytes"].items():
        parts.add_row(name, f"{size / 1e6:.2f}")
    return [head, *_profile_tables(facts["profiles"]), parts]


def _profile_tables(profiles: list[dict[str, Any]]) -> list[Table]:
    if not profiles:
        return []
    table = Table(title="profiles")
    for column in ("profile", "MB read", "bits/weight", "effective bits", "matrices at each precision"):
        table.add_column(column, justify="left" if column.startswith("matrices") else "right")
    for row in profiles:
        counts = ", ".join(f"{count} at {p}" for p, count in row["matrices"].items())
        numbers = (f"{row['weight_bytes'] / 1e6:.2f}", f"{row['bits_per_weight']:.3f}", f"{row['effective_bits']:.3f}")
        table.add_row(row["profile"], *numbers, counts)
    return [table]
