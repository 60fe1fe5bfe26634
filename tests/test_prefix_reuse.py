"""Prefix reuse: computed blocks serve later requests at the same precisions and no others, and never change a text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits.serve.blocks import BLOCK, BlockPool, block_key
from anybits.serve.engine import Engine, Limits
from anybits.serve.sequence import Chunk, Fixed, Sequence
from test_engine import load, quantized

SHARED = [5 + (7 * i) % 50 for i in range(3 * BLOCK)]
LAYER_BLOCK = BLOCK * 4 * 2 * 2 * 2 * 16  # float32, keys and values, layers, heads, head_dim


class Turns:
    """A precision that changes with every step, as `auto` may."""

    def __init__(self, *precisions: int) -> None:
        self.precisions, self.step = precisions, 0

    @property
    def precision(self) -> int:
        return self.precisions[min(self.step, len(self.precisions) - 1)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    return load(quantized(tmp_path_factory.mktemp("prefix"), "llama"))


def counting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows of every forward."""
    rows: list[int] = []
    forward = engine.forward

    def counted(chunks: list[Chunk]) -> torch.Tensor:
        rows.append(sum(c.stop - c.start for c in chunks))
        return forward(chunks)

    monkeypatch.setattr(engine, "forward", counted)
    return rows


def finish(engine: Engine, *sequences: Sequence) -> list[list[int]]:
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        engine.step()
        held = {b for s in engine.scheduler.running for b in s.blocks}
        assert engine.scheduler.pool.used == len(held)
    assert engine.scheduler.pool.used == 0
    return [s.tokens[len(s.prompt) :] for s in sequences]


def ask(tail: list[int], precision: int | str = 3, tokens: int = 8, **more: object) -> Sequence:
    return Sequence(SHARED + tail, tokens, Fixed(precision), **more)  # type: ignore[arg-type]


def test_a_shared_prefix_is_computed_once(llama: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama)
    rows = counting(engine, monkeypatch)
    finish(engine, ask([9, 8, 7], tokens=1))
    later = ask([30, 31], tokens=1)
    finish(engine, later)
    assert rows == [len(SHARED) + 3, 2]
    assert later.reused == {3: len(SHARED)}


def test_requests_that_arrive_together_compute_it_once(
    llama: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine(llama, Limits(reuse_prefixes=False))
    tails = [[9], [30, 31], [50, 51, 52], [9]]
    wanted = finish(plain, *(ask(t) for t in tails), ask([9], 2))
    engine = Engine(llama)
    rows = counting(engine, monkeypatch)
    assert finish(engine, *(ask(t) for t in tails), ask([9], 2)) == wanted
    assert rows[:2] == [2 * (len(SHARED) + 1), 2 + 2 + 3 + 1]


def test_a_whole_prompt_that_is_known_still_computes_its_last_token(llama: transformers.PreTrainedModel) -> None:
    engine = Engine(llama)
    first = finish(engine, ask([]))
    again = ask([])
    assert finish(engine, again) == first
    assert again.reused.total() == len(SHARED) - BLOCK


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "opt", "qwen3-moe"])
def test_texts_are_the_same_with_and_without(name: str, tmp_path: Path) -> None:
    model = load(quantized(tmp_path, name))
    rng, wanted, texts = random.Random(1), [], {}
    for _ in range(24):
        prompt = SHARED[: rng.choice([10, 16, 33, 48])] + [rng.randrange(4, 64) for _ in range(rng.choice([0, 2, 20]))]
        wanted.append((prompt, rng.choice([2, 3, 4, "2.5"]), rng.choice([None, None, 2, 4]), rng.choice([3, 20, 40])))
    for reuse in (True, False):
        engine = Engine(model, Limits(max_batch=5, max_rows=24, kv_cache_bytes=30 * LAYER_BLOCK, reuse_prefixes=reuse))
        sequences = [Sequence(list(p), n, Fixed(q), prefill=early) for p, q, early, n in wanted]
        texts[reuse] = finish(engine, *sequences)
        assert (sum(s.reused.total() for s in sequences) > 0) == reuse
    assert texts[True] == texts[False]


