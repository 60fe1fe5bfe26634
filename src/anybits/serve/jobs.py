"""From a checked body to jobs for the worker: names, precision, prompt and limits, each error naming its field."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anybits.config import Single, check_single, precision_order
from anybits.errors import AnybitsError
from anybits.serve.policy import Targets
from anybits.serve.sampling import Sampling
from anybits.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from anybits.serve.text import TextStream
from anybits.serve.worker import Delta, Job

GREEDY_BELOW = 1e-4  # a smaller temperature only overflows where greedy gives the same token


class RequestError(Exception):
    """A request that cannot be served: HTTP status, the field it is about, and a sentence for the client."""

    def __init__(self, status: int, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Served:
    """What the server offers: model name, stored precisions, default precision (None is auto), longest sequence.

    default_draft: the precision that drafts for requests that say nothing of it, None for no drafts.
    """

    name: str
    precisions: tuple[int, ...]
    default_precision: Single | None
    max_model_len: int
    max_choices: int
    vocabulary: int
    profiles: tuple[str, ...] = ()
    default_draft: Single | None = None

    @property
    def singles(self) -> tuple[Single, ...]:
        """Precisions and profiles, ascending."""
        return tuple(sorted((*self.precisions, *self.profiles), key=precision_order))

    def aliases(self) -> dict[str, Single | None]:
        """Return every name that a request may use -> its precision; None leaves it to the request."""
        named = {f"{self.name}:{p}{'' if str(p)[0].isalpha() else 'bit'}": p for p in self.singles}
        return {self.name: None} | named

    def allowed(self) -> str:
        """Return the precisions in words."""
        return ", ".join(map(str, self.singles))

    def read(self, field: str, value: object) -> Single | None:
        """Return the precision that a field names, None for auto; raise RequestError when it is not stored."""
        automatic = field == "precision"
        if automatic and value == "auto":
            return None
        try:
            return check_single(value, self.singles)
        except AnybitsError:
            also = {"precision": ' or "auto"', "draft_precision": ' or "off"'}.get(field, "")
            message = f"{field} {value} is not stored: choose one of {self.allowed()}{also}"
            raise RequestError(400, field, message) from None


class Prompts:
    """Turns messages and texts into tokens; a lock keeps the tokenizer to one thread at a time."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._template = chat_template
        self.has_template = bool(chat_template or getattr(tokenizer, "chat_template", None))

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Return the text of one token, special tokens included."""
        return self._tokenizer.decode([token])

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens that the model expects around it."""
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a chat.

        A tokenizer without a template belongs to a model that continues text: the contents are joined by
        newlines, without any mark of who spoke.
        """
        if not self.has_template:
            return self.encode("\n".join(message["content"] for message in messages))
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise whatever their author wrote
            raise RequestError(400, "messages", f"the model's chat template refuses these messages: {error}") from None
        return self.encode(text, special=False)


def unknown_model(name: str, served: Served) -> RequestError:
    """Return the error for a model name that is not served, with OpenAI's code."""
    message = f"model '{name}' is not served: choose {' or '.join(served.aliases())}"
    return RequestError(404, "model", message, "model_not_found")


def find_precision(body: GenerationRequest, served: Served) -> Single | None:
    """Return the precision to run at, or None for auto; raise RequestError for a wrong name or number."""
    aliases = served.aliases()
    if body.model is not None and body.model not in aliases:
        raise unknown_model(body.model, served)
    asked = None if body.precision is None else served.read("precision", body.precision)
    named = aliases[body.model] if body.model is not None else None
    if named is not None and body.precision is not None and asked != named:
        raise RequestError(400, "precision", f"precision {body.precision} contradicts model '{body.model}': name one")
    if named is not None:
        return named
    if body.precision is None:
        return served.default_precision
    return asked


