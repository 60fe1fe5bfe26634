"""The command line: reads arguments, calls the library, prints. Errors are one sentence and exit code 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anybits.config import Single
from anybits.errors import AnybitsError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Quantize a language model **once** into bit-planes, then run it at **any precision from 2 to 8 bits**.",
)
console = Console()

# The base of all that typer raises for wrong arguments; typer exports only its leaves.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

Model = Annotated[str, typer.Argument(help="Folder of a quantized model.", show_default=False)]


@app.command(rich_help_panel="Main")
def quantize(
    model: Annotated[str, typer.Argument(help="Float model: a folder, or a name on the hub.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the quantized model to.")],
    method: Annotated[str, typer.Option(help="anybcq (scales per group) or any-precision (codebooks).")] = "anybcq",
    precisions: Annotated[str, typer.Option(help="Precisions to store: a range 2-4 or a list 2,3,4.")] = "2-4",
    group_size: Annotated[int, typer.Option(help="Columns that share scales: multiple of 32, or -1 (row).")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Store no offsets (anybcq).")] = False,
    preset: Annotated[
        str, typer.Option(help="fast: no text. default: calibrated. best: also block reconstruction (slow).")
    ] = "default",
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file, or Hugging Face dataset NAME[:CONFIG[:SPLIT]]. Default: allenai/c4:en."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 512,
    steps: Annotated[int, typer.Option(help="Reconstruction steps a block and precision (preset best).")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of all that is random: the same seed gives the same bytes.")] = 0,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show time, memory and disk that it takes; stop.")] = False,
) -> None:
    """Quantize MODEL once, for all precisions.

    The folder holds an ordinary Hugging Face model whose planes serve every precision. A run that was
    interrupted goes on where it stopped when the same command is typed again.

    Example: `anybits quantize meta-llama/Llama-3.1-8B -o llama-any --precisions 2-4`
    """
    from anybits.config import Recipe, parse_precisions
    from anybits.integrations.quantizing import estimate_model, quantize_model
    from anybits.terminal import estimate_table, shown_progress

    recipe = Recipe(
        method=method,
        precisions=parse_precisions(precisions),
        group_size=group_size,
        symmetric=symmetric,
        preset=preset,
        samples=samples,
        seq_len=seq_len,
        steps=steps,
        seed=seed,
    )
    if dry_run:
        console.print(estimate_table(model, out, estimate_model(model, recipe)))
        return
    with shown_progress(console) as progress:
        quantize_model(model, out, recipe, calibration, device, progress)
    console.print(f"wrote {out}: precisions {', '.join(map(str, recipe.precisions))}")
    console.print(f"next: anybits generate {out} --precision {recipe.precisions[0]} --prompt 'def fib(n):'")


@app.command(rich_help_panel="Main")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    precision: Annotated[
        str | None, typer.Option(help="Bits to run at, or a profile such as 2.5. Default: the highest stored.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher is more random.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    draft_precision: Annotated[
        str | None, typer.Option(help="Draft at these bits, verify at --precision: the same text, sooner.")
    ] = None,
    draft_tokens: Annotated[int | None, typer.Option(help="Tokens of a draft. Default: as many as pay.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Bits that change: split:8,4, length:4,3@64, …")] = None,
) -> None:
    """Continue a prompt at one precision; only the planes of that precision are read from disk.

    Example: `anybits generate llama-any --precision 4 --draft-precision 2 --prompt "def fib(n):"`
    """
    from anybits import terminal
    from anybits.decode.statistics import Statistics
    from anybits.integrations import transformers as hf

    loaded, tokenizer = hf.load_model(model, max_precision=precision), hf.load_tokenizer(model)
    passes: dict[str, Any] = {"draft_precision": draft_precision, "draft_tokens": draft_tokens, "schedule": schedule}
    passes |= {"precision": precision, "statistics": (statistics := Statistics())}
    hf.generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, seed, stream=True, **passes)
    if statistics.tokens:
        typer.echo(terminal.passes_line(statistics), err=True)


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
    plot: Annotated[Path | None, typer.Option(help="Write a plot of perplexity against bytes (PNG).")] = None,
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
    """Show what a quantized model stores, and the bytes that each precision reads."""
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
    models: Annotated[list[str], typer.Argument(help="Folders of quantized models.", show_default=False)],
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
def profile(
    model: Model,
    text: Annotated[str, typer.Option(help="Calibration text file or dataset; keep it apart from evaluation text.")],
    budgets: Annotated[
        str | None, typer.Option(help="Bits, as 2.25,2.5 or NAME=2.3. Default: every quarter of a bit.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 512,
    generations: Annotated[int, typer.Option(help="Generations of the search; 0 takes the estimate as it is.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of all that is random: the same seed finds the same.")] = 0,
    reference: Annotated[
        str | None, typer.Option(help="Float model to stay close to. Default: the highest stored precision.")
    ] = None,
) -> None:
    """Give every matrix a precision of its own, so that MODEL also runs at 2.5 bits; stored in the checkpoint.

    What was measured is kept beside the model: an interrupted run goes on where it stopped, and another budget
    costs only its search.

    Example: `anybits profile llama-any --text corpus.txt --budgets 2.25,2.5,2.75`
    """
    from anybits import terminal
    from anybits.evaluate import profiling
    from anybits.quantize.profile_search import Search

    settings = profiling.Settings(samples, seq_len, seed, Search(generations=generations))
    wanted = None if budgets is None else profiling.parse_budgets(budgets)
    with terminal.profiling_progress(console) as progress:
        profiling.profile_model(model, text, wanted, settings, reference, progress)


@app.command("import", rich_help_panel="Interoperate")
def import_(
    source: Annotated[str, typer.Argument(help="Folder that Any-Precision's or AnyBCQ's own code wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the model to.")],
) -> None:
    """Turn a checkpoint of the two papers' own code into one of anybits, weight for weight.

    Example: `anybits import Llama-3.1-8B-anybcq2to4-g128 -o llama-any`
    """
    from anybits import terminal
    from anybits.integrations.importers import import_checkpoint

    with terminal.counted(console, "importing") as step:
        stored = import_checkpoint(source, out, step)
    console.print(f"wrote {out}: {stored.method}, precisions {', '.join(map(str, stored.precisions))}")


@app.command(rich_help_panel="Interoperate")
def export(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the dense model to.")],
    precision: Annotated[str, typer.Option(help="The precision or profile to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Write one precision as an ordinary dense model, for tools that do not know anybits.

    Example: `anybits export llama-any --precision 4 -o llama-4bit`
    """
    from anybits.integrations.exporting import export_model

    export_model(model, out, precision, dtype)
    console.print(f"wrote {out}: dense {dtype} weights of precision {precision}")