def test_logits_are_the_same_numbers_with_and_without(
    llama: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for reuse in (True, False):
        engine = Engine(llama, Limits(reuse_prefixes=reuse))
        advance = engine.advance
        monkeypatch.setattr(engine, "advance", lambda c, x, a=advance, r=reuse: (seen[r].append(x.clone()), a(c, x))[1])
        for tail in ([9, 8], [9, 8, 7] * 9, [12]):
            finish(engine, ask(tail))
    for one, other in zip(seen[True], seen[False], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("other", [2, 4, "2.5"])
def test_nothing_is_reused_at_another_precision(llama: transformers.PreTrainedModel, other: int | str) -> None:
    engine = Engine(llama)
    finish(engine, ask([9]))
    fresh, prefilled = ask([9], other), Sequence([*SHARED, 9], 8, Fixed(3), prefill=other)  # type: ignore[arg-type]
    finish(engine, fresh)
    assert not fresh.reused
    finish(engine, prefilled)
    assert prefilled.reused == {other: len(SHARED)}  # its prompt rows are those of `fresh`


def test_answers_are_reused_in_the_next_turn(llama: transformers.PreTrainedModel) -> None:
    engine = Engine(llama)
    first = ask([9], tokens=40)
    finish(engine, first)
    computed = (len(first.tokens) - 1) // BLOCK * BLOCK
    same, other = (Sequence([*first.tokens, 30], 4, Fixed(p)) for p in (3, 2))
    finish(engine, same, other)
    assert same.reused == {3: computed}
    assert not other.reused
    careful = Sequence([*first.tokens, 30], 4, Fixed(3), prefill=4)
    finish(engine, careful)
    assert not careful.reused


def test_tokens_of_several_precisions_are_found_only_at_the_same_ones(llama: transformers.PreTrainedModel) -> None:
    engine = Engine(llama)
    choice = Turns(2, 3, 4)
    mixed = Sequence([*SHARED[:BLOCK], 9], 40, choice)
    engine.add(mixed)
    while not engine.idle:
        engine.step()
        choice.step += 1
    assert mixed.generated_at == {2: 1, 3: 1, 4: 38}
    for precision, blocks in ((2, 1), (3, 0), (4, 0)):
        later = Sequence([*mixed.tokens, 30], 1, Fixed(precision))
        finish(engine, later)
        assert later.reused.total() == blocks * BLOCK, precision


@pytest.mark.parametrize("draft", [None, 2])
def test_drafts_neither_reach_kept_blocks_nor_divide_them(
    llama: transformers.PreTrainedModel, draft: int | None
) -> None:
    engine = Engine(llama)
    first = finish(engine, ask([9], tokens=50, draft=draft))[0]
    plain = Engine(llama, Limits(reuse_prefixes=False))
    prompt = [*SHARED, 9, *first]
    later = Sequence(prompt, 20, Fixed(3), draft=2 if draft is None else None)
    assert finish(engine, later) == finish(plain, Sequence(prompt, 20, Fixed(3)))
    assert later.reused.total() == (len(prompt) - 1) // BLOCK * BLOCK


def test_the_longest_unused_blocks_are_evicted_first(llama: transformers.PreTrainedModel) -> None:
    engine = Engine(llama, Limits(max_batch=4, kv_cache_bytes=9 * LAYER_BLOCK, max_model_len=128))
    others = [[20 + i] * (3 * BLOCK) + [9] for i in range(2)]
    finish(engine, *(Sequence(list(p), 1, Fixed(3)) for p in others))
    assert engine.scheduler.pool.cached == 6
    again = Sequence(list(others[0]), 1, Fixed(3))
    finish(engine, again)
    assert again.reused.total() == 3 * BLOCK
    finish(engine, ask([9], tokens=1))  # needs four blocks: three are empty, one of others[1] goes, its last
    left = [Sequence(list(p), 1, Fixed(3)) for p in ([*SHARED, 9], *others)]
    for sequence in left:
        finish(engine, sequence)
    assert [s.reused.total() for s in left] == [3 * BLOCK, 3 * BLOCK, 2 * BLOCK]


def test_cancelling_gives_every_hold_back(llama: transformers.PreTrainedModel) -> None:
    engine = Engine(llama)
    finish(engine, ask([9], tokens=1))
    kept = engine.scheduler.pool.cached
    one, two = ask([30], tokens=50), ask([31], tokens=50)
    for sequence in (one, two):
        engine.add(sequence)
    engine.step()
    assert engine.scheduler.pool.used == len(SHARED) // BLOCK + 2
    assert engine.kv_positions() == {3: len(SHARED) + 2 * BLOCK}
    engine.cancel(one)
    assert engine.scheduler.pool.used == len(SHARED) // BLOCK + 1
    engine.cancel(two)
    assert (engine.scheduler.pool.used, engine.scheduler.pool.cached) == (0, kept)


def test_who_waits_for_a_prefix_goes_on_when_its_writer_fails(
    llama: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama)
    wanted = finish(Engine(llama), ask([31]))[0]
    broken, waiting = ask([30]), ask([31])
    forward = engine.forward

    def failing(chunks: list[Chunk]) -> torch.Tensor:
        if any(c.sequence is broken for c in chunks):
            raise RuntimeError("injected")
        return forward(chunks)

    monkeypatch.setattr(engine, "forward", failing)
    assert finish(engine, broken, waiting) == [[], wanted]
    assert not waiting.reused


def test_blocks_behind_the_window_are_given_back(tmp_path: Path) -> None:
    """Every layer of Mistral sees 16 positions here, in at most three blocks; one of Gemma 2's sees all."""
    for name, most in (("mistral", 3), ("gemma2", 7)):
        engine = Engine(load(quantized(tmp_path / name, name)))
        sequence, held = ask([9, 8], tokens=60), []
        engine.add(sequence)
        while not engine.idle:
            engine.step()
            held.append(engine.scheduler.pool.used)
        assert max(held) == most if name == "gemma2" else max(held[1:]) <= most
        assert engine.scheduler.pool.used == 0


KEYS = [bytes([i]) * 32 for i in range(6)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "find", "give"]), st.integers(0, 5)), max_size=60))
def test_a_pool_agrees_with_a_plain_model_of_it(actions: list[tuple[str, int]]) -> None:
    pool, held, of, unused = BlockPool(4), [], {}, []  # of: key -> block; unused: kept blocks, longest unused first
    for action, index in actions:
        key = KEYS[index]
        if action == "take" and pool.free:
            lost = unused.pop(0) if pool.free == len(unused) else None
            (block,) = pool.take(1)
            assert block not in held
            assert lost is None or block == lost
            of = {k: b for k, b in of.items() if b != block}
            held.append(block)
            if key not in of:
                of[key] = block
            pool.keep(block, key)
        elif action == "find":
            assert pool.find(key) == of.get(key)
            if key in of:
                held.append(of[key])
                unused = [b for b in unused if b != of[key]]
        elif action == "give" and held:
            block = held.pop(index % len(held))
            pool.give_back([block])
            if block not in held and block in of.values():
                unused.append(block)
        assert (pool.used, pool.cached) == (len(set(held)), len(unused))


def test_a_key_depends_on_everything() -> None:
    tokens, at = list(range(BLOCK)), [3] * BLOCK
    keys = [
        block_key(b"", tokens, at),
        block_key(bytes(32), tokens, at),
        block_key(b"", [*tokens[:-1], 99], at),
        block_key(b"", tokens, [*at[:-1], 2]),
        block_key(b"", tokens, ["3"] * BLOCK),
    ]
    assert len(set(keys)) == len(keys)
