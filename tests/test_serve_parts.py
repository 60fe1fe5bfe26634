"""The parts of the server that need neither a model nor a socket: text, sampling, policy, KV numbers, buckets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybits.serve.attention import bucket
from anybits.serve.blocks import BLOCK, BlockPool, blocks_for
from anybits.serve.policy import HOLD_S, PATIENCE, Controller, Load, Policy, Targets
from anybits.serve.sampling import Sampler, Sampling
from anybits.serve.text import TextStream


def decode(tokens: list[int]) -> str:
    """One byte a token: characters of several bytes arrive in pieces."""
    return bytes(tokens).decode("utf-8", "replace")


@given(st.text(max_size=40), st.text(max_size=5))
def test_a_stream_gives_the_whole_text_and_never_half_a_character(text: str, prompt: str) -> None:
    stream = TextStream(decode, list(prompt.encode()))
    parts = [stream.push(byte) for byte in text.encode()]
    assert "".join(parts) + stream.flush() == text
    assert not any("\ufffd" in part for part in parts if "\ufffd" not in text)


@given(st.text("ab<|>", max_size=30), st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=3))
def test_nothing_at_or_after_a_stop_string_is_sent(text: str, stop: list[str]) -> None:
    stream, sent = TextStream(decode, [], stop), ""
    for byte in text.encode():
        sent += stream.push(byte)
        if stream.stopped:
            break
    sent += stream.flush()
    # The first stop string that is complete ends the text: where it begins, or where a longer one that
    # ends with the same character begins.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    expected = (
        text if not ends else min((text[: ends[0] - len(s)] for s in stop if text[: ends[0]].endswith(s)), key=len)
    )
    assert sent == expected
    assert stream.stopped == bool(ends)


def test_greedy_takes_the_likeliest_and_reports_logprobs() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -torch.inf])
    token, logprobs = Sampler(Sampling(logprobs=4)).choose(logits, {})
    assert token == 1
    assert logprobs is not None
    assert logprobs.chosen == pytest.approx(2 - math.log(1 + math.e + math.e**2), abs=1e-5)
    assert [t for t, _ in logprobs.top] == [1, 2, 0, 3]
    assert logprobs.top[-1][1] == -9999.0


def test_top_k_and_top_p_leave_only_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = lambda **how: {Sampler(Sampling(1.0, seed=s, **how)).choose(logits, {})[0] for s in range(200)}  # noqa: E731
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_p=0.0001) == drawn(top_p=5e-324) == {0}
    assert drawn(top_k=3, top_p=0.7) == {0, 1}


def test_penalties_push_repeated_tokens_down() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    assert Sampler(Sampling(presence_penalty=0.5)).choose(logits, {0: 1})[0] == 1
    assert Sampler(Sampling(frequency_penalty=0.04)).choose(logits, {0: 2})[0] == 0
    assert Sampler(Sampling(frequency_penalty=0.04)).choose(logits, {0: 3})[0] == 1


def test_blocks_come_back() -> None:
    pool = BlockPool(5)
    taken = pool.take(3)
    assert (pool.used, pool.free) == (3, 2)
    pool.give_back(taken)
    assert sorted(pool.take(5)) == [0, 1, 2, 3, 4]
    assert [blocks_for(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


@given(st.integers(1, 5000))
def test_a_bucket_is_at_most_half_too_large(blocks: int) -> None:
    assert blocks <= bucket(blocks) <= max(1.5 * blocks, blocks + 0.5)


class Clock:
    """Drives a controller with steps whose time grows with the precision and the number of clients."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.now = controller, 0.0

    def steps(self, count: int, ms_per_plane: float, wait_s: float = 0.0) -> list[int]:
        seen = []
        for _ in range(count):
            step = ms_per_plane * self.controller.precision / 1000
            self.now += step
            self.controller.observe(Load(self.now, step, wait_s))
            seen.append(self.controller.precision)
        return seen


def test_auto_falls_under_load_and_rises_again() -> None:
    clock = Clock(Controller((2, 3, 4), Targets(tpot_ms=35)))
    assert set(clock.steps(200, 8)) == {4}
    assert clock.steps(100, 10)[-1] == 3
    assert clock.steps(100, 15)[-1] == 2
    assert clock.steps(2000, 8)[-1] == 4
    assert clock.controller.changes == {"down": 2, "up": 2}


def test_auto_does_not_swing_when_the_target_lies_between_two_precisions() -> None:
    clock = Clock(Controller((2, 3, 4), Targets(tpot_ms=35)))
    seen = clock.steps(20_000, 10)  # 4 bits take 40 ms, 3 bits 30: a rise would miss the target
    assert set(seen[10:]) == {3}


def test_prompts_of_newcomers_are_no_reason_to_fall_unless_they_keep_coming() -> None:
    """A step with a prompt takes 150 ms, others 30 ms at 3 bits: with the prompt among 16 steps 37 ms a token."""
    clock = Clock(Controller((2, 3, 4), Targets(tpot_ms=38)))
    clock.steps(3, 50)
    assert clock.controller.precision == 3
    seen = [p for _ in range(40) for p in (*clock.steps(1, 50), *clock.steps(15, 10))]
    assert set(seen) == {3}
    seen = [p for _ in range(20) for p in (*clock.steps(1, 50), *clock.steps(4, 10))]  # 54 ms a token
    assert seen[-1] == 2


def test_steps_that_only_read_prompts_say_nothing_of_the_time_of_a_token() -> None:
    clock = Clock(Controller((2, 3, 4), Targets(tpot_ms=38)))
    for _ in range(200):
        clock.now += 0.2
        clock.controller.observe(Load(clock.now, 0.2, 0.0, decoded=0))
        clock.steps(1, 9)
    assert clock.controller.changes == {}


def test_a_burst_after_idle_steps_is_seen_within_a_few() -> None:
    clock = Clock(Controller((2, 3, 4), Targets(tpot_ms=34)))
    assert set(clock.steps(300, 3)) == {4}
    assert clock.steps(8, 10).index(3) <= 6  # 40 ms against 34: six steps late by a sixth
    clock = Clock(Controller((2, 3, 4), Targets(tpot_ms=34)))
    assert clock.steps(PATIENCE, 100) == [4, 4, 3]
    clock.steps(20, 10)
    for _ in range(20):  # short slow spells: 39 ms for five steps among 30 ms
        clock.steps(5, 13)
        assert set(clock.steps(20, 10)) == {3}
    assert clock.steps(400, 3)[-1] == 4


def test_auto_obeys_the_first_token_target_and_starts_high_after_silence() -> None:
    clock = Clock(Controller((2, 4), Targets(ttft_ms=100)))
    assert clock.steps(10, 1, wait_s=0.2)[-1] == 2
    clock.now += 2 * HOLD_S
    assert clock.steps(1, 1)[-1] == 4


def test_without_targets_auto_is_the_highest_precision() -> None:
    clock = Clock(Controller((2, 4), Targets()))
    assert set(clock.steps(100, 1000, wait_s=100)) == {4}


def test_targets_of_clients_are_remembered_within_bounds() -> None:
    policy = Policy((2, 4), Targets())
    own = policy.controller()
    for ms in range(1, 500):
        policy.controller(Targets(tpot_ms=ms))
    assert len(policy.controllers) == Policy.MOST
    assert policy.controller() is own
