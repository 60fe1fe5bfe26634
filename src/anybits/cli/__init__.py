"""The command line: reads arguments, calls the library, prints. Errors are one sentence and exit code 1."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from anybits.cli import making, measuring, running  # noqa: F401  (registers the commands)
from anybits.cli.app import app, console
from anybits.errors import AnybitsError

__all__ = ["app", "console", "main"]

# The base of all that typer raises for wrong arguments; typer exports only its leaves.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


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
