"""Texts, token windows, and the Fisher information against gradients taken one by one."""

import sys
import types
from pathlib import Path

import pytest
import torch

from anybits import AnybitsError
from anybits.quantize.calibration import read_texts, sample_windows
from anybits.quantize.targets import find_blocks, target_patterns
from conftest import tiny_model


def test_texts_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo")
    assert read_texts(str(tmp_path / "a.txt")) == ["héllo"]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(AnybitsError, match="is not UTF-8 text"):
        read_texts(str(tmp_path / "b.txt"))
    with pytest.raises(AnybitsError, match="does not exist"):
        read_texts(str(tmp_path / "c.txt"))


def test_windows_are_seeded_and_lie_in_the_text() -> None:
    def windows(seed: int) -> torch.Tensor:
        return sample_windows(["ab" * 50, "cd" * 50], lambda t: [ord(c) for c in t], 5, 16, seed, "x").tokens

    assert windows(0).shape == (5, 16)
    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))
    joined = "ab" * 50 + "cd" * 50
    for window in windows(3):
        assert "".join(map(chr, window.tolist())) in joined
    with pytest.raises(AnybitsError, match="x has 2 tokens, fewer than one calibration window of 16"):
        sample_windows(["ab"], lambda t: [1, 2], 5, 16, 0, "x")


def test_targets_are_linears_and_experts_but_no_routers() -> None:
    moe = tiny_model("qwen3-moe")
    patterns = target_patterns(moe)
    assert "model.layers.*.mlp.experts.gate_up_proj" in patterns
    assert "model.layers.*.self_attn.q_proj" in patterns
    assert not [p for p in patterns if p.endswith("gate") or "lm_head" in p]
    with pytest.raises(AnybitsError, match="no list of decoder blocks"):
        find_blocks(torch.nn.Linear(2, 2))


def test_texts_come_from_datasets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    calls = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, object]]:
        calls.append((name, config, split, streaming))
        return [{"id": 1, "text": "one"}, {"id": 2, "content": "two"}, {"id": 3}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset, raising=False)
    assert read_texts("some/name") == ["one", "two", ""]
    read_texts("allenai/c4:en:validation")
    assert calls == [("some/name", None, "train", True), ("allenai/c4", "en", "validation", True)]

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(AnybitsError, match="'some/name' cannot be read .*: no route$"):
        read_texts("some/name")
