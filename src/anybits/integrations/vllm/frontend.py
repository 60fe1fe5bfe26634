"""The front end's part: a request's precision is checked before it reaches the engine, and parts the prefix cache."""

from __future__ import annotations

from functools import wraps
from typing import Any

from anybits.config import QUANT_METHOD, Single
from anybits.errors import AnybitsError
from anybits.integrations.vllm.options import FIELD, EngineOptions


def install() -> None:
    """Wrap `InputProcessor.process_inputs`, through which every request of LLM and of the API server goes; idempotent.

    A wrong precision becomes vLLM's own validation error, which its API server answers with 400. Keys and values
    depend on the precision, so each precision has a cache salt of its own: without it a prefix that was computed
    at one precision would be handed to another.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, "anybits"):
        return

    @wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if not hasattr(self, "_anybits"):
            self._anybits = engine_options(self.vllm_config)
        options = self._anybits
        if options is None or request.sampling_params is None:
            return request
        params = request.sampling_params  # the request's own copy
        try:
            precision = options.of_request(params.extra_args)
        except AnybitsError as error:
            raise VLLMValidationError(str(error), parameter=FIELD) from None
        params.extra_args = {**(params.extra_args or {}), FIELD: precision}
        request.cache_salt = salted(request.cache_salt, precision)
        return request

    hooked: Any = process_inputs
    hooked.anybits = True
    InputProcessor.process_inputs = hooked


def engine_options(vllm_config: Any) -> EngineOptions | None:
    """Return the options of an engine that serves an anybits checkpoint, None for every other engine."""
    quant = vllm_config.quant_config
    if quant is None or quant.get_name() != QUANT_METHOD:
        return None
    return EngineOptions.read(vllm_config.additional_config, quant.stored)


def salted(salt: str | None, precision: Single) -> str:
    """Return the cache salt of a request at `precision` (or a profile) whose own salt is `salt`."""
    return f"anybits:{precision}" if not salt else f"anybits:{precision}:{salt}"
