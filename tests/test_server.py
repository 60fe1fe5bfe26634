"""The server as its clients meet it: a process on 127.0.0.1, the official openai client, and its own OpenAPI."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings

import anybits
from anybits.integrations import transformers as hf
from anybits.serve.policy import HOLD_S
from conftest import tiny_model, tiny_tokenizer
from test_profiles import with_profiles

LENGTH = 8192
KEY = "a-secret"
MAIN = "from anybits.cli import main; main()"


class Server:
    """`anybits serve` on a free port; the log of the process is in `log`."""

    def __init__(self, folder: Path, log: Path, *options: str, port: str = "0") -> None:
        self.log, self.key = log, KEY if "--api-key" in options else None
        command = [sys.executable, "-c", MAIN, "serve", str(folder), "--port", port, "--dtype", "float32", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        self.url = self._started()
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=self._headers())
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def _started(self) -> str:
        for _ in range(1200):
            text = self.log.read_text()
            if " at http" in text:
                return text.split(" at ")[1].split()[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)

    def wait_until_idle(self, seconds: float) -> None:
        """Fail unless every slot and every KV block is free within `seconds`."""
        end = time.monotonic() + seconds
        while self.metric("anybits_kv_used_ratio") or self.metric("anybits_running"):
            assert time.monotonic() < end, "slots or KV are still held"
            time.sleep(0.02)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    model = tiny_model("llama")
    model.config.max_position_embeddings = LENGTH
    model.generation_config.eos_token_id = None
    model.save_pretrained(made / "float")
    tiny_tokenizer().save_pretrained(made / "float")
    anybits.quantize(str(made / "float"), made / "tiny", anybits.Recipe(preset="fast", group_size=32))
    with_profiles(made / "tiny", ("2.5",))
    return made / "tiny"


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(folder, tmp_path_factory.mktemp("log") / "a", "--max-queue", "200", "--max-model-len", "96")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def narrow(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One place, one in the queue, a key, a small body, a short patience."""
    options = "--max-batch 1 --max-queue 1 --max-body-mb 0.01 --timeout 4 --target-tpot-ms 0.001 --precision auto"
    started = Server(folder, tmp_path_factory.mktemp("log") / "b", "--api-key", KEY, *options.split())
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


def complete(server: Server, prompt: str, **settings: Any) -> Any:
    """Ask for exactly max_tokens: a random model ends its texts anywhere."""
    more = {"ignore_eos": True} | settings.pop("extra_body", {})
    return server.openai.completions.create(
        model="tiny", prompt=prompt, extra_body=more, **{"temperature": 0, **settings}
    )


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
    ({"echo": True}, 400, None, "echo is not supported"),
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


def test_a_key_is_asked_for(narrow: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="wrong").models.list()
    assert httpx.get(f"{narrow.url}/metrics").status_code == 401
    assert httpx.get(f"{narrow.url}/health").status_code == 200
    assert len(list(narrow.openai.models.list())) == 5


def test_a_large_body_is_refused(narrow: Server) -> None:
    large = {"prompt": "a" * 20_000}
    assert narrow.http.post("/v1/completions", json=large).status_code == 413
    parts = (b" " * 1000 for _ in range(20))
    assert narrow.http.post("/v1/completions", content=parts).status_code == 413


def test_a_client_that_leaves_frees_its_place(narrow: Server) -> None:
    stream = complete(narrow, "Hello", max_tokens=8000, stream=True)
    next(iter(stream))
    assert narrow.metric("anybits_kv_used_ratio") > 0
    stream.close()
    narrow.wait_until_idle(1)
    with pytest.raises(httpx.ReadTimeout):
        narrow.http.post(
            "/v1/completions", json={"prompt": "Hello", "max_tokens": 8000, "ignore_eos": True}, timeout=0.3
        )
    narrow.wait_until_idle(1)


def test_a_full_queue_answers_429_and_recovers(narrow: Server) -> None:
    first, second = (complete(narrow, "Hello", max_tokens=8000, stream=True) for _ in range(2))
    with pytest.raises(openai.RateLimitError) as refused:
        complete(narrow, "Hello", max_tokens=2)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    first.close()
    second.close()
    narrow.wait_until_idle(1)
    assert complete(narrow, "Hello", max_tokens=2).usage.completion_tokens == 2


def test_auto_without_hope_of_its_target_takes_the_lowest(narrow: Server) -> None:
    time.sleep(1.5 * HOLD_S)  # after silence it begins at the highest again
    answer = complete(narrow, "Hello", max_tokens=30)
    assert answer.precision == 2
    assert answer.usage.completion_tokens_by_precision["4"] >= 1
    assert narrow.metric("anybits_auto_changes_total") >= 2
    relaxed = complete(narrow, "Hello", max_tokens=5, extra_body={"precision": "auto", "target_tpot_ms": 100_000})
    assert relaxed.precision == 4


def test_a_request_that_takes_too_long_gets_504(narrow: Server) -> None:
    waiting = complete(narrow, "Hello", max_tokens=8000, stream=True)
    blocked = narrow.http.post(
        "/v1/completions", json={"prompt": "Hello", "max_tokens": 8000, "ignore_eos": True}, timeout=30
    )
    waiting.close()
    assert blocked.status_code == 504
    assert blocked.json()["error"]["type"] == "timeout_error"
    narrow.wait_until_idle(1)


def test_sigterm_finishes_what_has_begun(narrow: Server) -> None:
    stream = iter(complete(narrow, "Hello", max_tokens=50, stream=True))
    chunks = [next(stream)]
    reader = threading.Thread(target=lambda: chunks.extend(stream))
    narrow.process.send_signal(signal.SIGTERM)
    reader.start()
    reader.join(30)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) == 50
    assert narrow.process.wait(20) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{narrow.url}/health")


def test_a_killed_server_serves_again_on_the_same_port(folder: Path, tmp_path: Path) -> None:
    before = sorted((p.name, p.read_bytes()) for p in folder.iterdir())
    first = Server(folder, tmp_path / "first")
    wanted = complete(first, "Hello", max_tokens=8).choices[0].text
    stream = complete(first, "Hello", max_tokens=8000, stream=True)
    next(iter(stream))
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(10)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)
    assert sorted((p.name, p.read_bytes()) for p in folder.iterdir()) == before
    second = Server(folder, tmp_path / "second", port=first.url.rsplit(":", 1)[1])
    try:
        assert complete(second, "Hello", max_tokens=8).choices[0].text == wanted
    finally:
        second.stop()


def test_a_wrong_option_is_one_sentence(folder: Path) -> None:
    for options, says in [
        (["--precision", "7"], "precision 7 is not stored: choose one of 2, 2.5, 3, 4 or auto"),
        (["--draft-precision", "4"], "draft precision 4 is not lower than the precision 4: give a lower one"),
        (["--max-model-len", "9000"], "max-model-len 9000 is more than the 8192 positions"),
    ]:
        command = [sys.executable, "-c", MAIN, "serve", str(folder), "--port", "0", *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 1
        assert ended.stderr.strip().splitlines()[-1].startswith(f"error: {says}")
        assert "Traceback" not in ended.stderr


def test_json_of_a_stream_is_one_object_a_line(server: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 3, "stream": True, "temperature": 0}
    lines = [line for line in server.http.post("/v1/completions", json=body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["object"] for line in lines[:-1]] == ["text_completion"] * 3