def find_draft(body: GenerationRequest, precision: Single | None, served: Served) -> Single | None:
    """Return the precision that drafts for a request at `precision` (None is auto), or None for no drafts.

    Raises RequestError for one that is not stored or not lower; the server's own is left out where it is not lower.
    """
    asked = body.draft_precision
    if asked == "off":
        return None
    draft = served.default_draft if asked is None else served.read("draft_precision", asked)
    highest = served.precisions[-1] if precision is None else precision
    lower = [p for p in served.singles if precision_order(p) < precision_order(highest)]
    if asked is None or draft in lower:
        return draft if draft in lower else None
    choose = " or ".join([", ".join(map(str, lower)), '"off"'] if lower else ['"off"'])
    message = f"draft_precision {asked} is not lower than the request's precision {highest}: choose {choose}"
    raise RequestError(400, "draft_precision", message)


def find_prompts(body: GenerationRequest, prompts: Prompts, served: Served) -> list[list[int]]:
    """Return the tokens of every prompt in a body; raise RequestError when one is empty, strange or too long."""
    if isinstance(body, ChatRequest):
        field, tokens = "messages", [prompts.chat([m.plain() for m in body.messages])]
    else:
        assert isinstance(body, CompletionRequest)
        field = "prompt"
        tokens = [prompts.encode(p) if isinstance(p, str) else p for p in body.prompts()]
    for prompt in tokens:
        if not prompt:
            raise RequestError(400, field, f"{field} is empty: give at least one token")
        if max(prompt) >= served.vocabulary:
            raise RequestError(400, field, f"{field} has a token id above the last one, {served.vocabulary - 1}")
        if len(prompt) >= served.max_model_len:
            message = f"{field} has {len(prompt)} tokens: at most {served.max_model_len - 1} leave room to answer"
            raise RequestError(400, field, message, "context_length_exceeded")
    return tokens


def make_jobs(
    body: GenerationRequest, prompts: Prompts, served: Served, deliver: Callable[[int, Delta], None]
) -> list[Job]:
    """Return one job for each prompt and choice; deliver(index, delta) is called in the worker's thread."""
    assert isinstance(body, ChatRequest | CompletionRequest)
    precision, tokens, choices = find_precision(body, served), find_prompts(body, prompts, served), body.n or 1
    early = body.prefill_precision
    prefill = None if early is None else served.read("prefill_precision", early)
    draft = find_draft(body, precision, served)
    if choices * len(tokens) > served.max_choices:
        raise RequestError(
            400, "n", f"{choices * len(tokens)} answers in one request: n times prompts is at most {served.max_choices}"
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    targets = None
    if body.target_tpot_ms is not None or body.target_ttft_ms is not None:
        targets = Targets(body.target_tpot_ms, body.target_ttft_ms)
    jobs: list[Job] = []
    for prompt in tokens:
        limit = _limit(body, prompt, served)
        for choice in range(choices):
            index = len(jobs)
            jobs.append(
                Job(
                    prompt=prompt,
                    max_tokens=limit,
                    sampling=_sampling(body, choice),
                    text=TextStream(prompts.decode, prompt, stop),
                    deliver=lambda delta, index=index: deliver(index, delta),  # type: ignore[misc]
                    precision=precision,
                    prefill=prefill,
                    draft=draft,
                    targets=targets,
                    ignore_end=bool(body.ignore_eos),
                )
            )
    return jobs


def _limit(body: ChatRequest | CompletionRequest, prompt: list[int], served: Served) -> int:
    room = served.max_model_len - len(prompt)
    newer = getattr(body, "max_completion_tokens", None)
    field, asked = ("max_completion_tokens", newer) if newer else ("max_tokens", body.max_tokens)
    if asked is not None and asked > room:
        message = f"{field} {asked} with a prompt of {len(prompt)} tokens is too much: at most {room} here"
        raise RequestError(400, field, f"{message}, {served.max_model_len} together", "context_length_exceeded")
    return min(body.limit or room, room)


def _sampling(body: ChatRequest | CompletionRequest, choice: int) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=None if body.seed is None else (body.seed + choice) % 2**63,  # choices of one seed differ
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logprobs=body.logprob_count,
    )
