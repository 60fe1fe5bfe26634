"""Commands that run a model: generate, serve, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anybits.cli.app import ActivationBits, Model, app, console
from anybits.errors import AnybitsError


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
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    static_cache: Annotated[
        bool | None, typer.Option(help="Decode in a cache of fixed size: CUDA graphs on a GPU. Default: on a GPU.")
    ] = None,
    activation_bits: ActivationBits = None,
) -> None:
    """Continue a prompt at one precision; only the planes of that precision are read from disk.

    Example: `anybits generate llama-any --precision 4 --draft-precision 2 --prompt "def fib(n):"`
    """
    from anybits import terminal
    from anybits.decode.statistics import Statistics
    from anybits.integrations import static_decode
    from anybits.integrations import transformers as hf

    chosen = hf.chosen_device(device)
    stored, most = hf.stored_config(model), None if schedule is not None else precision
    if most is not None and draft_precision is not None:
        most = str(max(stored.planes_of(most), stored.planes_of(draft_precision)))
    loaded, tokenizer = hf.load_model(model, max_precision=most).to(chosen), hf.load_tokenizer(model)
    if static_cache is None and (static_cache := chosen != "cpu") and (reason := static_decode.refusal(loaded)):
        typer.echo(f"no CUDA graphs: {reason}", err=True)
        static_cache = False
    passes: dict[str, Any] = {"draft_precision": draft_precision, "draft_tokens": draft_tokens, "schedule": schedule}
    passes |= {"precision": precision, "statistics": (statistics := Statistics()), "static_cache": static_cache}
    hf.generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, seed, stream=True, **passes)
    if statistics.tokens:
        typer.echo(terminal.passes_line(statistics), err=True)


@app.command(rich_help_panel="Main")
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests. Default: the folder's.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Bits or profile of requests that name none, or auto. Default: highest.")
    ] = None,
    draft_precision: Annotated[
        str | None, typer.Option(help="Bits or profile that draft while one request runs alone. Default: no drafts.")
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
    prefix_reuse: Annotated[
        bool, typer.Option(help="Compute what prompts of one precision have in common at their start only once.")
    ] = True,
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
    activation_bits: ActivationBits = None,
) -> None:
    """Serve MODEL over OpenAI's API; every request chooses its precision, and a chat page is at /.

    Example: `anybits serve llama-any --port 8000 --precision auto --target-tpot-ms 50`
    """
    chosen = dict(locals())  # the parameters are named like the fields of Options
    del chosen["activation_bits"]  # the kernels' setting
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
    """Quantize the bundled model with both methods and watch it answer at every precision (under 3 minutes).

    Example: `anybits demo -o demo-out`
    """
    from anybits.demo.run import run_demo

    run_demo(out, console)
