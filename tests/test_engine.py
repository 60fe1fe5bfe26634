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
from anybits.serve.engine import Engine, Limits
from anybits.serve.kv import BLOCK
from anybits.serve.sampling import Sampling
from anybits.serve.sequence import Fixed, Sequence
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
    sequences = [Sequence(p, n, Fixed(precision), sampling or Sampling()) for p, precision, n in wanted]
    coming = list(sequences)
    while coming or not engine.idle:
        for sequence in coming[:a_step]:
            engine.add(sequence)
        del coming[:a_step]
        engine.step()
    assert engine.scheduler.pool.used == 0
    return [s.tokens[len(s.prompt) :] for s in sequences]


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
