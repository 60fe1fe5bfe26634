"""Texts of Hugging Face datasets, for calibration and for evaluation. The only file that imports `datasets`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from anybits.errors import AnybitsError

_MAX_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Corpus:
    """A text to evaluate on, what it is in words, and the windows of it that are usual (None: all)."""

    text: str
    source: str
    max_windows: int | None = None


def calibration_documents(source: str) -> list[str]:
    """Return documents of the dataset NAME[:CONFIG[:SPLIT]]; a row without `text` gives its first string."""
    name, config, split, _ = _parts(source, 3)
    rows = _load(source, name, config or None, split=split or "train", streaming=True, limit=_MAX_DOCUMENTS)
    return [_any_text(row) for row in rows]


def evaluation_corpus(source: str) -> Corpus:
    r"""Return wikitext2, c4, or the dataset NAME[:CONFIG[:SPLIT[:COLUMN]]] as it is usually evaluated.

    wikitext2: the raw test split, its rows joined by "\n\n". c4: the first 1100 documents of the first shard of
    the English validation split, joined by a space, and of these 256 windows. Others: split test, column text,
    joined like wikitext2. SPLIT may be a slice such as test[:100].
    """
    if source == "wikitext2":
        rows = _load(source, "Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        return Corpus("\n\n".join(_column(rows, "text", source)), "wikitext2 (raw, test)")
    if source == "c4":
        files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        rows = _load(source, "allenai/c4", data_files=files, split="validation", limit=1100)
        return Corpus(" ".join(_column(rows, "text", source)), "c4 (en, validation, 1100 documents)", 256)
    name, config, split, column = _parts(source, 4)
    rows = _load(source, name, config or None, split=split or "test")
    return Corpus("\n\n".join(_column(rows, column or "text", source)), f"{source} ({len(rows)} rows)")


def _parts(source: str, most: int) -> tuple[str, str, str, str]:
    parts = re.split(r":(?![^\[]*\])", source, maxsplit=most - 1)  # a split may be a slice, test[:100]
    if not parts[0]:
        raise AnybitsError(
            f"dataset '{source}' has no name: give NAME:CONFIG:SPLIT, of which the last two may be left out"
        )
    name, config, split, column = parts + [""] * (4 - len(parts))
    return name, config, split, column


def _load(source: str, *what: str | None, limit: int | None = None, **how: Any) -> list[dict[str, Any]]:
    """Return rows of a dataset; raise AnybitsError without the library or the network."""
    try:
        import datasets
    except ImportError:
        raise AnybitsError(
            f"'{source}' is no file, and reading it as a dataset needs: pip install 'anybits[eval]'"
        ) from None
    try:
        return list(islice(datasets.load_dataset(*what, **how), limit))
    except Exception as error:  # the library raises its own and its network stack's many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AnybitsError(f"dataset '{source}' cannot be read (give a text file instead?): {reason}") from None


def _any_text(row: dict[str, Any]) -> str:
    if isinstance(row.get("text"), str):
        return row["text"]
    return next((value for value in row.values() if isinstance(value, str)), "")


def _column(rows: list[dict[str, Any]], column: str, source: str) -> list[str]:
    if not rows:
        raise AnybitsError(f"dataset '{source}' has no rows")
    texts = [name for name, value in rows[0].items() if isinstance(value, str)]
    if column not in texts:
        raise AnybitsError(
            f"dataset '{source}' has no column of text named '{column}': choose {' or '.join(texts) or 'another'}, "
            "as NAME:CONFIG:SPLIT:COLUMN"
        )
    return [row[column] for row in rows]
