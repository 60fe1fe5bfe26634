"""What all commands share: the application they register with, the console they print to, the argument MODEL."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Quantize a language model **once** into bit-planes, then run it at **any precision from 2 to 8 bits**.",
)
console = Console()


def _keep_activation_bits(given: int | None) -> int | None:
    if given not in (None, 8, 16):
        raise typer.BadParameter(f"{given} is not allowed: choose 16 or 8")
    if given is not None:
        os.environ["ANYBITS_CPU_ACTIVATION_BITS"] = str(given)
    return given


ActivationBits = Annotated[
    int | None,
    typer.Option(
        help="Bits of activations in CPU kernels: 16, or 8: faster with many rows, less exact. Default: 16.",
        callback=_keep_activation_bits,
        show_default=False,
    ),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a quantized model.", show_default=False)]
