"""What every line of results says about its run."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import anybits


@cache
def about_run() -> dict[str, Any]:
    """Return commit, date, processor, threads and versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": names[0].split(": ")[1] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "anybits": anybits.__version__,
        "torch": torch.__version__,
    }
