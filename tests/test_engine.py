"""The engine: a request in any mix writes what it writes alone, and slots and KV always come back."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path

import pytest
import torch
import transformers

import anybits
from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.linear import PlaneLinear
from anybits.precision import active, per_row, precision
from anybits.serve.blocks import BLOCK
from anybits.serve.engine import Engine, Limits
from anybits.serve.sampling import Sampling
from anybits.serve.sequence import Chunk, Fixed, Sequence, Token
from conftest import save_tiny
from test_profiles import with_profiles

Request = tuple[list[int], int | str, int]
PRECISIONS = (2, 3, 4)
SINGLES = (*PRECISIONS, "2.5")


def quantized(folder: Path, name: str) -> Path:
    save_tiny(folder / "float", name)
    recipe = anybits.Recipe(preset="fast", group_size=32, precisions=PRECISIONS)
    anybits.quantize(str(folder / "float"), folder / "planes", recipe)
    with_profiles(folder / "planes", ("2.5",))
    return folder / "planes"


def load(folder: Path) -> transformers.PreTrainedModel:
    return hf.load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    return load(quantized(tmp_path_factory.mktemp("engine"), "llama"))


def requests(count: int, seed: int = 0) -> list[Request]:
    """Random (prompt, precision, new tokens); prompts from one token to more than a sliding window and a chunk."""
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(4, 64) for _ in range(rng.choice([1, 3, 17, 40]))],
            rng.choice(SINGLES),
            rng.choice([5, 20, 30]),
        )
        for _ in range(count)
    ]


def run(engine: Engine, wanted: list[Request], a_step: int, sampling: Sampling | None = None) -> list[list[int]]:
    """Add `a_step` requests before every step, and return what each wrote."""
    return [s.tokens[len(s.prompt) :] for s in run_sequences(engine, wanted, a_step, sampling)]


def run_sequences(
    engine: Engine, wanted: list[Request], a_step: int, sampling: Sampling | None = None
) -> list[Sequence]:
    sequences = [Sequence(p, n, Fixed(precision), sampling or Sampling()) for p, precision, n in wanted]
    coming = list(sequences)
    while coming or not engine.idle:
        for sequence in coming[:a_step]:
            engine.add(sequence)
        del coming[:a_step]
        engine.step()
    assert engine.scheduler.pool.used == 0
    return sequences


def generated(model: transformers.PreTrainedModel, request: Request) -> list[int]:
    prompt, precision, count = request
    ids = torch.tensor([prompt])
    settings = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, precision=precision)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "opt", "qwen3-moe"])
def test_a_request_in_a_mix_writes_what_it_writes_alone(name: str, tmp_path: Path) -> None:
    folder = quantized(tmp_path, name)
    wanted = requests(12)
    mixed = run(Engine(load(folder), Limits(max_batch=6, max_rows=24)), wanted, 2)
    engine = Engine(load(folder))
    alone = [run(engine, [request], 1)[0] for request in wanted]
    assert mixed == alone
    model = load(folder)
    assert alone == [generated(model, request) for request in wanted]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "opt"])
def test_logits_are_the_same_numbers_in_every_mix(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the planes' products, which run row by row here: kernels have tests of their own."""
    plain = PlaneLinear.forward

    def row_by_row(layer: PlaneLinear, x: torch.Tensor) -> torch.Tensor:
        wanted = per_row(layer.own_precision(active(layer.default)), x.shape[:-1])
        rows = x.reshape(-1, x.shape[-1])
        done = []
        for row, p in zip(rows, [wanted] * len(rows) if isinstance(wanted, int) else wanted.tolist(), strict=True):
            with precision(p):
                done.append(plain(layer, row[None]))
        return torch.cat(done).view(*x.shape[:-1], layer.out_features)

    monkeypatch.setattr(PlaneLinear, "forward", row_by_row)
    engine = Engine(load(quantized(tmp_path, name)), Limits(max_batch=9, max_rows=40))
    seen: dict[Sequence, list[torch.Tensor]] = {}
    advance = engine.advance

    def recording(chunks: list[Chunk], logits: torch.Tensor) -> list[Token]:
        for row, chunk in zip(logits, [c for c in chunks if c.complete], strict=True):
            seen.setdefault(chunk.sequence, []).append(row.clone())
        return advance(chunks, logits)

    monkeypatch.setattr(engine, "advance", recording)
    wanted = requests(14, seed=4)
    mixed = run_sequences(engine, wanted, 2)
    alone = [run_sequences(engine, [request], 1)[0] for request in wanted]
    for one, other in zip(mixed, alone, strict=True):
        assert torch.equal(torch.stack(seen[one]), torch.stack(seen[other]))


def test_a_request_that_gives_way_writes_the_same(llama: transformers.PreTrainedModel) -> None:
    wanted = requests(10, seed=1)
    block = BLOCK * 4 * 2 * 2 * 2 * 16  # float32, keys and values, layers, heads, head_dim
    engine = Engine(llama, Limits(max_batch=6, max_rows=24, kv_cache_bytes=6 * block))
    assert engine.scheduler.pool.total == 6
    gave_way = 0

    class Counting(deque[Sequence]):
        def appendleft(self, item: Sequence) -> None:
            nonlocal gave_way
            gave_way += 1
            super().appendleft(item)

    engine.scheduler.waiting = Counting()
    small = run(engine, wanted, 6)
    assert gave_way > 0
    assert small == run(Engine(llama), wanted, 1)


