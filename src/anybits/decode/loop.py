"""Plain decoding, one token a pass, where a schedule may choose another precision at every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from anybits.decode.choice import Choice
from anybits.decode.schedule import Schedule, Step
from anybits.decode.statistics import Statistics
from anybits.decode.stepper import Stepper


def decode(
    stepper: Stepper,
    choice: Choice,
    tokens: list[int],
    logits: torch.Tensor,
    schedule: Schedule,
    limit: int,
    statistics: Statistics,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[list[int]]:
    """Yield new tokens one at a time, each pass at the precision that `schedule` says.

    tokens: the prompt and the first token, chosen from `logits` `[V]`; the cache holds the prompt. New tokens are
    appended before they are yielded, up to `limit` in all.
    """
    prompt = len(tokens) - 1
    while len(tokens) < limit:
        start = clock()
        precision = schedule.decode(Step(len(tokens) - prompt, prompt, logits))
        logits = stepper.forward(tokens[-1:], precision)[0]
        new = [choice.choose(tokens, logits)]
        statistics.step_s += clock() - start
        statistics.steps += 1
        statistics.tokens += 1
        if not isinstance(precision, torch.Tensor):
            statistics.steps_at[precision] += 1
        tokens += new
        yield new
