"""anybits in vLLM: the plugin that `vllm serve` and `LLM(...)` find by their entry point.

Only files of this package import vllm. What happens where is in docs/vllm.md.
"""

from __future__ import annotations

import logging
import re

SUPPORTED = ((0, 32), (0, 33))
"""The first vLLM that works and the first that is not tested: the hooks reach into vLLM's own code."""


def register() -> None:
    """Teach this process's vLLM the quantization method `anybits`.

    vLLM calls it once in each of its processes, also those that serve other models, so it never raises: with a
    vLLM outside of SUPPORTED an anybits checkpoint is refused when, and only when, one is loaded.
    """
    import vllm

    _announce_like_vllm()
    reason = unsupported_version(vllm.__version__)
    if reason is None:
        from anybits.integrations.vllm import config  # noqa: F401  (registers the method)
    else:
        from anybits.integrations.vllm.refusal import refuse

        refuse(reason)


def unsupported_version(version: str) -> str | None:
    """Return why vLLM `version` is not supported, in one sentence, or None when it is."""
    first, beyond = SUPPORTED
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and first <= (int(found[1]), int(found[2])) < beyond:
        return None
    return (
        f"this anybits works with vLLM {first[0]}.{first[1]} or newer, but older than {beyond[0]}.{beyond[1]}, "
        f"and vLLM {version} is installed: install one of those, or another anybits"
    )


def _announce_like_vllm() -> None:
    """Let anybits' notices appear where vLLM's do."""
    ours, theirs = logging.getLogger("anybits"), logging.getLogger("vllm")
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
            ours.setLevel(theirs.level)
