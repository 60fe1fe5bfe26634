"""Calibration: texts from a file or a dataset, and token windows from texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from anybits.errors import AnybitsError
from anybits.quantize.documents import calibration_documents

DEFAULT_DATASET = "allenai/c4:en"


@dataclass(frozen=True)
class Calibration:
    """Token windows int64 `[samples, seq_len]` and where they came from."""

    tokens: torch.Tensor
    source: str

    @property
    def sha256(self) -> str:
        """The hash of the tokens: two runs with the same hash saw the same data."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def read_texts(source: str) -> list[str]:
    """Return the text of a file, or the documents of a Hugging Face dataset named NAME[:CONFIG[:SPLIT]]."""
    path = Path(source)
    if path.is_file():
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError:
            raise AnybitsError(f"{source} is not UTF-8 text") from None
    if path.suffix in (".txt", ".json", ".jsonl", ".md", ".py") or source.startswith((".", "/")):
        raise AnybitsError(f"{source} does not exist: give a text file or the name of a Hugging Face dataset")
    return calibration_documents(source)


def sample_windows(
    texts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    samples: int,
    seq_len: int,
    seed: int,
    source: str,
) -> Calibration:
    """Return `samples` windows of `seq_len` tokens at seeded places of the joined texts.

    Raises AnybitsError when the texts hold fewer than one window.
    """
    ids: list[int] = []
    wanted = 8 * samples * seq_len  # enough to choose from; a dataset may be endless
    for text in texts:
        ids.extend(encode(text))
        if len(ids) >= wanted:
            break
    if len(ids) < seq_len:
        raise AnybitsError(
            f"{source} has {len(ids)} tokens, fewer than one calibration window of {seq_len}: "
            "give more text or a smaller --seq-len"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - seq_len + 1, (samples,), generator=generator)
    tokens = torch.tensor(ids)
    return Calibration(torch.stack([tokens[s : s + seq_len] for s in starts.tolist()]), source)
