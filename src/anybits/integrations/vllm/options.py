"""What a user may ask: of the engine at its start, and of one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anybits.config import StoredConfig, check_single
from anybits.errors import AnybitsError

KEY = "anybits"
"""Key of the engine's options in vLLM's --additional-config."""

FIELD = "precision"
"""Name of a request's precision in SamplingParams.extra_args and in `vllm_xargs` over HTTP."""


def parse_precision(value: Any, precisions: tuple[int, ...]) -> int:
    """Return the precision that `value` (3, "3", 3.0) names; raise AnybitsError when it is not served."""
    try:
        return int(check_single(value, precisions))
    except AnybitsError:
        allowed = ", ".join(map(str, precisions))
        raise AnybitsError(f"precision {value!r} is not served: choose one of {allowed}") from None


@dataclass(frozen=True)
class EngineOptions:
    """The engine's share of the options.

    precisions: those that are loaded and may be asked for; default: of requests that ask for none.
    """

    precisions: tuple[int, ...]
    default: int

    @classmethod
    def read(cls, additional_config: Any, stored: StoredConfig) -> EngineOptions:
        """Read `{"anybits": {"max_precision": p, "precision": p}}`, both optional; raise AnybitsError for others."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping) or set(given) - {"max_precision", FIELD}:
            raise AnybitsError(
                f"the engine options {given!r} cannot be read: --additional-config takes "
                f'{{"{KEY}": {{"max_precision": p, "{FIELD}": p}}}}, both optional'
            )
        precisions = stored.precisions
        if "max_precision" in given:
            highest = parse_precision(given["max_precision"], precisions)
            precisions = stored.up_to(highest).precisions
        return cls(precisions, parse_precision(given.get(FIELD, precisions[-1]), precisions))

    def of_request(self, extra_args: Mapping[str, Any] | None) -> int:
        """Return the precision that a request asks for; raise AnybitsError when it is not served."""
        value = (extra_args or {}).get(FIELD)
        return self.default if value is None else parse_precision(value, self.precisions)

    def in_worker(self, extra_args: Mapping[str, Any] | None) -> int:
        """Return what `of_request` returned in the front end, and never raise: an exception here ends the engine."""
        try:
            return self.of_request(extra_args)
        except AnybitsError:
            return self.default
