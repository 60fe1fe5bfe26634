"""The thread that owns the engine: takes jobs, steps, hands out text, and watches deadlines."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from anybits.config import Single
from anybits.errors import AnybitsError
from anybits.serve.engine import Engine
from anybits.serve.metrics import Metrics, Snapshot
from anybits.serve.policy import Load, Policy, Targets
from anybits.serve.sampling import Logprobs, Sampling
from anybits.serve.sequence import Fixed, Sequence, Token
from anybits.serve.text import TextStream

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The batch and the queue are full: come back in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Delta:
    """New text of a job, with the token behind it; `finish` is set on the last: stop, length, timeout or error."""

    text: str
    token: int | None = None
    logprobs: Logprobs | None = None
    precision: Single | None = None
    finish: str | None = None


@dataclass(eq=False)
class Job:
    """What the API wants: `precision` None is auto under `targets`; `deliver` is called in the worker's thread."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    text: TextStream
    deliver: Callable[[Delta], None]
    precision: Single | None = None
    prefill: Single | None = None
    draft: Single | None = None
    targets: Targets | None = None
    ignore_end: bool = False
    sequence: Sequence | None = field(default=None, init=False)
    cancelled: bool = field(default=False, init=False)
    last: float = field(default=0.0, init=False)


class Worker:
    """Runs the engine in its own thread; `submit` and `cancel` may be called from any."""

    def __init__(
        self, engine: Engine, policy: Policy, stop_tokens: frozenset[int], max_queue: int, timeout_s: float
    ) -> None:
        self.engine, self.policy, self._stop_tokens = engine, policy, stop_tokens
        self._room = engine.scheduler.max_batch + max_queue
        self._timeout_s = timeout_s
        self._inbox: queue.SimpleQueue[tuple[Job, float] | None] = queue.SimpleQueue()
        self._jobs: dict[Sequence, Job] = {}
        self._lock = threading.Lock()
        self._inside = 0
        self._recent_s = 1.0
        self.after_step: Callable[[], None] = lambda: None
        """Called in the worker's thread when the deltas of a step have been delivered."""
        self.metrics = Metrics((*engine.precisions, *engine.profiles), self._snapshot)
        self._thread = threading.Thread(target=self._run, name="anybits-engine", daemon=True)

    @property
    def inside(self) -> int:
        """Jobs that run or wait."""
        return self._inside

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the step that runs; jobs that are left get no answer."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, jobs: list[Job]) -> None:
        """Take all of `jobs`, or raise QueueFullError."""
        with self._lock:
            if self._inside + len(jobs) > self._room:
                raise QueueFullError(max(1, round(self._recent_s)))
            self._inside += len(jobs)
        for job in jobs:
            self._inbox.put((job, time.monotonic()))

    def cancel(self, job: Job) -> None:
        """End a job whose client has gone, before the next step; a finished job is left alone."""
        job.cancelled = True
        self._inbox.put((job, 0.0))

    def _run(self) -> None:
        while self._take():
            try:
                self._turn()
            except Exception:
                # What the engine could not lay to one request must not end the service: all that run fail.
                logger.exception("a step failed; its requests are answered with an error")
                for sequence in list(self._jobs):
                    if sequence not in self.engine.scheduler.waiting:
                        self._end(sequence, "error")
                self.after_step()

    def _turn(self) -> None:
        started = time.monotonic()
        self._expire(started)
        tokens = self.engine.step()
        now = time.monotonic()
        for sequence in self.engine.failed:
            self._end(sequence, "error")
        decoded = sum(token.sequence.first_token is not None for token in tokens)
        for token in tokens:
            if token.sequence not in self._jobs:
                continue  # an earlier token of the same round completed a stop string
            try:
                self._hand_out(token, now)
            except Exception:
                logger.exception("the text of a request failed; the others go on")
                if token.sequence in self._jobs:
                    self._end(token.sequence, "error")
        self.after_step()
        if tokens or not self.engine.idle:
            most = max(Counter(token.sequence for token in tokens).values(), default=1)
            self.policy.observe(Load(now, (now - started) / most, self._oldest_wait(now), decoded))

    def _take(self) -> bool:
        """Bring new and cancelled jobs to the engine, waiting for one when it is idle; False ends the thread."""
        wait = self.engine.idle
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if item is None:
                return False
            wait = False
            job, arrived = item
            if not job.cancelled:
                self._add(job, arrived)
            elif job.sequence in self._jobs:
                assert job.sequence is not None
                self._end(job.sequence, "cancelled")
            elif job.sequence is None:  # cancelled before it was ever added: count it out once
                job.sequence = Sequence([], 0, Fixed(self.engine.precisions[-1]))
                self._leave()

    def _add(self, job: Job, arrived: float) -> None:
        choice = self.policy.controller(job.targets) if job.precision is None else Fixed(job.precision)
        stops = frozenset() if job.ignore_end else self._stop_tokens
        job.sequence = Sequence(
            job.prompt,
            job.max_tokens,
            choice,
            job.sampling,
            job.prefill,
            stops,
            arrived,
            arrived + self._timeout_s,
            job.draft,
        )
        self._jobs[job.sequence] = job
        try:
            self.engine.add(job.sequence)
        except AnybitsError:
            logger.exception("a request that the API let through cannot run")
            self._end(job.sequence, "error")

    def _hand_out(self, token: Token, now: float) -> None:
        sequence, job = token.sequence, self._jobs[token.sequence]
        self.metrics.token(token.precision)
        if sequence.first_token is None:
            sequence.first_token = now
            self.metrics.first_token(token.precision, len(sequence.prompt), now - sequence.arrived, sequence.reused)
        finish = token.finish
        is_end = finish == "stop"  # the token that ends a text is no part of it
        text = "" if is_end else job.text.push(token.token)
        if job.text.stopped and finish != "stop":
            finish = "stop"
            self.engine.cancel(sequence, "stop")
        if finish is not None:
            text += job.text.flush()
            self._close(sequence, finish, now)
        job.deliver(Delta(text, token.token, token.logprobs, token.precision, finish))

    def _end(self, sequence: Sequence, reason: str) -> None:
        """Stop a sequence before its time; a client that is still there learns why."""
        job = self._jobs[sequence]
        self.engine.cancel(sequence, reason)
        self._close(sequence, reason, time.monotonic())
        if reason != "cancelled":
            text = "" if reason == "error" else job.text.flush()  # the text may be what failed
            job.deliver(Delta(text, finish=reason))

    def _close(self, sequence: Sequence, reason: str, now: float) -> None:
        del self._jobs[sequence]
        self._leave()
        self._recent_s += 0.1 * (now - sequence.arrived - self._recent_s)
        precision = max(
            sequence.generated_at, key=lambda p: sequence.generated_at[p], default=sequence.choice.precision
        )
        mode = "fixed" if isinstance(sequence.choice, Fixed) else "auto"
        pace = None
        if sequence.first_token is not None and sequence.generated > 1:
            pace = (now - sequence.first_token) / (sequence.generated - 1)
        self.metrics.finished(precision, mode, reason, pace)

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1

    def _expire(self, now: float) -> None:
        for sequence in [s for s in self._jobs if s.deadline is not None and s.deadline < now]:
            self._end(sequence, "timeout")

    def _oldest_wait(self, now: float) -> float:
        return max((now - s.arrived for s in self._jobs if s.first_token is None), default=0.0)

    def _snapshot(self) -> Snapshot:
        scheduler = self.engine.scheduler
        auto = {
            (_label(t.tpot_ms), _label(t.ttft_ms)): (c.precision, dict(c.changes))
            for t, c in list(self.policy.controllers.items())
        }
        return Snapshot(
            running=Counter(s.choice.precision for s in list(scheduler.running)),
            waiting=Counter(s.choice.precision for s in list(scheduler.waiting)),
            kv_positions=self.engine.kv_positions(),
            drafts={
                (str(precision), str(draft)): (pair.statistics.drafted, pair.statistics.accepted)
                for (precision, draft), pair in list(self.engine.speculation.pairs.items())
            },
            kv_used=scheduler.pool.used,
            kv_cached=scheduler.pool.cached,
            kv_total=scheduler.pool.total,
            auto=auto,
        )


def _label(target: float | None) -> str:
    return "none" if target is None else f"{target:g}"
