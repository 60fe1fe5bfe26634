"""`"precision": "auto"`: the highest precision that meets latency targets under the present load."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from statistics import median

RECENT = 5
"""Steps whose median, times the growth of a rise, must meet the target: one quick step is no room."""

MEMORY = 64
"""Steps whose mean says what requests get, prompts of others included: about as many as a short answer has tokens."""

PATIENCE = 3
"""The precision falls when steps were late by one target in sum, of which one step counts at most this fraction.

So the fewest steps are three, however slow: a single one, slow for a newcomer's prompt, is no load.
"""

HOLD_S = 1.0
"""Seconds with room to spare before the precision rises, and of silence before it starts at the top again."""

MAX_HOLD_S = 60.0
"""The hold doubles up to this whenever a rise had to be taken back, so that it does not swing."""


@dataclass(frozen=True)
class Targets:
    """Milliseconds a token after the first may take, and the first; None is no target."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None


@dataclass(frozen=True)
class Load:
    """One step as the policy sees it: how long it took a token, and how long the oldest request waits for its first.

    decoded: tokens of the step that were not the first of their answer: as many requests felt how long it took.
    """

    now: float
    step_s: float
    oldest_wait_s: float
    decoded: int = 1


class Controller:
    """The present precision for one pair of targets; all automatic requests with these targets share it.

    It falls when time above the target has added up, less time below it (Page's cumulative sum, 1954): far above it at
    once, slightly above it after a while, for a short spell not at all. Steps count, and beside them the mean of many
    over the tokens that they brought, which has what prompts cost who decodes. It rises after the hold when the targets
    would still be met if time grew like the planes that are read, the most it can grow.
    """

    def __init__(self, precisions: tuple[int, ...], targets: Targets) -> None:
        self.targets = targets
        self.changes: Counter[str] = Counter()
        self._precisions = precisions
        self._level = len(precisions) - 1
        self._hold = HOLD_S
        self._seen = self._rose = float("-inf")
        self._steps: deque[tuple[float, int]] = deque(maxlen=MEMORY)  # seconds, tokens after the first
        self._excess, self._relaxed_since = 0.0, 0.0  # excess: time above the target, in targets

    @property
    def precision(self) -> int:
        """The precision at which the next rows run."""
        return self._precisions[self._level]

    def observe(self, load: Load) -> None:
        """Take one step into account."""
        if load.now - self._seen > max(HOLD_S, 2 * load.step_s):  # it was idle: what was learned is out of date
            self._level, self._hold = len(self._precisions) - 1, HOLD_S
            self._forget_load(load.now)
        self._seen = load.now
        if load.decoded:
            self._steps.append((load.step_s, load.decoded))
        typical, mean = self._step_s()
        pressure = self._pressure(load, load.step_s if load.decoded else 0.0)
        if len(self._steps) == MEMORY and (lasting := self._pressure(load, mean)) > 1:
            pressure = max(pressure, lasting)
        if load.decoded or pressure > 1:
            self._excess = max(0.0, self._excess + min(pressure - 1, 1 / PATIENCE))
        if self._pressure(load, max(typical, mean)) * self._growth() > 1:
            self._relaxed_since = load.now
        if self._excess > 0.999 and self._level > 0:
            self._hold = min(2 * self._hold, MAX_HOLD_S) if load.now - self._rose < 2 * self._hold else HOLD_S
            self._move(-1, load.now)
        elif load.now - self._relaxed_since >= self._hold and self._level + 1 < len(self._precisions):
            self._rose = load.now
            self._move(+1, load.now)

    def _step_s(self) -> tuple[float, float]:
        """Return the median time of the last steps, and the mean time of a token over all that are remembered."""
        if not self._steps:
            return 0.0, 0.0
        recent = median(seconds for seconds, _ in list(self._steps)[-RECENT:])
        return recent, sum(s * n for s, n in self._steps) / sum(n for _, n in self._steps)

    def _pressure(self, load: Load, step_s: float) -> float:
        """Return time over target when a token takes `step_s`: above 1 a target is missed."""
        tpot = 0.0 if self.targets.tpot_ms is None else 1000 * step_s / self.targets.tpot_ms
        ttft = 0.0 if self.targets.ttft_ms is None else 1000 * load.oldest_wait_s / self.targets.ttft_ms
        return max(tpot, ttft)

    def _growth(self) -> float:
        """Return planes of the next higher precision over those of the present one."""
        above = self._precisions[min(self._level + 1, len(self._precisions) - 1)]
        return above / self.precision

    def _move(self, by: int, now: float) -> None:
        self._level += by
        self.changes["up" if by > 0 else "down"] += 1
        self._forget_load(now)

    def _forget_load(self, now: float) -> None:
        """Start measuring again: times of another precision say nothing about this one."""
        self._steps.clear()
        self._excess, self._relaxed_since = 0.0, now


class Policy:
    """The controllers of all pairs of targets in use."""

    MOST = 64  # pairs of targets remembered; a client may name its own, so the number must be bounded

    def __init__(self, precisions: tuple[int, ...], default: Targets) -> None:
        self._precisions, self.default = precisions, default
        self.controllers = {default: Controller(precisions, default)}

    def controller(self, targets: Targets | None = None) -> Controller:
        """Return the controller of `targets`, or of the server's own."""
        targets = targets or self.default
        if targets not in self.controllers:
            if len(self.controllers) >= self.MOST:
                del self.controllers[next(t for t in self.controllers if t != self.default)]
            self.controllers[targets] = Controller(self._precisions, targets)
        return self.controllers[targets]

    def observe(self, load: Load) -> None:
        """Let every controller take one step into account."""
        for controller in self.controllers.values():
            controller.observe(load)
