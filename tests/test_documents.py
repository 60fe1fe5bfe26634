"""Evaluation texts by name, with a stand-in for the datasets library: the calls, the joining, and the refusals."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import anybits
from anybits import AnybitsError
from anybits.quantize.documents import evaluation_corpus
from conftest import save_tiny
from test_cli import run


class Hub(types.ModuleType):
    """Stands in for `datasets`: answers every name with `rows` and remembers what it was asked."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("datasets")
        self.rows, self.calls = rows, []

    def load_dataset(self, *what: Any, **how: Any) -> list[dict[str, Any]]:
        self.calls.append((what, how))
        return self.rows


def hub(monkeypatch: pytest.MonkeyPatch, *texts: str, column: str = "text") -> Hub:
    made = Hub([{"id": i, column: text} for i, text in enumerate(texts)])
    monkeypatch.setitem(sys.modules, "datasets", made)
    return made


def test_wikitext2_is_the_raw_test_split_joined_by_empty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, "", " = Title = \n", "text")
    corpus = evaluation_corpus("wikitext2")
    assert corpus.text == "\n\n = Title = \n\n\ntext"
    assert corpus.max_windows is None
    assert asked.calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_c4_is_1100_documents_of_the_first_validation_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, *map(str, range(2000)))
    corpus = evaluation_corpus("c4")
    assert corpus.text == " ".join(map(str, range(1100)))
    assert corpus.max_windows == 256
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert asked.calls == [(("allenai/c4",), {"data_files": files, "split": "validation"})]


def test_any_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, "a", "b", column="content")
    corpus = evaluation_corpus("own/data:config:train[:2]:content")
    assert (corpus.text, corpus.source) == ("a\n\nb", "own/data:config:train[:2]:content (2 rows)")
    assert asked.calls == [(("own/data", "config"), {"split": "train[:2]"})]
    with pytest.raises(AnybitsError, match="no column of text named 'text': choose content"):
        evaluation_corpus("own/data")
    assert asked.calls[-1] == (("own/data", None), {"split": "test"})


def test_what_cannot_be_read_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch)
    with pytest.raises(AnybitsError, match="'own/data' has no rows"):
        evaluation_corpus("own/data")
    with pytest.raises(AnybitsError, match="has no name"):
        evaluation_corpus(":test")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", unreachable)
    with pytest.raises(AnybitsError, match="'wikitext2' cannot be read .*: no route$"):
        evaluation_corpus("wikitext2")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AnybitsError, match=r"needs: pip install 'anybits\[eval\]'"):
        evaluation_corpus("c4")


def test_the_command_states_text_window_and_stride(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_tiny(tmp_path / "float", "llama")
    anybits.quantize(str(tmp_path / "float"), tmp_path / "any", anybits.Recipe(preset="fast", group_size=32))
    hub(monkeypatch, *["the quick brown fox"] * 9)
    arguments = ("--dataset", "wikitext2", "--seq-len", 32, "--stride", 8, "--precisions", "2,4")
    code, out, _ = run(capsys, "eval", tmp_path / "any", *arguments, "--json", tmp_path / "r.json")
    assert code == 0
    words = " ".join(out.split())
    assert "windows of 32 every 8 tokens, each token counted once" in words
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["text"], result["seq_len"], result["stride"]) == ("wikitext2 (raw, test)", 32, 8)
    assert result["text_tokens"] == 9 * 19 + 8 * 2 - 1
