"""Precision schedules: which precision the prompt and each generated token run at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from anybits.config import parse_precision
from anybits.errors import AnybitsError
from anybits.precision import Precision


class Step:
    """What a schedule may look at: tokens generated so far, tokens of the prompt, and the last distribution."""

    def __init__(self, generated: int, prompt: int, logits: torch.Tensor) -> None:
        self.generated, self.prompt, self.logits = generated, prompt, logits

    @cached_property
    def entropy(self) -> float:
        """Entropy in nats of the distribution that the last token came from: -sum p ln p of logits `[V]`."""
        logp = self.logits.log_softmax(-1)
        return float(-(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum())


class Schedule(Protocol):
    """A policy: a precision for the prompt, then one for every pass of one token."""

    @property
    def precisions(self) -> Sequence[Precision]:
        """All precisions that it may ask for."""

    def prefill(self) -> Precision:
        """Return the precision of the prompt's rows."""

    def decode(self, step: Step) -> Precision:
        """Return the precision of the pass that computes the next token."""


@dataclass(frozen=True)
class Split:
    """One precision for the prompt, another for the answer."""

    prompt: Precision
    answer: Precision

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Both precisions."""
        return self.prompt, self.answer

    def prefill(self) -> Precision:
        """Return the prompt's precision."""
        return self.prompt

    def decode(self, step: Step) -> Precision:
        """Return the answer's precision."""
        return self.answer


@dataclass(frozen=True)
class ByLength:
    """The prompt and the first tokens at `first`; from n generated tokens on at the precision that follows n.

    later: (n, precision), ascending in n.
    """

    first: Precision
    later: tuple[tuple[int, Precision], ...]

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """All levels."""
        return self.first, *(p for _, p in self.later)

    def prefill(self) -> Precision:
        """Return the first precision."""
        return self.first

    def decode(self, step: Step) -> Precision:
        """Return the precision of the last level that the answer has reached."""
        return [self.first, *(p for n, p in self.later if step.generated >= n)][-1]


@dataclass(frozen=True)
class ByEntropy:
    """The answer at `calm`; at the precision that follows h while the last distribution's entropy is above h nats.

    above: (h, precision), ascending in h; prompt: the prompt's precision, None for the last of `above`.
    """

    calm: Precision
    above: tuple[tuple[float, Precision], ...]
    prompt: Precision | None = None

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """All levels."""
        return self.prefill(), self.calm, *(p for _, p in self.above)

    def prefill(self) -> Precision:
        """Return the prompt's precision."""
        return self.above[-1][1] if self.prompt is None else self.prompt

    def decode(self, step: Step) -> Precision:
        """Return the precision of the highest threshold that the entropy exceeds."""
        return [self.calm, *(p for h, p in self.above if step.entropy > h)][-1]


FORMS = "split:8,4 (prompt, answer), length:4,3@64,2@256 (from the 64th token 3) or entropy:2,4@1.5 (above 1.5 nats 4)"


def parse_schedule(text: str) -> Schedule:
    """Read "split:8,4", "length:4,3@64,2@256" or "entropy:2,4@1.5"; raise AnybitsError for anything else."""
    kind, _, rest = text.partition(":")
    try:
        first, *later = [part.strip() for part in rest.split(",")]
        if kind == "split":
            (answer,) = later
            return Split(_precision(first), _precision(answer))
        levels = [part.split("@") for part in later]
        ordered = [float(at) for _, at in levels]
        if kind in ("length", "entropy") and levels and ordered == sorted(ordered) and ordered[0] >= 0:
            if kind == "length":
                return ByLength(_precision(first), tuple((int(at), _precision(p)) for p, at in levels))
            return ByEntropy(_precision(first), tuple((float(at), _precision(p)) for p, at in levels))
    except (ValueError, AnybitsError):
        pass
    raise AnybitsError(f"schedule '{text}' cannot be read: write {FORMS}")


def _precision(text: str) -> Precision:
    """Return a precision or profile; ValueError or AnybitsError when it cannot be one."""
    return parse_precision(text)
