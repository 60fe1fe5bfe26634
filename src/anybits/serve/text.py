"""From tokens to text while they come: whole characters only, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 5
"""Prompt tokens decoded along with the first new one: some tokenizers drop a leading space without them."""

LONGEST = 8
"""Tokens that may make up one character; what is still broken after more of them is not going to be whole."""


class TextStream:
    """Turns tokens into text that may be sent at once."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._tokens = list(prompt[-CONTEXT:])
        self._start, self._read = 0, len(self._tokens)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that is certain once `token` is known; sets `stopped` at a stop string."""
        self._tokens.append(token)
        return self._release(self._new_text())

    def flush(self) -> str:
        """Return what was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text, self._held = self._held + self._whole()[len(self._known()) :], ""
        self._start = self._read = len(self._tokens)
        return text

    def _known(self) -> str:
        return self._decode(self._tokens[self._start : self._read])

    def _whole(self) -> str:
        return self._decode(self._tokens[self._start :])

    def _new_text(self) -> str:
        known, whole = self._known(), self._whole()
        incomplete = whole.endswith("\ufffd") and len(self._tokens) - self._read <= LONGEST
        if len(whole) <= len(known) or incomplete:
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return whole[len(known) :]

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((self._overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return how many characters at the end of `text` could be the beginning of `stop`."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
