"""From the worker's deltas to the JSON that OpenAI's clients read: whole answers, and chunks of a stream."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anybits.config import Single, precision_order
from anybits.serve.sampling import Logprobs
from anybits.serve.worker import Delta, Job

Piece = Callable[[int], str]


class Choice:
    """Collects the deltas of one choice."""

    def __init__(self, index: int) -> None:
        self.index, self.text = index, ""
        self.by_precision: Counter[Single] = Counter()
        self.tokens: list[tuple[int, Logprobs]] = []
        self.finish: str | None = None

    def add(self, delta: Delta) -> None:
        """Take one delta over."""
        self.text += delta.text
        self.finish = delta.finish
        if delta.precision is not None:
            self.by_precision[delta.precision] += 1
        if delta.token is not None and delta.logprobs is not None:
            self.tokens.append((delta.token, delta.logprobs))

    @property
    def precision(self) -> Single:
        """The precision at which most tokens were generated; the lower of equals."""
        return max(sorted(self.by_precision, key=precision_order), key=lambda p: self.by_precision[p], default=0)


class Shape:
    """The JSON of one kind of answer: `chat` or completion."""

    def __init__(self, chat: bool, identifier: str, model: str, piece: Piece) -> None:
        self.chat, self.piece = chat, piece
        self.head = {"id": identifier, "created": int(time.time()), "model": model}

    def whole(self, choices: list[Choice], jobs: list[Job]) -> dict[str, Any]:
        """Return the answer of a request without stream."""
        return self.head | {
            "object": "chat.completion" if self.chat else "text_completion",
            "precision": choices[0].precision,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage(choices, jobs),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        shown = {
            "index": choice.index,
            "finish_reason": choice.finish,
            "precision": choice.precision,
            "logprobs": self._logprobs(choice.tokens) if choice.tokens else None,
        }
        if self.chat:
            return shown | {"message": {"role": "assistant", "content": choice.text}}
        return shown | {"text": choice.text}

    def chunk(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        """Return the chunk of one delta."""
        tokens = [(delta.token, delta.logprobs)] if delta.token is not None and delta.logprobs is not None else []
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": delta.finish,
            "logprobs": self._logprobs(tokens) if tokens else None,
        }
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | {"content": delta.text}
        else:
            choice["text"] = delta.text
        return self._chunk_head() | {"precision": delta.precision, "choices": [choice]}

    def usage_chunk(self, choices: list[Choice], jobs: list[Job]) -> dict[str, Any]:
        """Return the last chunk of a stream with usage."""
        return self._chunk_head() | {
            "precision": choices[0].precision,
            "choices": [],
            "usage": usage(choices, jobs),
        }

    def _chunk_head(self) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _logprobs(self, tokens: list[tuple[int, Logprobs]]) -> dict[str, Any]:
        if self.chat:
            return {
                "content": [
                    self._entry(token, logprobs.chosen) | {"top_logprobs": [self._entry(*t) for t in logprobs.top]}
                    for token, logprobs in tokens
                ]
            }
        pieces = [self.piece(token) for token, _ in tokens]
        offsets = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
        return {
            "tokens": pieces,
            "token_logprobs": [logprobs.chosen for _, logprobs in tokens],
            "top_logprobs": [{self.piece(t): value for t, value in logprobs.top} for _, logprobs in tokens],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(choices: list[Choice], jobs: list[Job]) -> dict[str, Any]:
    """Return the token counts of a request."""
    generated: Counter[Single] = sum((c.by_precision for c in choices), Counter())
    prompts = sum(len(tokens) for tokens in {id(job.prompt): job.prompt for job in jobs}.values())
    cached: dict[int, int] = {}
    for job in jobs:  # the choices of one prompt share it: what the first had to compute was not cached
        found = 0 if job.sequence is None else job.sequence.reused.total()
        cached[id(job.prompt)] = min(found, cached.get(id(job.prompt), found))
    completion = generated.total()
    ordered = sorted(generated, key=precision_order)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completion,
        "total_tokens": prompts + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        "completion_tokens_by_precision": {str(p): generated[p] for p in ordered},
    }


def explain(problems: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str | None]:
    """Return a sentence, the field and OpenAI's short code for what pydantic found wrong with a body.

    A field that may be of several kinds brings one problem for each: all are named, as the client has the choice.
    """
    first = problems[0]
    if first["type"] in ("unsupported_parameter", "unknown_parameter"):
        return str(first["msg"]), str(first["ctx"]["name"]), str(first["type"])
    if first["type"] == "value_error":
        field = str(first["loc"][1]) if len(first["loc"]) > 1 else None
        return str(first["msg"]).removeprefix("Value error, "), field, None
    if first["type"] == "json_invalid" or len(first["loc"]) < 2:
        return f"the body is not a JSON object: {first['msg']}", None, None
    field = str(first["loc"][1])
    same = [p for p in problems if len(p["loc"]) > 1 and p["loc"][1] == first["loc"][1]]
    reasons = dict.fromkeys(f"{p['msg'][:1].lower()}{p['msg'][1:]}" for p in same)
    return f"{field}: {' or '.join(reasons)}", field, None


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error answer."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
