"""Commands that write a model: quantize, profile, import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anybits.cli.app import Model, app, console


@app.command(rich_help_panel="Main")
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Float model: a folder, or a name on the hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the quantized model to.")],
    method: Annotated[str, typer.Option(help="anybcq (scales per group) or any-precision (codebooks).")] = "anybcq",
    precisions: Annotated[str, typer.Option(help="Precisions to store: a range 2-4 or a list 2,3,4.")] = "2-4",
    group_size: Annotated[int, typer.Option(help="Columns that share scales: multiple of 32, or -1 (row).")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Store no offsets (anybcq).")] = False,
    scale_bits: Annotated[
        int, typer.Option(help="Bits of a scale or offset (anybcq): 16, or 8 in steps of its row: smaller and faster.")
    ] = 16,
    preset: Annotated[
        str,
        typer.Option(
            help="fast: no text. default: calibrated. best: levels also tuned, block by block and end to end (slow)."
        ),
    ] = "default",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, or Hugging Face dataset NAME[:CONFIG[:SPLIT]], which needs anybits[eval]. "
            "Default: allenai/c4:en."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 512,
    steps: Annotated[int, typer.Option(help="Reconstruction steps a block and precision (preset best).")] = 200,
    distillation_steps: Annotated[
        int,
        typer.Option(help="End-to-end steps a precision (preset best): the float model teaches the next tokens."),
    ] = 200,
    seed: Annotated[int, typer.Option(help="Seed of all that is random: the same seed gives the same bytes.")] = 0,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    quantize_lm_head: Annotated[
        bool, typer.Option("--quantize-lm-head", help="Quantize the output layer too: fewer bytes a token.")
    ] = False,
    expert_memory: Annotated[
        float,
        typer.Option(min=0, help="GiB for the second moments of several experts at once; same result, less time."),
    ] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show time, memory and disk that it takes; stop.")] = False,
) -> None:
    """Quantize MODEL once, for all precisions.

    The folder holds an ordinary Hugging Face model whose planes serve every precision. A run that was
    interrupted goes on where it stopped when the same command is typed again.

    Example: `anybits quantize meta-llama/Llama-3.1-8B -o llama-any --precisions 2-4`
    """
    from anybits.config import Recipe, parse_precisions
    from anybits.integrations.quantizing import estimate_model, quantize_model
    from anybits.terminal import estimate_table, program, shown_progress

    recipe = Recipe(
        method=method,
        precisions=parse_precisions(precisions),
        group_size=group_size,
        symmetric=symmetric,
        preset=preset,
        samples=samples,
        seq_len=seq_len,
        steps=steps,
        distillation_steps=distillation_steps,
        seed=seed,
        quantize_lm_head=quantize_lm_head,
        scale_bits=scale_bits,
    )
    memory = int(expert_memory * (1 << 30))
    if dry_run:
        console.print(estimate_table(model, out, estimate_model(model, recipe, memory)))
        return
    with shown_progress(console) as progress:
        quantize_model(model, out, recipe, calibration, device, progress, memory)
    console.print(f"wrote {out}: precisions {', '.join(map(str, recipe.precisions))}", soft_wrap=True)
    command = f"{program()} generate {out} --precision {recipe.precisions[0]} --prompt 'def fib(n):'"
    console.print(f"next: {command}", highlight=False, soft_wrap=True)


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
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder that Any-Precision's or AnyBCQ's own code wrote.")
    ],
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
