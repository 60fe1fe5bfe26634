"""What needs processes of its own: fused experts, two ranks, torch.compile, the HTTP server with the openai client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

import httpx
import openai

from vllm_plugin.conftest import TOKENS, engine_arguments, mixed

PATIENCE = 900
"""Seconds that a process may take to start and answer: half a minute alone, many times that on a busy machine."""

SCRIPT = Path(__file__).with_name("generate.py")


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command that writes to `log`; whatever is left of it and its children ends with the body."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def generated(folder: Path, asked: list, tmp_path: Path, environment: dict[str, str] | None = None, **options) -> list:
    """Run generate.py in a process of its own; return the tokens of each request."""
    job = {"arguments": engine_arguments(folder, **options), "asked": asked, "tokens": TOKENS}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "job.json"), str(tmp_path / "out.json")]
    with running(command, environment or {}, tmp_path / "log") as process:
        assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-8000:]
    return json.loads((tmp_path / "out.json").read_text())


def test_fused_experts(moe, expected, tmp_path):
    """Not in the tests' own process: vLLM makes its groups of processes once, for dense models or for experts."""
    asked = mixed(8, seed=4)
    got = generated(moe, asked, tmp_path, distributed_executor_backend="uni")
    assert got == [expected(moe, *one) for one in asked]
    assert (tmp_path / "log").read_text().count("fused experts run one after another") == 1


TWO_RANKS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def test_two_ranks(llama, expected, tmp_path):
    asked = mixed(8, seed=11)
    assert generated(llama, asked, tmp_path, TWO_RANKS, tensor_parallel_size=2) == [expected(llama, *a) for a in asked]


def test_two_ranks_with_experts_of_their_own(moe, expected, tmp_path):
    asked = mixed(8, seed=12)
    options = dict(tensor_parallel_size=2, enable_expert_parallel=True)
    assert generated(moe, asked, tmp_path, TWO_RANKS, **options) == [expected(moe, *a) for a in asked]


def test_torch_compile(llama, expected, tmp_path):
    asked = mixed(8, seed=13)
    fresh = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **fresh}
    got = generated(llama, asked, tmp_path, environment, enforce_eager=False, distributed_executor_backend="uni")
    assert got == [expected(llama, *a) for a in asked]


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    """The API server, as docs/vllm.md starts it; gives its address."""
    log = tmp_path_factory.mktemp("log") / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llama)]
    command += f"--served-model-name tiny --dtype float32 --enforce-eager --port {port}".split()
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    with running(command, environment, log) as process:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not healthy(address):
            assert process.poll() is None, log.read_text()[-8000:]
            assert time.monotonic() < until, log.read_text()[-8000:]
            time.sleep(0.5)
        yield address
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)


def healthy(address: str) -> bool:
    """Whether the server answers that it is well."""
    try:
        return httpx.get(f"{address}/health", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def complete(client: openai.OpenAI, prompt: list[int], precision) -> list[int]:
    body = {"vllm_xargs": {"precision": precision}, "ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=body)
    return answer.choices[0].token_ids


def test_48_requests_at_once(client, llama, expected, margin):
    asked = [one for one in mixed(56, seed=14) if margin(llama, *one) > 1e-3][:48]
    assert len(asked) == 48
    with ThreadPoolExecutor(48) as pool:
        got = list(pool.map(lambda one: complete(client, *one), asked))
    assert got == [expected(llama, *one) for one in asked]


@pytest.mark.parametrize("precision", [1, 6, "three", 2.7])
def test_a_wrong_precision_is_a_400_and_the_engine_lives(client, server, llama, expected, precision):
    with pytest.raises(openai.BadRequestError, match="choose one of 2, 2.5, 3, 4, 5") as refused:
        complete(client, [5, 6], precision)
    assert refused.value.status_code == 400
    assert complete(client, [5, 6], 2) == expected(llama, [5, 6], 2)
    assert healthy(server)