@app.command(rich_help_panel="Main")
def bench(
    shapes: Annotated[
        str, typer.Option(help="A model's shapes by name (llama-3.1-8b ...), or NxK,NxK.")
    ] = "llama-3.1-8b",
    precisions: Annotated[str, typer.Option(help="Precisions to time.")] = "2-4",
    rows: Annotated[str, typer.Option(help="Rows of activations, comma-separated.")] = "1",
    methods: Annotated[str, typer.Option(help="Levels to time, comma-separated.")] = "anybcq,any-precision",
    rounds: Annotated[int, typer.Option(help="Times that everything is measured in turn; medians are shown.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_: Annotated[Path | None, typer.Option("--json", help="Write one JSON object a line.")] = None,
    e2e: Annotated[bool, typer.Option("--e2e", help="Time whole decode steps of a random-weight model.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Said for clarity: --e2e has no other weights.")] = False,
    context: Annotated[str, typer.Option(help="Positions before the timed one, comma-separated (--e2e).")] = "512",
    quantize_lm_head: Annotated[bool, typer.Option(help="Quantize the output layer too (--e2e).")] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of their own; others repeat them. Default: what fits (--e2e).")
    ] = None,
) -> None:
    """Time the kernels: beside torch's bf16 product and the read bandwidth of the same run, correctness first.

    Example: `anybits bench --shapes llama-3.1-8b --precisions 2,3,4`
    """
    from anybits import terminal
    from anybits.evaluate.kernels import bench_on

    if e2e:
        from anybits.evaluate.end_to_end import bench_decoding

        method, positions = methods.split(",")[0], terminal.whole_numbers(context, "context")
        for step in bench_decoding(shapes, precisions, positions, method, rounds, quantize_lm_head, layers, json_):
            console.print(terminal.decode_line(step), highlight=False, soft_wrap=True)
        return
    counts = terminal.whole_numbers(rows, "rows")
    timings = bench_on(device)(shapes, precisions, counts, methods.split(","), rounds=rounds, json_file=json_)
    for timing in timings:
        console.print(terminal.timing_line(timing), highlight=False, soft_wrap=True)


@app.command(rich_help_panel="Main")
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests. Default: the folder's.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Bits or profile of requests that name none, or auto. Default: highest.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="ANYBITS_API_KEY", help="Key that clients must send.", show_envvar=True)
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    max_rows: Annotated[int, typer.Option(min=1, help="Tokens of one step: prompts come in pieces of this.")] = 512,
    max_queue: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait; more get 429. Default: half of max-batch.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together. Default: the model's.")
    ] = None,
    kv_cache_gb: Annotated[float, typer.Option(min=0.0, help="Memory for keys and values.")] = 2.0,
    target_tpot_ms: Annotated[
        float | None, typer.Option(min=0.001, help="auto: milliseconds that a token may take.")
    ] = None,
    target_ttft_ms: Annotated[float | None, typer.Option(min=0.001, help="auto: milliseconds to the first.")] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds that one request may take.")
    ] = 600.0,
    drain_s: Annotated[
        float, typer.Option("--drain", min=1, help="Seconds to finish open requests after SIGTERM.")
    ] = 60.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Size of one request's body.")] = 4.0,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file to use instead of the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve MODEL over OpenAI's API; every request chooses its precision, and a chat page is at /.

    Example: `anybits serve llama-any --port 8000 --precision auto --target-tpot-ms 50`
    """
    chosen = dict(locals())  # the parameters are named like the fields of Options
    import importlib.util
    import logging

    missing = [m for m in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(m) is None]
    if missing:
        raise AnybitsError(f"{' and '.join(missing)} not found: the server needs pip install 'anybits[serve]'")
    from anybits.serve.launch import Options, run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    run(Options(**chosen), lambda url: console.print(f"serving {model} at {url}", highlight=False, soft_wrap=True))


@app.command(rich_help_panel="Main")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the two quantized models and the plot.")] = Path(
        "demo-out"
    ),
) -> None:
    """Quantize the bundled model with both methods and watch it answer at every precision (under 3 minutes)."""
    from anybits.demo.run import run_demo

    run_demo(out, console)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    """Hold the options that stand before a command."""
    if version:
        from anybits import __version__

        typer.echo(f"anybits {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0, or with 1 after one sentence on standard error."""
    code: Any = 1
    try:
        code = app(args=arguments, standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message())
    except AnybitsError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; finished blocks of a quantization stay, and the same command resumes it")
    except MemoryError:
        _fail("out of memory; finished blocks of a quantization stay, and the same command resumes it")
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    sys.exit(1 if code else 0)


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)
