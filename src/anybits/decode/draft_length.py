"""How many tokens to draft: from the running acceptance and the measured seconds of each kind of pass.

With acceptance a, a round of k drafts brings (1 - a^(k+1)) / (1 - a) tokens on average and takes k * d + v(k + 1)
seconds: d of one draft pass, v(m) of a target pass over m rows. Plain decoding takes v(1) a token.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_DRAFT = 6
"""Tokens drafted in one round at most: 7 rows stay far below the rows from which kernels give way to a GEMM."""


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Return the mean tokens of a round: the accepted ones of `drafts`, and the one that follows them."""
    return sum(acceptance**i for i in range(drafts + 1))


def _typical(seconds: Sequence[float]) -> float:
    """Return the median; of fewer than three, whose first found cold caches, the least."""
    return statistics.median(seconds) if len(seconds) > 2 else min(seconds)


@dataclass
class Costs:
    """Seconds of passes as running medians of the last few; guesses stand in for what was not measured yet.

    Of a plain pass it is the lower quartile: a gain that is smaller than the noise of plain passes counts as none.

    draft_guess: seconds of a draft pass in plain passes; row_guess: what one more row adds, in plain passes.
    """

    draft_guess: float = 0.5
    row_guess: float = 0.15
    _draft: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    _rows: dict[int, deque[float]] = field(default_factory=dict)
    _lately: set[int] = field(default_factory=set)

    def saw_draft(self, seconds: float) -> None:
        """Count one draft pass."""
        self._draft.append(seconds)

    def saw_rows(self, rows: int, seconds: float) -> None:
        """Count one pass of `rows` rows at the target precision; one row is a plain pass.

        More rows never take less than one: a pass that did shows that the machine got faster since one was timed.
        """
        self._rows.setdefault(rows, deque(maxlen=9)).append(seconds)
        if rows > 1 and self.plain is not None and seconds < self.plain:
            self._rows[1].append(seconds)
        self._lately.add(rows)

    def forget_old(self) -> None:
        """Drop row counts that were not seen since the last call: one slow moment must not rule them out for ever."""
        self._rows = {rows: seen for rows, seen in self._rows.items() if rows == 1 or rows in self._lately}
        self._lately.clear()

    @property
    def plain(self) -> float | None:
        """Seconds of a plain pass, None before two were seen: the first one warms caches."""
        seen = sorted(self._rows.get(1, ()))
        return seen[(len(seen) - 1) // 4] if len(seen) > 1 else None

    @property
    def draft(self) -> float:
        """Seconds of a draft pass."""
        return _typical(self._draft) if self._draft else self.draft_guess * (self.plain or 1.0)

    @property
    def widest(self) -> int:
        """The most rows of a target pass that was timed."""
        return max(self._rows, default=1)

    def rows(self, count: int) -> float:
        """Seconds of a target pass over `count` rows: measured, or on the line through the nearest measured."""
        known = sorted(self._rows)
        if count in self._rows:
            return _typical(self._rows[count])
        plain = self.plain or 1.0
        if known in ([], [1]):
            return plain * (1 + self.row_guess * (count - 1))
        right = min(max(bisect_right(known, count), 1), len(known) - 1)
        low, high = known[right - 1], known[right]
        a, b = _typical(self._rows[low]), _typical(self._rows[high])
        return max(a + (b - a) * (count - low) / (high - low), plain)


class Acceptance:
    """Share of drafts that are kept, by how sure the draft was of them; old counts fade."""

    EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)
    FADE = 0.99
    PRIOR = 2.0

    def __init__(self) -> None:
        self._kept = [self.PRIOR * (i + 0.5) / (len(self.EDGES) + 1) for i in range(len(self.EDGES) + 1)]
        self._seen = [self.PRIOR] * (len(self.EDGES) + 1)
        self._all_kept, self._all_seen = 8.0, 10.0  # hopeful: `AdaptiveLength.credit` bounds what hope can cost

    def saw(self, sure: Sequence[float], kept: int) -> None:
        """Count a round: confidences of its drafts, of which the first `kept` stood and the next one fell."""
        for i, confidence in enumerate(sure[: kept + 1]):
            place, good = bisect_right(self.EDGES, confidence), float(i < kept)
            self._kept[place] = self.FADE * self._kept[place] + good
            self._seen[place] = self.FADE * self._seen[place] + 1
            self._all_kept = self.FADE * self._all_kept + good
            self._all_seen = self.FADE * self._all_seen + 1

    @property
    def mean(self) -> float:
        """Share of all drafts that were put to the test and kept."""
        return self._all_kept / self._all_seen

    def of(self, confidence: float) -> float:
        """Share kept of those about as sure as `confidence`."""
        place = bisect_right(self.EDGES, confidence)
        return self._kept[place] / self._seen[place]


