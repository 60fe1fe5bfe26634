"""How far to draft, against a simulated model whose acceptance and pass times are known."""

import random
import statistics

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


class Busy(Simulated):
    """Its passes take up to half as long again while others use the machine, by turns, and each jitters."""

    work, pace, left = 0.0, 1.0, 0.0
    """work: what all passes would have taken on a machine of one's own."""

    def forward(self, tokens: list[int], precision: int) -> torch.Tensor:
        before, noise = self.now, self._random
        logits = super().forward(tokens, precision)
        alone = self.now - before
        if self.left <= 0:
            self.pace, self.left = noise.choice([1, 1, 1.2, 1.5]), noise.expovariate(1 / 100)
        self.work, self.left = self.work + alone, self.left - alone
        hiccup = 2 if noise.random() < 0.02 else 1
        self.now = before + alone * self.pace * noise.lognormvariate(0, 0.05) * hiccup
        return logits


def run(model: Simulated, count: int, length: AdaptiveLength | FixedLength) -> Statistics:
    found, tokens = Statistics(), [15]
    passes = speculate(model, Choice(), tokens, TARGET, DRAFT, length, count + 1, found, clock=lambda: model.now)
    for _ in passes:
        assert model.length == len(tokens) - 1
    assert tokens == [15, *(i % VOCABULARY for i in range(count))]
    assert found.tokens == count
    return found


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


ROW = {row: [1 + row * more for more in range(7)] for row in (0.12, 0.13, 0.2, 0.3)}


@pytest.mark.parametrize(
    ("acceptance", "draft_s", "row"), [(0.935, 0.93, 0.13), (0.878, 0.8, 0.2), (0.7, 0.9, 0.3), (0.85, 0.62, 0.2)]
)
def test_on_a_busy_machine_it_loses_no_more(acceptance: float, draft_s: float, row: float) -> None:
    for seed in range(25):
        model = Busy(acceptance, draft_s, ROW[row], seed)
        run(model, 256, AdaptiveLength())
        assert model.work <= 1.03 * 256, seed


def test_on_a_busy_machine_it_still_gains() -> None:
    gains = []
    for seed in range(15):
        model = Busy(0.9, 0.45, ROW[0.12], seed)
        run(model, 256, AdaptiveLength())
        gains.append(256 / model.work)
    assert statistics.median(gains) > 1.1


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
    found = run(model, 300, FixedLength(3))
    assert found.steps_at[DRAFT] == found.drafted
    assert found.tokens == found.accepted + found.rounds + found.steps
    assert found.seconds == pytest.approx(model.now)
    assert found.acceptance == pytest.approx(0.7 * (1 + 0.7 + 0.49) / 3, abs=0.07)
    adaptive = run(Simulated(0.9, 0.3, FLAT), 300, AdaptiveLength())
    assert adaptive.speed_up == pytest.approx(300 / adaptive.seconds)


def test_expected_tokens_is_the_geometric_sum() -> None:
    assert expected_tokens(0.5, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))
    assert expected_tokens(1.0, 3) == 4
