"""A run of benchmarks/gpu_stages.py: its lines, its time, and what becomes of a measurement that fails."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import gpu
import gpu_report
import torch
from common import about_run

from anybits.evaluate import kernels_cuda as timing

KEY = ("stage", "name", "model", "context", "shape", "method", "m", "precision", "tuning")
"""What tells one measurement from another."""


class Run:
    """The output file, what it holds, and the time that is left."""

    def __init__(self, out: Path, minutes: float, commit: str = "") -> None:
        self.out, self.end = out, time.monotonic() + 60 * minutes
        self.lines = gpu_report.read(out) if out.exists() else []
        if out.exists() and not out.read_text().endswith("\n"):  # half a line of a run that was stopped
            out.write_text(out.read_text() + "\n")
        run = about_run()
        self.facts = timing.environment() | {key: run[key] for key in ("date", "anybits", "threads")}
        self.facts["commit"] = commit or self.facts["commit"]
        self.bandwidth = timing.copy_bandwidth()
        self._doing = gpu.doing_file(out)

    def have(self, **key: object) -> dict | None:
        """Return the line of `key`, if it was measured before, or that of what failed and was to have it."""
        wanted = json.loads(json.dumps(key))

        def this(line: dict) -> bool:
            if "failed" in line:
                return all(wanted.get(k) == line[k] for k in KEY if k in line)
            return all(line.get(k) == v for k, v in wanted.items())

        return next((line for line in self.lines if this(line)), None)

    def late(self) -> bool:
        return time.monotonic() > self.end

    def add(self, **line: object) -> None:
        line |= {"copy_gb_per_s": round(self.bandwidth / 1e9), **self.facts}
        self.lines.append(json.loads(json.dumps(line)))
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def doing(self, **key: object) -> Iterator[None]:
        """Say what is measured in the body. What goes wrong becomes a line, and the run goes on behind it.

        Ends this process where the GPU cannot be used any more, as after an illegal address.
        """
        outer = self._doing.read_text() if self._doing.exists() else None
        self._doing.write_text(json.dumps(key))
        try:
            yield
        except Exception as error:
            why = (str(error).strip().splitlines() or [""])[0][:300]
            print("FAILED", key, why, flush=True)
            traceback.print_exc()
            self.add(**key, failed=f"{type(error).__name__}: {why}")
            if not _usable():
                self._doing.unlink()
                sys.stdout.flush()
                os._exit(gpu.AGAIN)  # ordinary ends wait for the GPU
        if outer is None:
            self._doing.unlink(missing_ok=True)
        else:
            self._doing.write_text(outer)


def _usable() -> bool:
    """Return whether the GPU still answers."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").sum() == 1)
    except Exception:
        return False


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of the environment for the body."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
