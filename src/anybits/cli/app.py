"""What all commands share: the application they register with, the console they print to, the argument MODEL."""

from __future__ import annotations

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

Model = Annotated[str, typer.Argument(help="Folder of a quantized model.", show_default=False)]
