"""The server in trouble: keys, limits, clients that leave, full queues, signals, kills and wrong options."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from anybits.serve.policy import HOLD_S
from serving import KEY, MAIN, Server, complete, served_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def narrow(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One place, one in the queue, a key, a small body, a short patience."""
    options = "--max-batch 1 --max-queue 1 --max-body-mb 0.01 --timeout 4 --target-tpot-ms 0.001 --precision auto"
    started = Server(folder, tmp_path_factory.mktemp("log") / "b", "--api-key", KEY, *options.split())
    yield started
    started.stop()


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


def test_what_a_stopping_server_cannot_finish_gets_503(folder: Path, tmp_path: Path) -> None:
    server = Server(folder, tmp_path / "b", "--drain", "1")
    body = {"prompt": "Hello", "max_tokens": 8000, "ignore_eos": True}
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=30))
    )
    asking.start()
    while httpx.get(f"{server.url}/health").json()["inside"] == 0:
        time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    asking.join(30)
    assert answers[0].status_code == 503
    assert "the server is stopping" in answers[0].json()["error"]["message"]
    assert server.process.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


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
    second = Server(folder, tmp_path / "second", "--no-prefix-reuse", port=first.url.rsplit(":", 1)[1])
    try:
        for _ in range(2):
            again = complete(second, "Hello there, whoever you are", max_tokens=1)
            assert again.usage.prompt_tokens_details.cached_tokens == 0  # --no-prefix-reuse
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