class FixedLength:
    """Always the same number of drafts: what is drawn then depends on the seed alone."""

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts
        self.costs = Costs()

    def begin(self, room: int) -> int:
        """Return how many tokens may be drafted now, at most `room`."""
        return min(self.drafts, room)

    def more(self, sure: Sequence[float]) -> bool:
        """Return whether to draft on after drafts of confidences `sure`."""
        return True

    def plain_step(self, seconds: float) -> None:
        """Count a plain pass."""
        self.costs.saw_rows(1, seconds)

    def round(self, sure: Sequence[float], kept: int, draft_s: float, verify_s: float) -> None:
        """Count a round of len(sure) drafts of which `kept` stood."""


class AdaptiveLength:
    """Drafts as long as it pays; loses at most GRANT plain passes, and after that SHARE of the time.

    `credit` is how many plain passes may still be lost: every token adds SHARE, a round adds what it gained or
    takes what it lost. A round begins only when its worst case, one token, is covered.
    """

    GRANT, SHARE, CAP = 1.0, 0.01, 8.0
    PROBE_EVERY = 32
    """Plain tokens between two rounds that are not expected to pay."""
    REFRESH_EVERY = 16
    """Rounds after which one plain pass is timed again, as contexts grow and machines get busy."""
    FORGET_EVERY = 8
    """Such refreshes after which row counts that were not used are estimated anew."""

    def __init__(self) -> None:
        self.costs, self.acceptance = Costs(), Acceptance()
        self.credit = self.GRANT
        self._since_round = self._since_plain = self._refreshes = 0

    def begin(self, room: int) -> int:
        """Return the most tokens to draft now, 0 for a plain pass; room: tokens that may be drafted at all."""
        plain = self.costs.plain
        if plain is None or self._since_plain >= self.REFRESH_EVERY:
            return 0
        most = min(room, MAX_DRAFT, self.costs.widest + 1)
        affordable = [k for k in range(1, most + 1) if self._worst(k) <= self.credit]
        if not affordable:
            return 0
        if self.speed_up(max(affordable, key=self.speed_up)) > 1:
            return affordable[-1]
        return affordable[0] if self._since_round >= self.PROBE_EVERY else 0

    def more(self, sure: Sequence[float]) -> bool:
        """Return whether one more draft is worth its pass and its row, after drafts of confidences `sure`."""
        drafts, survival = len(sure), self.acceptance.mean
        for confidence in sure:
            survival *= self.acceptance.of(confidence)
        plain = self.costs.plain or 1.0
        a_token_s = plain / max(1.0, self.speed_up(drafts), self.speed_up(drafts + 1))
        extra = self.costs.draft + self.costs.rows(drafts + 2) - self.costs.rows(drafts + 1)
        return survival * a_token_s > extra

    def plain_step(self, seconds: float) -> None:
        """Count a plain pass."""
        self.costs.saw_rows(1, seconds)
        if self._since_plain >= self.REFRESH_EVERY:
            self._refreshes += 1
            if self._refreshes % self.FORGET_EVERY == 0:
                self.costs.forget_old()
        self._since_plain = 0
        self._since_round += 1
        self._earn(self.SHARE)

    def round(self, sure: Sequence[float], kept: int, draft_s: float, verify_s: float) -> None:
        """Count a round of len(sure) drafts of which `kept` stood; seconds of all its drafts, and of verifying."""
        self.costs.saw_draft(draft_s / len(sure))
        self.costs.saw_rows(len(sure) + 1, verify_s)
        self.acceptance.saw(sure, kept)
        self._since_round = 0
        self._since_plain += 1
        plain = self.costs.plain
        assert plain is not None
        self._earn((kept + 1) * (1 + self.SHARE) - (draft_s + verify_s) / plain)

    def speed_up(self, drafts: int) -> float:
        """Return the expected speed over plain decoding of rounds of `drafts`."""
        plain = self.costs.plain or 1.0
        cost = drafts * self.costs.draft + self.costs.rows(drafts + 1)
        return expected_tokens(self.acceptance.mean, drafts) * plain / cost

    def _worst(self, drafts: int) -> float:
        """Return the plain passes lost when no draft of `drafts` stands."""
        return (drafts * self.costs.draft + self.costs.rows(drafts + 1)) / (self.costs.plain or 1.0) - 1

    def _earn(self, passes: float) -> None:
        self.credit = min(self.credit + passes, self.CAP)


DraftLength = FixedLength | AdaptiveLength
