"""What the tests of the server share: a model folder, `anybits serve` as a process, and requests to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

import anybits
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


def served_folder(made: Path) -> Path:
    """Quantize a tiny Llama of LENGTH positions into a folder of `made`."""
    model = tiny_model("llama")
    model.config.max_position_embeddings = LENGTH
    model.generation_config.eos_token_id = None
    model.save_pretrained(made / "float")
    tiny_tokenizer().save_pretrained(made / "float")
    anybits.quantize(str(made / "float"), made / "tiny", anybits.Recipe(preset="fast", group_size=32))
    with_profiles(made / "tiny", ("2.5",))
    return made / "tiny"


def complete(server: Server, prompt: str, **settings: Any) -> Any:
    """Ask for exactly max_tokens: a random model ends its texts anywhere."""
    more = {"ignore_eos": True} | settings.pop("extra_body", {})
    return server.openai.completions.create(
        model="tiny", prompt=prompt, extra_body=more, **{"temperature": 0, **settings}
    )
