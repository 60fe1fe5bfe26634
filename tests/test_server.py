"""The server's answers: what its fields do and what its errors say, to the openai client and by its own OpenAPI."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings

import anybits
from anybits.integrations import transformers as hf
from serving import Server, complete, served_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(folder, tmp_path_factory.mktemp("log") / "a", "--max-queue", "200", "--max-model-len", "96")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """Greedy text of transformers' own generate."""
    model, tokenizer = hf.load_model(folder, dtype=torch.float32), hf.load_tokenizer(folder)

    def text(prompt: str, precision: int | str, tokens: int) -> str:
        with anybits.precision(precision):
            return hf.generate_text(model, tokenizer, prompt, tokens)[0]

    return text


@pytest.mark.parametrize("precision", [2, 3, 4, "2.5"])
def test_completion_writes_what_generate_writes(server: Server, expected: Any, precision: int | str) -> None:
    answer = complete(server, "Hello", max_tokens=20, extra_body={"precision": precision})
    assert answer.choices[0].text.strip() == expected("Hello", precision, 20).strip()
    assert answer.precision == precision
    alias = server.openai.completions.create(
        model=f"tiny:{precision}bit", prompt="Hello", max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    assert alias.choices[0].text == answer.choices[0].text
    assert (alias.precision, alias.usage.prompt_tokens, alias.usage.completion_tokens) == (precision, 5, 20)


def test_a_stream_is_the_same_text_with_usage_at_the_end(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    settings = dict(
        model="tiny", messages=messages, max_tokens=12, temperature=0, extra_body={"precision": 3, "ignore_eos": True}
    )
    whole = server.openai.chat.completions.create(**settings)
    chunks = list(
        server.openai.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {c.precision for c in chunks} == {3}
    assert chunks[-1].usage == whole.usage


def test_stop_ends_the_text_before_the_stop_string(server: Server) -> None:
    free = complete(server, "Hello", max_tokens=20).choices[0].text
    stop = free[9:12]
    stopped = complete(server, "Hello", max_tokens=20, stop=[stop])
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 20


def test_logprobs_of_both_kinds(server: Server) -> None:
    plain = complete(server, "Hello", max_tokens=5, logprobs=3).choices[0].logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == 5
    assert all(max(top.values()) == own for top, own in zip(plain.top_logprobs, plain.token_logprobs, strict=True))
    messages = [{"role": "user", "content": "Hello"}]
    chat = server.openai.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    content = chat.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(plain.token_logprobs, abs=1e-4)
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in content)


def test_a_seed_gives_the_same_text_and_n_choices_differ(server: Server) -> None:
    one, two = (complete(server, "Hello", max_tokens=12, temperature=1, seed=7, n=3) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices]
    assert len(set(texts)) == 3
    assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (5, 36)


def test_drafts_leave_the_text_as_it_is_and_are_counted(server: Server) -> None:
    before = server.metric("anybits_drafted_tokens_total")
    wanted = complete(server, "Hello", max_tokens=60).choices[0].text
    assert server.metric("anybits_drafted_tokens_total") == before
    for streamed in (False, True):
        answer = complete(server, "Hello", max_tokens=60, stream=streamed, extra_body={"draft_precision": 3})
        assert (answer.choices[0].text if not streamed else "".join(c.choices[0].text for c in answer)) == wanted
    stopped = complete(server, "Hello", max_tokens=60, stop=[wanted[20:23]], extra_body={"draft_precision": 3})
    assert stopped.choices[0].text == wanted[: wanted.index(wanted[20:23])]
    drawn = complete(server, "Hello", max_tokens=30, temperature=0.8, top_p=0.9, extra_body={"draft_precision": 2})
    assert drawn.usage.completion_tokens == 30
    drafted = server.metric("anybits_drafted_tokens_total") - before
    assert drafted > 0
    assert server.metric("anybits_accepted_tokens_total") <= server.metric("anybits_drafted_tokens_total")
    server.wait_until_idle(2)


def test_a_shared_start_is_computed_once_at_each_precision(server: Server) -> None:
    before, start = server.metric("anybits_prefix_tokens_reused_total"), "a system prompt of all the requests "
    whole = len(start) // 16 * 16

    def cached(tail: str, precision: int, n: int = 1) -> int:
        answer = complete(server, start + tail, max_tokens=2, n=n, extra_body={"precision": precision})
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("abc", 3) == 0
    assert [cached("def", 3), cached("ghi", 2), cached("ghi", 4), cached("xyz", 2, n=3)] == [whole, 0, 0, whole]
    assert server.metric("anybits_prefix_tokens_reused_total") - before == (1 + 3) * whole
    messages = [{"role": "user", "content": start + "abc"}]
    chat = server.openai.chat.completions.create(
        model="tiny", messages=messages, max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    assert list(chat)[-1].usage.prompt_tokens_details.cached_tokens == whole  # at 4 bits, the default
    server.wait_until_idle(2)
    assert server.metric("anybits_kv_cached_ratio") > 0


def test_several_prompts_and_token_ids(server: Server) -> None:
    texts = [c.text for c in complete(server, ["abc", "Hello"], max_tokens=6).choices]
    assert texts == [complete(server, p, max_tokens=6).choices[0].text for p in ("abc", "Hello")]
    ids = complete(server, [4, 5, 6], max_tokens=6).choices[0].text
    assert ids == texts[0]


def test_models_lists_the_aliases(server: Server) -> None:
    assert [m.id for m in server.openai.models.list()] == ["tiny", *(f"tiny:{p}bit" for p in (2, 2.5, 3, 4))]
    assert server.openai.models.retrieve("tiny:2.5bit").profiles == ["2.5"]
    assert server.openai.models.retrieve("tiny:3bit").precision == 3


WRONG = [
    ({"precision": 7}, 400, "precision", 'choose one of 2, 2.5, 3, 4 or "auto"'),
    ({"precision": 2.7}, 400, "precision", "precision 2.7 is not stored: choose one of 2, 2.5, 3, 4"),
    ({"precision": "high"}, 400, "precision", "auto"),
    ({"prefill_precision": 8}, 400, "prefill_precision", "choose one of 2, 2.5, 3, 4"),
    ({"precision": 3, "draft_precision": 3}, 400, "draft_precision", 'choose 2, 2.5 or "off"'),
    (
        {"precision": 2, "draft_precision": 3},
        400,
        "draft_precision",
        'lower than the request\'s precision 2: choose "off"',
    ),
    ({"draft_precision": 9}, 400, "draft_precision", 'choose one of 2, 2.5, 3, 4 or "off"'),
    ({"model": "gpt"}, 404, "model", "choose tiny or tiny:2bit"),
    ({"model": "tiny:2bit", "precision": 3}, 400, "precision", "contradicts"),
    ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 95}, 400, "max_tokens", "at most 93 here"),
    ({"prompt": "a" * 96}, 400, "prompt", "at most 95"),
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": [64]}, 400, "prompt", "63"),
    ({"prompt": {"a": 1}}, 400, "prompt", "prompt"),
    ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"n": 33}, 400, "n", "at most 32"),
    ({"echo": True}, 400, "echo", "echo is not supported"),
    ({"min_p": 0.1}, 400, "min_p", "min_p is not supported"),
    ({"precison": 2}, 400, "precison", "precison is unknown: did you mean precision?"),
    ({"stop": [""]}, 400, "stop", "at least 1 character"),
]