def test_sampling_depends_on_the_seed_and_not_on_the_mix(llama: transformers.PreTrainedModel) -> None:
    wanted = requests(6, seed=2)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=20, seed=5)
    together = run(Engine(llama), wanted, 6, sampling)
    assert together == [run(Engine(llama), [request], 1, sampling)[0] for request in wanted]
    assert together != run(Engine(llama), wanted, 6, Sampling(temperature=0.8, seed=6))


def test_cancelling_frees_slot_and_blocks_at_once(llama: transformers.PreTrainedModel) -> None:
    engine = Engine(llama, Limits(max_batch=1))
    running, waiting = Sequence([5, 6, 7], 50, Fixed(2)), Sequence([5], 3, Fixed(4))
    engine.add(running)
    engine.add(waiting)
    engine.step()
    assert engine.kv_positions() == {2: BLOCK}
    engine.cancel(running)
    assert engine.scheduler.pool.used == 0
    assert [t.sequence for t in engine.step()] == [waiting]
    engine.cancel(waiting)
    assert engine.idle


def test_a_request_that_breaks_a_step_fails_alone(
    llama: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests(9, seed=3)
    alone = [run(Engine(llama), [request], 1)[0] for request in wanted]
    engine = Engine(llama)
    sequences = [Sequence(p, n, Fixed(precision)) for p, precision, n in wanted]
    at_prompt, while_decoding, when_sampling = sequences[1], sequences[4], sequences[7]
    forward, sampler = engine.forward, when_sampling.sampler

    def broken_forward(chunks: list[Chunk]) -> torch.Tensor:
        inside = {c.sequence: c.start for c in chunks}
        if at_prompt in inside or inside.get(while_decoding, 0) == len(while_decoding.prompt) + 2:
            raise RuntimeError("injected")
        return forward(chunks)

    def broken_choice(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine, "forward", broken_forward)
    monkeypatch.setattr(type(sampler), "plain", property(lambda self: self is not sampler))
    monkeypatch.setattr(sampler, "choose", broken_choice)
    failed: list[Sequence] = []
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        engine.step()
        failed += engine.failed
        assert engine.scheduler.pool.used == sum(len(s.blocks) for s in engine.scheduler.running)
    assert engine.scheduler.pool.used == 0
    assert sorted(map(id, failed)) == sorted(map(id, (at_prompt, while_decoding, when_sampling)))
    assert {s.finish for s in failed} == {"error"}
    for sequence, expected in zip(sequences, alone, strict=True):
        written = sequence.tokens[len(sequence.prompt) :]
        assert written == (expected if sequence not in failed else expected[: len(written)])
    assert while_decoding.generated == 3


def test_prompt_rows_may_run_at_a_precision_of_their_own(llama: transformers.PreTrainedModel) -> None:
    prompt = requests(4)[3][0]
    plain, careful = Sequence(prompt, 5, Fixed(2)), Sequence(prompt, 5, Fixed(2), prefill=4)
    engine = Engine(llama)
    for sequence in (plain, careful):
        engine.add(sequence)
    first = {t.sequence: t.precision for t in engine.step()}
    assert first == {plain: 2, careful: 4}
    assert {t.precision for t in engine.step()} == {2}


def test_a_token_that_ends_the_text_ends_the_request(llama: transformers.PreTrainedModel) -> None:
    prompt, precision, _ = requests(1)[0]
    written = run(Engine(llama), [(prompt, precision, 10)], 1)[0]
    sequence = Sequence(prompt, 10, Fixed(precision), stop_tokens=frozenset({written[4]}))
    engine = Engine(llama)
    engine.add(sequence)
    while not engine.idle:
        engine.step()
    assert sequence.finish == "stop"
    assert sequence.tokens[len(prompt) :] == written[: written.index(written[4]) + 1]


def test_numbers_of_one_request_never_reach_another(llama: transformers.PreTrainedModel) -> None:
    engine, clean = Engine(llama), Engine(llama)
    for pool in (*engine.cache.keys.values(), *engine.cache.values.values()):
        pool.fill_(torch.nan)
    assert run(engine, requests(4), 4) == run(clean, requests(4), 4)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_model_len=1000), "max-model-len 1000 is more than the 128 positions"),
        (Limits(kv_cache_bytes=10), "is too small"),
        (Limits(kv_cache_bytes=20_000, max_model_len=128), "max-model-len 128 needs a larger KV cache"),
    ],
)
def test_limits_that_cannot_be_are_refused(llama: transformers.PreTrainedModel, limits: Limits, message: str) -> None:
    with pytest.raises(AnybitsError, match=message):
        Engine(llama, limits)


def test_a_request_that_can_never_run_is_refused(llama: transformers.PreTrainedModel) -> None:
    with pytest.raises(AnybitsError, match="together they may be at most 128"):
        Engine(llama).add(Sequence([1] * 100, 29, Fixed(2)))
    with pytest.raises(AnybitsError, match="prompt is empty"):
        Engine(llama).add(Sequence([], 2, Fixed(2)))
