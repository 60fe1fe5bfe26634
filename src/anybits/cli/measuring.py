"""Commands that measure: eval, inspect, report, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from anybits.cli.app import ActivationBits, Model, app, console
from anybits.config import Single
from anybits.errors import AnybitsError


@app.command("eval", rich_help_panel="Main")
def evaluate(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="Text file to predict; keep it apart from calibration text.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="wikitext2, c4 or a Hugging Face dataset NAME[:CONFIG[:SPLIT[:COLUMN]]].")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks instead of a text: TASK[,TASK].")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each lm-eval task.")] = None,
    precisions: Annotated[
        str | None, typer.Option(help="Precisions and profiles, as 2,2.5,3 or 2-4. Default: all stored.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows that overlap. Default: they do not overlap.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use only this many tokens of the text.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The original float model: adds its perplexity, KL divergence and agreement.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of perplexity against bytes (.png, .svg or .pdf).")
    ] = None,
    activation_bits: ActivationBits = None,
) -> None:
    """Measure perplexity at each precision, and closeness to the float model; or run lm-eval tasks.

    Example: `anybits eval llama-any --precisions 2,3,4 --text corpus.txt --json r.json --plot r.png`
    """
    from anybits import checkpoint, terminal
    from anybits.config import parse_singles
    from anybits.evaluate import evaluation, report
    from anybits.integrations import transformers as hf

    chosen = hf.stored_config(model).singles if precisions is None else parse_singles(precisions)
    if sum(given is not None for given in (text, dataset, tasks)) != 1:
        raise AnybitsError("eval needs one thing to measure: --text FILE, --dataset NAME or --tasks TASK[,TASK]")
    report.check_outputs(json_, plot)
    if tasks is not None:
        _run_tasks(model, tasks, chosen, include_path, limit, json_)
        return
    corpus = evaluation.read_corpus(text, dataset)
    most = max_tokens if max_tokens is not None or corpus.max_windows is None else corpus.max_windows * seq_len
    with terminal.counted(console, "evaluating") as step:
        result = evaluation.evaluate(model, chosen, corpus.text, seq_len, most, reference, step, stride, corpus.source)
    console.print(terminal.result_table(result))
    if json_ is not None:
        checkpoint.write_json(json_, result.to_dict())
    if plot is not None:
        report.plot([(Path(model).name, result)], plot)


def _run_tasks(
    model: str,
    tasks: str,
    precisions: tuple[Single, ...],
    include_path: Path | None,
    limit: int | None,
    out: Path | None,
) -> None:
    from anybits import checkpoint, terminal
    from anybits.integrations import lm_eval

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with terminal.counted(console, "precisions") as step:
        results = lm_eval.run_tasks(model, names, precisions, include_path, limit, progress=step)
    console.print(terminal.task_table(model, results))
    if out is not None:
        checkpoint.write_json(out, {"model": model, "limit": limit, "results": results})


@app.command(rich_help_panel="Main")
def inspect(
    model: Model,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what a quantized model stores, and the bytes that each precision reads.

    Example: `anybits inspect llama-any`
    """
    from anybits import terminal
    from anybits.evaluate.inspection import inspect_checkpoint

    facts = inspect_checkpoint(model)
    if json_:
        typer.echo(json.dumps(facts, indent=2))
    else:
        for table in terminal.inspection_tables(facts):
            console.print(table)


@app.command(rich_help_panel="Interoperate")
def report(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Folders of quantized models.", show_default=False)
    ],
    text: Annotated[Path, typer.Option(help="Text file to predict; keep it apart from calibration text.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the report to.")] = Path("report"),
    reference: Annotated[str | None, typer.Option(help="The original float model to compare with.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Use only this many tokens of the text.")] = 8192,
) -> None:
    """Write one report, with plots, about quality, memory and speed; its figures stand in figures.json beside it.

    Example: `anybits report demo-out/anybcq demo-out/any-precision -o report --text corpus.txt`
    """
    from anybits.evaluate import evaluation, full_report

    def show(step: str) -> None:
        console.print(f"measuring: {step}", highlight=False)

    full_report.report(models, out, evaluation.read_text(text), reference, seq_len, max_tokens, progress=show)
    console.print(f"wrote {out / 'report.html'} and {out / 'report.md'}", highlight=False)


@app.command(rich_help_panel="Main")
def bench(
    shapes: Annotated[
        str, typer.Option(help="A model's shapes by name (llama-3.1-8b ...), or NxK,NxK.")
    ] = "llama-3.1-8b",
    precisions: Annotated[str, typer.Option(help="Precisions to time.")] = "2-4",
    rows: Annotated[str, typer.Option(help="Rows of activations, comma-separated.")] = "1",
    methods: Annotated[
        str, typer.Option(help="Levels to time, comma-separated; also anybcq-8bit.")
    ] = "anybcq,any-precision",
    rounds: Annotated[int, typer.Option(help="Times that everything is measured in turn; medians are shown.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_: Annotated[Path | None, typer.Option("--json", help="Write one JSON object a line.")] = None,
    e2e: Annotated[bool, typer.Option("--e2e", help="Time whole decode steps of a random-weight model.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Random weights: --e2e has no others.")] = False,
    context: Annotated[str, typer.Option(help="Positions before the timed one, comma-separated (--e2e).")] = "512",
    quantize_lm_head: Annotated[bool, typer.Option(help="Quantize the output layer too (--e2e).")] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of their own; others repeat them. Default: what fits (--e2e).")
    ] = None,
    activation_bits: ActivationBits = None,
) -> None:
    """Time the kernels: beside torch's bf16 product and the read bandwidth of the same run, correctness first.

    Example: `anybits bench --shapes llama-3.1-8b --precisions 2,3,4`
    """
    from anybits import terminal
    from anybits.evaluate.kernels import bench_on

    if e2e:
        from anybits.evaluate.end_to_end import decoding_on

        method, positions = methods.split(",")[0], terminal.whole_numbers(context, "context")
        timed = decoding_on(device)(shapes, precisions, positions, method, rounds, quantize_lm_head, layers, json_)
        for step in timed:
            console.print(terminal.decode_line(step), highlight=False, soft_wrap=True)
        return
    counts = terminal.whole_numbers(rows, "rows")
    timings = bench_on(device)(shapes, precisions, counts, methods.split(","), rounds=rounds, json_file=json_)
    for timing in timings:
        console.print(terminal.timing_line(timing), highlight=False, soft_wrap=True)
