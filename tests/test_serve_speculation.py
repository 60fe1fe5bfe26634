"""Drafts in the engine: the text of plain decoding, through mixes, ends and full caches; the sampler's distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from anybits.decode.draft_length import FixedLength
from anybits.serve.blocks import BLOCK
from anybits.serve.engine import Engine, Limits
from anybits.serve.sampling import Sampler, Sampling
from anybits.serve.sequence import Fixed, Sequence
from anybits.serve.speculation import can_draft
from test_engine import load, quantized

PROMPT = [5, 9, 33, 12, 60, 7, 21]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = quantized(tmp_path_factory.mktemp(name), name)
        return made[name]

    return folder


def drafting(folder: Path, drafts: int = 4, limits: Limits | None = None) -> Engine:
    """An engine that always drafts as far, whatever the clock says."""
    engine = Engine(load(folder), limits)
    engine.speculation.length = partial(FixedLength, drafts)
    return engine


def ask(tokens: int = 50, draft: int | str | None = 3, sampling: Sampling | None = None, prompt=PROMPT) -> Sequence:
    return Sequence(list(prompt), tokens, Fixed(4), sampling or Sampling(), draft=draft)


def finish(engine: Engine, *sequences: Sequence) -> list[list[int]]:
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        engine.step()
    assert engine.scheduler.pool.used == 0
    return [s.tokens[len(s.prompt) :] for s in sequences]


def counted(engine: Engine) -> tuple[int, int]:
    pairs = engine.speculation.pairs.values()
    return sum(p.statistics.drafted for p in pairs), sum(p.statistics.accepted for p in pairs)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "opt", "qwen3-moe"])
def test_greedy_text_is_that_of_plain_decoding(name: str, folders: Callable[[str], Path]) -> None:
    engine = drafting(folders(name))
    plain = finish(engine, ask(draft=None))
    assert counted(engine) == (0, 0)
    for draft in (2, "2.5", 3):
        assert finish(engine, ask(draft=draft)) == plain
    drafted, accepted = counted(engine)
    assert drafted >= accepted > 0
    assert drafted > accepted or name in (
        "gemma2",
        "qwen3-moe",
    )  # which may write one text at all bits


def test_a_second_request_joins_and_leaves_mid_way(folders: Callable[[str], Path]) -> None:
    engine = drafting(folders("llama"))
    other = [8, 40, 41] * 9
    plain = [finish(engine, ask(60, None))[0], finish(engine, ask(12, None, prompt=other))[0]]
    first, second = ask(60), ask(12, prompt=other)
    engine.add(first)
    while first.generated < 15:
        engine.step()
    alone = counted(engine)
    engine.add(second)
    while second.finish is None:
        engine.step()
    assert alone[0] > 0
    assert counted(engine) == alone
    finish(engine)
    assert counted(engine)[0] > alone[0]
    assert [s.tokens[len(s.prompt) :] for s in (first, second)] == plain
    assert first.generated_at == {4: 60}


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_and_a_cache_that_just_fits(rows: int, folders: Callable[[str], Path]) -> None:
    block = BLOCK * 4 * 2 * 2 * 2 * 16  # float32, keys and values, layers, heads, head_dim
    limits = Limits(max_batch=1, max_rows=rows, kv_cache_bytes=4 * block)
    engine = drafting(folders("llama"), 6, limits)
    tokens = engine.max_model_len - len(PROMPT)
    assert engine.scheduler.pool.total == 4
    wanted = finish(Engine(load(folders("llama"))), ask(tokens, None))
    assert finish(engine, ask(tokens)) == wanted
    assert (counted(engine)[0] > 0) == (rows > 1)


def test_an_end_token_within_a_round_ends_the_text_there(folders: Callable[[str], Path]) -> None:
    engine = drafting(folders("llama"))
    plain = finish(engine, ask(40, None))[0]
    for at in range(2, 12):
        sequence = replace(ask(40), stop_tokens=frozenset([plain[at]]))
        assert finish(engine, sequence)[0] == plain[: plain.index(plain[at]) + 1]
        assert sequence.finish == "stop"


def test_penalties_are_those_of_plain_decoding(folders: Callable[[str], Path]) -> None:
    engine = drafting(folders("llama"))
    sampling = Sampling(frequency_penalty=0.4, presence_penalty=0.3)
    plain = finish(engine, ask(40, None, sampling))
    assert finish(engine, ask(40, 2, sampling)) == plain
    assert counted(engine)[0] > 0


def test_what_needs_one_pass_a_token_is_decoded_plainly(folders: Callable[[str], Path]) -> None:
    engine = drafting(folders("llama"))
    for sampling in (Sampling(logprobs=2), Sampling(1.0, seed=3)):
        assert finish(engine, ask(20, 2, sampling)) == finish(engine, ask(20, None, sampling))
    finish(engine, replace(ask(20, 3), choice=Fixed(3)))
    assert counted(engine) == (0, 0)
    assert not can_draft(ask())  # its prompt comes first


def test_a_round_that_breaks_fails_its_request_and_frees_its_blocks(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = drafting(folders("llama"))
    sequence = ask()
    with monkeypatch.context() as patch:
        patch.setattr(engine.speculation, "round", lambda *_: 1 / 0)
        finish(engine, sequence)
    assert sequence.finish == "error"
    assert engine.failed == [sequence]
    assert finish(engine, ask()) == finish(engine, ask(draft=None))


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6, "presence_penalty": 1.0}])
def test_scores_have_the_distribution_that_is_drawn_from(how: dict[str, float]) -> None:
    torch.manual_seed(0)
    logits, counts = 2 * torch.randn(32), {3: 2, 9: 1}
    shares = Sampler(Sampling(0.7, **how)).scores(logits, counts).softmax(-1)  # type: ignore[arg-type]
    sampler = Sampler(Sampling(0.7, seed=1, **how))  # type: ignore[arg-type]
    drawn = torch.bincount(torch.tensor([sampler.choose(logits, counts)[0] for _ in range(4000)]), minlength=32)
    assert (shares[drawn == 0] < 0.004).all()
    assert (drawn[shares == 0] == 0).all()
    assert torch.allclose(drawn / 4000, shares, atol=0.035)
