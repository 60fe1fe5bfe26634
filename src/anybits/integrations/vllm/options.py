"""What a user may ask: of the engine at its start, and of one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anybits.config import Single, StoredConfig, check_single, precision_order
from anybits.errors import AnybitsError
from anybits.precision import FIRST_PROFILE

KEY = "anybits"
"""Key of the engine's options in vLLM's --additional-config."""

FIELD = "precision"
"""Name of a request's precision in SamplingParams.extra_args and in `vllm_xargs` over HTTP."""


def parse_precision(value: Any, served: tuple[Single, ...]) -> Single:
    """Return the precision (3, "3", 3.0) or profile ("2.5", 2.5) that `value` names; raise AnybitsError for others."""
    try:
        return check_single(value, served)
    except AnybitsError:
        allowed = ", ".join(map(str, served))
        raise AnybitsError(f"precision {value!r} is not served: choose one of {allowed}") from None


@dataclass(frozen=True)
class EngineOptions:
    """The engine's share of the options.

    precisions, profiles: those that are loaded and may be asked for; default: of requests that ask for none.
    """

    precisions: tuple[int, ...]
    default: Single
    profiles: tuple[str, ...] = ()

    @property
    def served(self) -> tuple[Single, ...]:
        """Precisions and profiles, ascending."""
        return tuple(sorted((*self.precisions, *self.profiles), key=precision_order))

    def code(self, single: Single) -> int:
        """Return the number that stands for `single` in a batch: itself, or FIRST_PROFILE + a profile's index."""
        return single if isinstance(single, int) else FIRST_PROFILE + self.profiles.index(single)

    @classmethod
    def read(cls, additional_config: Any, stored: StoredConfig) -> EngineOptions:
        """Read `{"anybits": {"max_precision": p, "precision": p}}`, both optional; raise AnybitsError for others."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping) or set(given) - {"max_precision", FIELD}:
            raise AnybitsError(
                f"the engine options {given!r} cannot be read: --additional-config takes "
                f'{{"{KEY}": {{"max_precision": p, "{FIELD}": p}}}}, both optional'
            )
        if "max_precision" in given:
            stored = stored.up_to(stored.planes_of(parse_precision(given["max_precision"], stored.singles)))
        default = parse_precision(given.get(FIELD, stored.precisions[-1]), stored.singles)
        return cls(stored.precisions, default, tuple(stored.profiles))

    def of_request(self, extra_args: Mapping[str, Any] | None) -> Single:
        """Return the precision or profile that a request asks for; raise AnybitsError when it is not served."""
        value = (extra_args or {}).get(FIELD)
        return self.default if value is None else parse_precision(value, self.served)

    def in_worker(self, extra_args: Mapping[str, Any] | None) -> int:
        """Return the code of what `of_request` returned in the front end.

        It never raises: an exception in a worker ends the engine.
        """
        try:
            return self.code(self.of_request(extra_args))
        except AnybitsError:
            return self.code(self.default)
