"""The bodies of requests and answers, as OpenAI's clients know them, with the fields that precision adds."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from anybits.config import Single

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (None, True),
    "audio": (None,),
    "best_of": (None, 1),
    "chat_template": (None, ""),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None, []),
    "guided_grammar": (None, ""),
    "guided_json": (None, {}),
    "guided_regex": (None, ""),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "stop_token_ids": (None, []),
    "structured_outputs": (None, {}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
"""Fields of OpenAI's API and of other servers that would change the answer, with the values that ask for nothing: all
others are refused."""

MISSPELT = 0.85
"""An unknown field that is this like a known one (difflib's ratio) is refused: `precison` must not run at the default.
`min_tokens` and `max_tokens` are 0.8 alike."""


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = Field(False, description="Send one more chunk with the token counts before the end.")


class GenerationRequest(BaseModel):
    """What chat and completion have in common."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="The served name, or NAME:3bit for a precision. Default: the model.")
    precision: int | float | str | None = Field(
        None, description="Bits to run at, a profile (2.5), or auto: the highest that meets the latency targets."
    )
    prefill_precision: int | float | str | None = Field(
        None, description="Bits or profile for the prompt alone. Default: as precision."
    )
    draft_precision: int | float | str | None = Field(
        None,
        description="Bits or profile that draft tokens while the request runs alone, or off. Default: the server's.",
    )
    target_tpot_ms: float | None = Field(None, gt=0, le=1e6, description="auto: milliseconds a token may take.")
    target_ttft_ms: float | None = Field(None, gt=0, le=1e6, description="auto: milliseconds to the first token.")
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="0 is all tokens.")
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="Go on after the token that ends a text.")
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_characters(cls, data: Any) -> Any:
        if isinstance(data, bytes):  # what the web framework gives for any other content type
            raise ValueError("the body must be JSON, sent with the header Content-Type: application/json")
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("the body holds half a surrogate pair, which is no character") from None
        return data

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> GenerationRequest:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                message = "{name} is not supported: leave it out"
                raise PydanticCustomError("unsupported_parameter", message, {"name": name})
            near = get_close_matches(name, type(self).model_fields, 1, MISSPELT) if name not in UNSUPPORTED else []
            if near:
                message = "{name} is unknown: did you mean {near}?"
                raise PydanticCustomError("unknown_parameter", message, {"name": name, "near": near[0]})
        return self


class ContentPart(BaseModel):
    """A part of a message: only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None

    @model_validator(mode="after")
    def _refuse_silence(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content of a message of the {self.role} must be text")
        return self

    def plain(self) -> dict[str, str]:
        """Return role and content as chat templates want them; an assistant may have said nothing."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000, description="Newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        """Tokens to write at most; None is as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Alternatives to report for each token; None is no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        """Tokens to write at most: 16 unless asked otherwise, as OpenAI has it."""
        return self.max_tokens or 16

    @property
    def logprob_count(self) -> int | None:
        """Alternatives to report for each token; None is no log probabilities at all."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ErrorBody(BaseModel):
    """What went wrong, the field it is about, and a short code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Body of every answer that is not 200."""

    error: ErrorBody


class PromptTokensDetails(BaseModel):
    """cached_tokens: how many of the prompt's tokens an earlier request had computed at the same precision."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts; completion_tokens_by_precision: bits or profile -> tokens generated at them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_by_precision: dict[str, int]


class Choice(BaseModel):
    """One continuation; precision: the bits or profile at which most of its tokens were generated."""

    index: int
    finish_reason: Literal["stop", "length"]
    precision: Single
    logprobs: dict[str, Any] | None


class TextChoice(Choice):
    """A continuation of a prompt."""

    text: str


class AnswerMessage(BaseModel):
    """The message that the model wrote."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Choice):
    """An answer in a chat."""

    message: AnswerMessage


class Answer(BaseModel):
    """What both kinds of answer have in common; precision: that of the first choice."""

    id: str
    created: int
    model: str
    precision: Single
    usage: Usage


class Completion(Answer):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelEntry(BaseModel):
    """A name that requests may use; precision is null where the request or the server decides."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    precision: Single | None
    precisions: list[int]
    profiles: list[str]
    max_model_len: int


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


class Health(BaseModel):
    """Answer of /health."""

    status: Literal["ok"]
    inside: int
