"""One request as the engine sees it: tokens, how many of them are in the KV cache, and at which precision it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from anybits.config import Single
from anybits.serve.sampling import Logprobs, Sampler, Sampling


class PrecisionChoice(Protocol):
    """Says at which precision the next rows run; may change from step to step."""

    @property
    def precision(self) -> Single:
        """A stored precision or profile."""


@dataclass(frozen=True)
class Fixed:
    """The precision or profile that the client named."""

    precision: Single


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it.

    prefill: precision of the prompt's rows, or None for the choice's own; deadline: in the engine's clock; draft:
    precision of drafts while it runs alone, or None for no drafts.
    """

    prompt: list[int]
    max_tokens: int
    choice: PrecisionChoice
    sampling: Sampling = field(default_factory=Sampling)
    prefill: Single | None = None
    stop_tokens: frozenset[int] = frozenset()
    arrived: float = 0.0
    deadline: float | None = None
    draft: Single | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.sampler = Sampler(self.sampling)
        self.computed = 0
        self.computed_at: list[Single] = []
        """Precision of every computed position."""
        self.blocks: list[int] = []
        """Blocks of the positions in order; those before `behind` only repeat the first that is left."""
        self.behind = 0
        self.keys: list[bytes] = []
        """Keys of the computed full blocks, as far as prefixes are reused."""
        self.reused: Counter[Single] = Counter()
        """Precision -> positions of the prompt that were found computed."""
        self.generated_at: Counter[Single] = Counter()
        self.counts: Counter[int] = Counter()
        self.first_token: float | None = None
        self.finish: str | None = None

    @property
    def pending(self) -> int:
        """Tokens that are not yet in the KV cache: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - len(self.prompt)

    def row_precisions(self, start: int, stop: int) -> list[Single]:
        """Return the precision of the rows at positions start ... stop - 1."""
        now = self.choice.precision
        early = max(min(len(self.prompt), stop) - start, 0)
        return [now if self.prefill is None else self.prefill] * early + [now] * (stop - start - early)

    def fill(self, precisions: list[Single]) -> None:
        """Count the next rows as computed at `precisions`."""
        self.computed_at += precisions
        self.computed = len(self.computed_at)

    def restart(self) -> None:
        """Forget what was computed: the blocks have been given back."""
        self.computed, self.behind = 0, 0
        self.computed_at, self.blocks, self.keys = [], [], []
        if not self.generated:
            self.reused.clear()

    def append(self, token: int, precision: Single) -> None:
        """Take a generated token over, and finish when it ends the text or was the last allowed."""
        self.tokens.append(token)
        self.generated_at[precision] += 1
        self.counts[token] += 1
        if token in self.stop_tokens:
            self.finish = "stop"
        elif self.generated >= self.max_tokens:
            self.finish = "length"


@dataclass(frozen=True)
class Chunk:
    """Positions start ... stop - 1 of a sequence that run in this step, each row at its precision."""

    sequence: Sequence
    start: int
    stop: int
    precisions: list[Single]

    @property
    def complete(self) -> bool:
        """Whether the last row is the sequence's last token, so that it brings a new one."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True)
class Token:
    """A generated token, the precision of the row it came from, and why the sequence ended with it, if it did."""

    sequence: Sequence
    token: int
    precision: Single
    logprobs: Logprobs | None
    finish: str | None
