"""What a generation did: tokens by precision, drafts accepted, seconds by kind of pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from anybits.precision import Precision


@dataclass
class Statistics:
    """Counts and seconds of one generation, filled while it runs; prefill and its token are not in them.

    rounds: drafts with their verification; steps: plain passes of one token; steps_at: precision -> passes of one
    token at it, drafts included; plain_step_s: seconds of one plain pass, None when none was timed.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    steps_at: Counter[Precision] = field(default_factory=Counter)
    draft_s: float = 0.0
    verify_s: float = 0.0
    step_s: float = 0.0
    plain_step_s: float | None = None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were kept; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def seconds(self) -> float:
        """Seconds of all passes."""
        return self.draft_s + self.verify_s + self.step_s

    @property
    def speed_up(self) -> float | None:
        """Seconds that plain passes would have taken over those that were; None when no plain pass was timed."""
        if self.plain_step_s is None or not self.seconds:
            return None
        return self.tokens * self.plain_step_s / self.seconds
