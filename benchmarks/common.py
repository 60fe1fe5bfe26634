"""What several benchmarks need: what every line of results says about its run, and processes that answer lines."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import anybits


@cache
def about_run() -> dict[str, Any]:
    """Return commit, date, processor, threads and versions."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        commit = ""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "machine": names[0].split(": ")[1] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "anybits": anybits.__version__,
        "torch": torch.__version__,
    }


class LineProcess:
    """A process that answers each line with a line."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = " ".join(command)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> str:
        """Return the answer; end this program when the process has ended."""
        assert self._process.stdin
        assert self._process.stdout
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"this process ended: {self._command}")
        return answer

    def close(self) -> None:
        """Tell the process that nothing follows, and wait until it has ended."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
