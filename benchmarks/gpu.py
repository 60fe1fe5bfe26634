"""One command for a machine with an NVIDIA GPU: check, time, decode, sweep; a table, gpu.md and gpu.png come last.

    python benchmarks/gpu.py --out gpu.jsonl [--stages check time e2e rivals ...] [--minutes 9] [--commit NAME]

Every result is one JSON line in --out, written when it is known. A line that is there already is not measured again, so
a stopped run goes on where it was. The measurements (gpu_stages.py) run in a process of their own: what ends it (an
illegal address ends every later call of a process, a hanging kernel waits forever) is written down as failed, and a new
process goes on behind it. A later run tries again what failed. Needs torch for CUDA and cuda-bindings; anybits is
imported from src/ beside this folder.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_report

STAGES = ("check", "time", "e2e", "rivals", "mixed", "rows", "together", "rates", "tune")
"""What matters most comes first."""
WORKER = Path(__file__).with_name("gpu_stages.py")
MOST_RESTARTS = 20
LONGEST = 180.0
"""Seconds that one measurement may take; the longest, a whole model, should take about 40."""
LATE = "the time was over"
AGAIN = 75
"""Status of a worker that wrote down what failed and whose process has to be begun anew."""
_POLL = 0.2


def forget_failures(out: Path) -> None:
    """Drop the lines of what failed before, so that it is tried again; the file is replaced as a whole."""
    lines = [line for line in gpu_report.read(out) if "failed" not in line] if out.exists() else []
    part = out.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    part.replace(out)


def doing_file(out: Path) -> Path:
    """Return the file that holds the measurement that is being made; it is touched when one begins."""
    return out.with_suffix(".doing")


def write_down(out: Path, why: str) -> dict[str, Any] | None:
    """Add a line for the measurement that the worker left unfinished; return its key, None when there was none."""
    try:
        key: dict[str, Any] = json.loads(doing_file(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    doing_file(out).unlink()
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(key | {"failed": why}) + "\n")
    return key


def wait(worker: subprocess.Popen[bytes], out: Path, end: float, longest: float) -> str | None:
    """Wait for the worker; return why it ended before it was through, or None. It is ended at `end` (monotonic)."""
    try:
        while worker.poll() is None:
            time.sleep(_POLL)
            if time.monotonic() > end:
                return LATE
            if _seconds_since(doing_file(out)) > longest:
                return f"took more than {longest:.0f} s"
    finally:
        worker.kill()
        worker.wait()
    code = worker.returncode
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with status {code}" if code else None


def _seconds_since(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def supervise(command: Sequence[str], out: Path, minutes: float, longest: float = LONGEST) -> str | None:
    """Run `command` until it is through, again behind each measurement that ends it; return why not all was run."""
    end = time.monotonic() + 60 * (minutes + 0.5)  # what has begun has half a minute more
    for _ in range(MOST_RESTARTS):
        left = max(0.0, (end - time.monotonic()) / 60 - 0.5)
        worker = subprocess.Popen([*command, "--minutes", f"{left:.3f}"])
        why = wait(worker, out, end, longest)
        if why in (None, LATE):
            doing_file(out).unlink(missing_ok=True)
            return why
        if worker.returncode == AGAIN:
            continue
        key = write_down(out, why)
        if key is None:
            return f"no measurement was under way when the worker {why}"
        print(f"FAILED {key}: {why}; going on behind it", flush=True)
    return f"the worker ended {MOST_RESTARTS} times"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--minutes", type=float, default=9, help="no new measurement begins after this")
    parser.add_argument("--commit", default="", help="for the lines, where this folder is no git checkout")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    forget_failures(out)
    command = [sys.executable, str(WORKER), "--out", str(out), "--stages", *arguments.stages]
    why = supervise([*command, "--commit", arguments.commit], out, arguments.minutes)
    lines = gpu_report.read(out)
    print("\n" + gpu_report.text_table(lines), flush=True)
    if any("device" in line for line in lines):
        gpu_report.write(lines, out.parent)
    if why:
        sys.exit(f"not all stages were run: {why}")


if __name__ == "__main__":
    main()
