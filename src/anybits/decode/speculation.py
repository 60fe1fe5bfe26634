"""Self-speculative decoding: few planes draft, all planes of the target verify, in one KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from anybits.decode.acceptance import accept_greedy, accept_sampled
from anybits.decode.choice import Choice
from anybits.decode.draft_length import DraftLength
from anybits.decode.statistics import Statistics
from anybits.decode.stepper import Stepper
from anybits.precision import Precision

Clock = Callable[[], float]


def speculate(
    stepper: Stepper,
    choice: Choice,
    tokens: list[int],
    precision: Precision,
    draft_precision: Precision,
    length: DraftLength,
    limit: int,
    statistics: Statistics,
    clock: Clock = time.perf_counter,
) -> Iterator[list[int]]:
    """Yield new tokens, some at a time, distributed as plain decoding at `precision`; greedy ones are the same.

    tokens: all so far; the cache holds all but the last. The new ones are appended before they are yielded, up to
    `limit` tokens in all; after each yield the cache again holds all but the last.
    """
    while len(tokens) < limit:
        most = length.begin(limit - len(tokens) - 1)
        start = clock()
        if most == 0:
            new = [choice.choose(tokens, stepper.forward(tokens[-1:], precision)[0])]
            taken = clock() - start
            length.plain_step(taken)
            statistics.steps += 1
            statistics.step_s += taken
            _count(statistics, precision, 1)
        else:
            drafted, sure, q = _draft(stepper, choice, tokens, draft_precision, most, length)
            drafted_at = clock()
            new = _verify(stepper, choice, tokens, precision, drafted, q)
            taken, draft_s = clock() - drafted_at, drafted_at - start
            length.round(sure, len(new) - 1, draft_s, taken)
            statistics.rounds += 1
            statistics.drafted += len(drafted)
            statistics.accepted += len(new) - 1
            statistics.draft_s += draft_s
            statistics.verify_s += taken
            _count(statistics, draft_precision, len(drafted))
        statistics.tokens += len(new)
        statistics.plain_step_s = length.costs.plain
        tokens += new
        yield new


def _draft(
    stepper: Stepper, choice: Choice, tokens: list[int], precision: Precision, most: int, length: DraftLength
) -> tuple[list[int], list[float], list[torch.Tensor]]:
    """Return up to `most` drafted tokens, the probability of each one's likeliest token, and when sampling all q.

    The cache is left as it was.
    """
    drafted: list[int] = []
    sure: list[float] = []
    q: list[torch.Tensor] = []
    before = list(tokens)
    while len(drafted) < most:
        scores = choice.scores(before, stepper.forward(before[-1:], precision))[0]
        if choice.sample:
            q.append(scores.softmax(-1))
            drafted.append(int(torch.multinomial(q[-1], 1)))
            sure.append(float(q[-1].max()))
        else:
            best, token = scores.max(-1)
            drafted.append(int(token))
            sure.append(float((best - scores.logsumexp(-1)).exp()))
        before.append(drafted[-1])
        # The rule sees the distributions and never the drawn tokens of positions that it decides on.
        if len(drafted) < most and not length.more(sure):
            break
    stepper.drop(len(drafted))
    return drafted, sure, q


def _verify(
    stepper: Stepper, choice: Choice, tokens: list[int], precision: Precision, drafted: list[int], q: list[torch.Tensor]
) -> list[int]:
    """Return the drafts that stand and the token after them; the cache then holds all but that token."""
    rows = stepper.forward(tokens[-1:] + drafted, precision)
    if choice.sample:
        kept, token = accept_sampled(drafted, torch.stack(q), choice.probabilities(tokens + drafted, rows))
    else:
        wanted = choice.likeliest(tokens + drafted, rows)
        kept = accept_greedy(drafted, wanted)
        token = wanted[kept]
    stepper.drop(len(drafted) - kept)
    return [*drafted[:kept], token]


def _count(statistics: Statistics, precision: Precision, passes: int) -> None:
    if not isinstance(precision, torch.Tensor):
        statistics.steps_at[precision] += passes
