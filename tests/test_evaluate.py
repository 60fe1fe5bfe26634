"""Perplexity and divergence, against transformers' own loss and plain formulas."""

import math
from pathlib import Path

import pytest
import torch

from anybits import AnybitsError
from anybits.evaluate import perplexity, report
from conftest import tiny_model

IDS = torch.randint(3, 64, (330,), generator=torch.Generator().manual_seed(1)).tolist()


def logits_of(model: torch.nn.Module) -> perplexity.Logits:
    return lambda tokens: model(input_ids=tokens).logits


def test_perplexity_is_that_of_the_models_own_loss() -> None:
    model = tiny_model("llama")
    windows = perplexity.split_windows(IDS, 64, None)
    assert len(windows) == 5
    scores, own = perplexity.score(windows, [logits_of(model)], None)
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() for w in windows]
    assert scores[0].perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert scores[0].tokens == 5 * 63
    assert own is None


def test_divergence_is_that_of_the_definition() -> None:
    model, other = tiny_model("llama"), tiny_model("qwen3")
    windows = perplexity.split_windows(IDS, 64, 130)
    scores, own = perplexity.score(windows, [logits_of(other), logits_of(model)], logits_of(model))
    assert own is not None
    kl, agreed, tokens = 0.0, 0, 0
    with torch.no_grad():
        for w in windows:
            p = model(input_ids=w).logits[0, :-1].double().softmax(-1)
            q = other(input_ids=w).logits[0, :-1].double().softmax(-1)
            kl += float((p * (p / q).log()).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(p)
    assert scores[0].kl_divergence == pytest.approx(kl / tokens, rel=1e-4)
    assert scores[0].top1_agreement == agreed / tokens
    assert scores[1].kl_divergence == pytest.approx(0, abs=1e-6)
    assert scores[1].top1_agreement == 1
    assert scores[1].perplexity == own.perplexity


def test_windows_do_not_overlap_and_short_texts_still_count() -> None:
    assert [len(w[0]) for w in perplexity.split_windows(list(range(100)), 32, None)] == [32, 32, 32]
    assert torch.cat(perplexity.split_windows(list(range(100)), 32, 64), dim=1)[0].tolist() == list(range(64))
    assert [len(w[0]) for w in perplexity.split_windows([1, 2, 3], 32, None)] == [3]
    with pytest.raises(AnybitsError, match="1 tokens: at least 2"):
        perplexity.split_windows([1], 32, None)
    with pytest.raises(AnybitsError, match="sequence length 1"):
        perplexity.split_windows([1, 2], 1, None)


@pytest.mark.parametrize(("seq_len", "stride"), [(64, 32), (64, 1), (50, 49), (100, 33), (400, 7)])
def test_strided_perplexity_is_that_of_the_usual_loop(seq_len: int, stride: int) -> None:
    model = tiny_model("llama")
    text = IDS if stride > 1 else IDS[:80]
    ids = torch.tensor([text])
    nll = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for token in range(1, len(text)):  # token by token: the first window that holds it, cut before it
            start = 0 if token < seq_len else -(-(token + 1 - seq_len) // stride) * stride
            nll -= model(input_ids=ids[:, start:token]).logits[0, -1].double().log_softmax(-1)[text[token]]
    windows, fresh = perplexity.stride_windows(text, seq_len, stride, None)
    scores, _ = perplexity.score(windows, [logits_of(model)], None, fresh=fresh)
    assert scores[0].tokens == sum(fresh) == len(text) - 1
    assert scores[0].perplexity == pytest.approx(float((nll / (len(text) - 1)).exp()), rel=1e-5)


def test_strided_divergence_counts_each_token_once() -> None:
    model, other = tiny_model("llama"), tiny_model("qwen3")
    windows, fresh = perplexity.stride_windows(IDS, 64, 20, 200)
    scores, own = perplexity.score(windows, [logits_of(other)], logits_of(model), fresh=fresh)
    kl = 0.0
    with torch.no_grad():
        for window, last in zip(windows, fresh, strict=True):
            p, q = (m(input_ids=window).logits[0, :-1].double().softmax(-1)[-last:] for m in (model, other))
            kl += float((p * (p / q).log()).sum())
    assert own is not None
    assert own.tokens == scores[0].tokens == 199
    assert scores[0].kl_divergence == pytest.approx(kl / 199, rel=1e-4)


def test_the_plot_shows_every_model(tmp_path: Path) -> None:
    results = tuple(report.Result(p, 10 + 2.0**-p, 1000 * p, p + 0.25) for p in (2, 3, 4))
    evaluation = report.Evaluation("m", 100, 64, results, report.Reference(10.0, 16000))
    report.plot([("one", evaluation), ("two", evaluation)], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
