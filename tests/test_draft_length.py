"""How far to draft, against a simulated model whose acceptance and pass times are known."""

import random

import pytest
import torch

from anybits.decode.choice import Choice
from anybits.decode.draft_length import MAX_DRAFT, AdaptiveLength, FixedLength, expected_tokens
from anybits.decode.speculation import speculate
from anybits.decode.statistics import Statistics

TARGET, DRAFT, VOCABULARY = 8, 2, 16


class Simulated:
    """Chooses a token by position; its draft precision agrees with probability `acceptance`; passes take set times."""

    def __init__(self, acceptance: float, draft_s: float, rows_s: list[float], seed: int = 0) -> None:
        self.acceptance, self.draft_s, self.rows_s = acceptance, draft_s, rows_s
        self.now, self.length, self._random = 0.0, 0, random.Random(seed)
        self.agrees: dict[int, bool] = {}

    def forward(self, tokens: list[int], precision: int) -> torch.Tensor:
        logits = torch.zeros(len(tokens), VOCABULARY)
        for row in range(len(tokens)):
            position = self.length + row
            agrees = self.agrees.setdefault(position, self._random.random() < self.acceptance)
            token = position % VOCABULARY if precision == TARGET or agrees else (position + 1) % VOCABULARY
            logits[row, token] = 4.0
        self.length += len(tokens)
        self.now += self.draft_s if precision == DRAFT else self.rows_s[len(tokens) - 1]
        return logits

    def drop(self, count: int) -> None:
        self.length -= count


def run(model: Simulated, count: int, length: AdaptiveLength | FixedLength) -> Statistics:
    statistics, tokens = Statistics(), [15]
    passes = speculate(model, Choice(), tokens, TARGET, DRAFT, length, count + 1, statistics, clock=lambda: model.now)
    for _ in passes:
        assert model.length == len(tokens) - 1
    assert tokens == [15, *(i % VOCABULARY for i in range(count))]
    assert statistics.tokens == count
    return statistics


FLAT = [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3]
STEEP = [1.0, 1.1, 2.1, 2.4, 3.0, 3.4, 4.0]  # what affine levels cost on AVX-512, where two rows share a pass


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("draft_s", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("rows_s", [FLAT, STEEP], ids=["flat", "steep"])
def test_the_length_finds_what_pays_and_never_loses_three_percent(
    acceptance: float, draft_s: float, rows_s: list[float]
) -> None:
    count = 2000
    model = Simulated(acceptance, draft_s, rows_s)
    run(model, count, AdaptiveLength())
    assert model.now <= 1.03 * count * rows_s[0]
    short = Simulated(acceptance, draft_s, rows_s)
    run(short, 150, AdaptiveLength())
    assert short.now <= 1.03 * 150 * rows_s[0]
    best = min((k * draft_s + rows_s[k]) / expected_tokens(acceptance, k) for k in range(MAX_DRAFT + 1))
    assert model.now / count <= 1.12 * best


def test_a_turn_for_the_worse_ends_the_drafts_and_one_for_the_better_resumes_them() -> None:
    model, length = Simulated(0.9, 0.25, FLAT), AdaptiveLength()
    good = run(model, 500, length)
    assert good.rounds > 50
    bad_model = Simulated(0.0, 0.25, FLAT)
    bad = run(bad_model, 1000, length)
    assert bad.steps > 900
    assert bad_model.now <= 1000 + length.CAP + 1000 * length.SHARE + 3
    again = run(Simulated(0.9, 0.25, FLAT), 1000, length)
    assert again.rounds > 100


def test_statistics_add_up() -> None:
    model = Simulated(0.7, 0.3, FLAT)
    statistics = run(model, 300, FixedLength(3))
    assert statistics.steps_at[DRAFT] == statistics.drafted
    assert statistics.tokens == statistics.accepted + statistics.rounds + statistics.steps
    assert statistics.seconds == pytest.approx(model.now)
    assert statistics.acceptance == pytest.approx(0.7 * (1 + 0.7 + 0.49) / 3, abs=0.07)
    adaptive = run(Simulated(0.9, 0.3, FLAT), 300, AdaptiveLength())
    assert adaptive.speed_up == pytest.approx(300 / adaptive.seconds)


def test_expected_tokens_is_the_geometric_sum() -> None:
    assert expected_tokens(0.5, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))
    assert expected_tokens(1.0, 3) == 4
