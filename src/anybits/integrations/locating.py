"""What a user may name as the float model: a folder, or a name on the hub. Says what else was named instead."""

from __future__ import annotations

import re
from pathlib import Path

from anybits.errors import AnybitsError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def check_source(source: str) -> None:
    """Raise AnybitsError unless `source` is a folder with a config.json, or can be a name on the hub.

    Reads nothing else, so that a wrong path is told before anything slow starts.
    """
    path = Path(source)
    if path.is_file():
        kind = "a GGUF file, whose weights are quantized already" if path.suffix == ".gguf" else "a file"
        raise AnybitsError(f"{source} is {kind}: give the folder of the original float model, with its config.json")
    if path.is_dir():
        if not (path / "config.json").is_file():
            gguf = " but GGUF files, whose weights are quantized already" if any(path.glob("*.gguf")) else ""
            raise AnybitsError(f"{source} has no config.json{gguf}: give the folder of the original float model")
        return
    if source.startswith((".", "~")) or not _HUB_NAME.fullmatch(source):
        raise AnybitsError(f"{source} does not exist: give a model's folder, or a name on the hub such as org/model")