@pytest.mark.parametrize(("change", "status", "field", "says"), WRONG, ids=[str(w[0])[:30] for w in WRONG])
def test_a_wrong_field_is_named(server: Server, change: dict[str, Any], status: int, field: str, says: str) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field), error
    assert says in error["message"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("body", [b"{", b"[]", b"", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_request_gets_400(server: Server, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_another_content_type_gets_400(server: Server) -> None:
    """What curl -d sends without a header."""
    answer = server.http.post("/v1/completions", content=b'{"prompt": "abc"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "gpt"}, "model_not_found"),
        ({"prompt": "a" * 96}, "context_length_exceeded"),
        ({"max_tokens": 95}, "context_length_exceeded"),
        ({"echo": True}, "unsupported_parameter"),
        ({"precison": 2}, "unknown_parameter"),
    ],
)
def test_errors_have_the_codes_that_clients_look_for(server: Server, change: dict[str, Any], code: str) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2} | change)
    assert answer.json()["error"]["code"] == code
    assert server.http.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"


def test_fields_that_ask_for_nothing_are_accepted(server: Server) -> None:
    neutral = {"tools": [], "min_p": 0, "repetition_penalty": 1.0, "logit_bias": {}, "store": False, "metadata": None}
    body = {"prompt": "abc", "max_tokens": 2} | neutral
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_only_an_assistant_may_have_said_nothing(server: Server) -> None:
    def ask(role: str) -> Any:
        messages = [{"role": role, "content": None}, {"role": "user", "content": "abc"}]
        return server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})

    assert ask("assistant").status_code == 200
    refused = ask("user")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_the_limit_that_was_given_is_named(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "abc"}], "max_completion_tokens": 1000}
    error = server.http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "max_completion_tokens"
    assert "max_completion_tokens 1000" in error["message"]


def test_request_ids_come_back_and_are_logged(server: Server) -> None:
    assert server.http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert server.http.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")
    assert " mine-1 GET /health 200" in server.log.read_text()


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "slider" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_many_clients_get_what_they_would_get_alone(server: Server, expected: Any) -> None:
    rng = random.Random(0)
    wanted = [("".join(rng.choices("abcdefgh", k=rng.randint(1, 30))), rng.choice([2, 3, 4, 2.5])) for _ in range(30)]

    def ask(index: int) -> str | None:
        prompt, precision = wanted[index]
        settings = dict(max_tokens=20, extra_body={"precision": precision})
        if index % 6:
            return complete(server, prompt, **settings).choices[0].text
        stream = complete(server, prompt, stream=True, **settings)
        next(iter(stream))
        stream.close()
        return None

    with ThreadPoolExecutor(16) as clients:
        texts = list(clients.map(ask, range(len(wanted))))
    for (prompt, precision), text in zip(wanted, texts, strict=True):
        assert text is None or text.strip() == expected(prompt, precision, 20).strip()
    server.wait_until_idle(2)
    assert server.http.get("/health").json()["inside"] == 0
    assert 'anybits_generated_tokens_total{precision="2.5"}' in server.http.get("/metrics").text


def test_the_openapi_description_is_kept(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # A valid precision may contradict a valid alias, and a prompt of valid length may leave no room.
    too_strict = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
    paths = []
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(
            max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(excluded_checks=too_strict, timeout=60)

        check()
        paths.append(operation.path)
    assert len(paths) == 7


def test_json_of_a_stream_is_one_object_a_line(server: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 3, "stream": True, "temperature": 0}
    lines = [line for line in server.http.post("/v1/completions", json=body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["object"] for line in lines[:-1]] == ["text_completion"] * 3
