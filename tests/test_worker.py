"""The thread between engine and API: one request's failure is its own, and every job hears how it ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import anybits
from anybits.integrations import transformers as hf
from anybits.serve.engine import Engine, Limits
from anybits.serve.policy import Policy, Targets
from anybits.serve.sampling import Sampling
from anybits.serve.sequence import Chunk
from anybits.serve.text import TextStream
from anybits.serve.worker import Delta, Job, Worker
from conftest import save_tiny

BAD_TOKEN = 63


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("worker")
    save_tiny(folder / "float", "llama")
    anybits.quantize(str(folder / "float"), folder / "any", anybits.Recipe(preset="fast", group_size=32))
    return Engine(hf.load_model(folder / "any", dtype=torch.float32), Limits(max_batch=8))


@pytest.fixture
def worker(engine: Engine) -> Iterator[Worker]:
    started = Worker(engine, Policy(engine.precisions, Targets()), frozenset(), 8, 60)
    started.start()
    yield started
    started.close()


class Answer:
    """What one job was told."""

    def __init__(self, prompt: list[int], tokens: int = 6, text: TextStream | None = None) -> None:
        self.deltas: list[Delta] = []
        self.ended = threading.Event()
        stream = text or TextStream(lambda ids: "".join(chr(97 + i) for i in ids), prompt)
        self.job = Job(prompt, tokens, Sampling(), stream, self._take, precision=3)

    def _take(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish is not None:
            self.ended.set()

    def result(self) -> tuple[str, str | None]:
        """Return the text and how it ended."""
        assert self.ended.wait(30)
        return "".join(d.text for d in self.deltas), self.deltas[-1].finish


class BrokenText(TextStream):
    """Fails at its third token, and whenever it is flushed after that."""

    def push(self, token: int) -> str:
        if len(self._tokens) >= 5:
            raise ValueError("injected")
        return super().push(token)

    def flush(self) -> str:
        raise ValueError("injected")


def ask(worker: Worker, *answers: Answer) -> list[tuple[str, str | None]]:
    worker.submit([a.job for a in answers])
    return [a.result() for a in answers]


def test_a_broken_request_gets_an_error_and_its_neighbours_their_text(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[5], [6, 7, 8], [9, 10]]
    wanted = [ask(worker, Answer(p))[0] for p in prompts]
    forward = worker.engine.forward

    def broken(chunks: list[Chunk]) -> torch.Tensor:
        if any(BAD_TOKEN in c.sequence.prompt for c in chunks):
            raise RuntimeError("injected")
        return forward(chunks)

    monkeypatch.setattr(worker.engine, "forward", broken)
    broken_text = Answer([5, 6, 7], text=BrokenText(lambda ids: "a" * len(ids), [5, 6, 7]))
    results = ask(worker, Answer([5, BAD_TOKEN]), *map(Answer, prompts), broken_text)
    assert results[0] == ("", "error")
    assert results[1:4] == wanted
    assert results[4] == ("aa", "error")
    assert (worker.inside, worker.engine.scheduler.pool.used) == (0, 0)
    assert "a request failed alone" in caplog.text
    assert ask(worker, Answer(prompts[0])) == wanted[:1]


def test_a_broken_scheduler_fails_what_runs_and_the_service_goes_on(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = worker.engine.scheduler.schedule

    def broken() -> list[Chunk]:
        schedule()
        raise RuntimeError("injected")

    monkeypatch.setattr(worker.engine.scheduler, "schedule", broken)
    assert ask(worker, Answer([5]), Answer([6])) == [("", "error")] * 2
    monkeypatch.undo()
    assert ask(worker, Answer([5]))[0][1] == "length"
    assert (worker.inside, worker.engine.scheduler.pool.used) == (0, 0)
