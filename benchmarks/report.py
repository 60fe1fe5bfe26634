"""Turn a report's figures.json into benchmarks/results/NAME.jsonl, a line for each row, with commit and machine.

python benchmarks/report.py report/figures.json --name demo
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def rows(figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every row of every table, named by its table."""
    for label, model in figures["quality"].items():
        for result in model["results"]:
            yield {"table": "quality", "model": label} | result
        if model["reference"]:
            yield {"table": "quality", "model": "float model", "precision": 16} | model["reference"]
    for label, memory in figures["memory"].items():
        plain = {key: value for key, value in memory.items() if isinstance(value, int | float)}
        precisions = f"{memory['precisions'][0]}-{memory['precisions'][-1]}"
        yield {"table": "memory", "model": label, "precisions": precisions} | plain
    for entry in figures["published_memory"]:
        ours = {f"anybits_{key}": value for key, value in entry["anybits"].items()}
        precisions = f"{entry['precisions'][0]}-{entry['precisions'][-1]}"
        yield {"table": "memory of the papers' models"} | entry | {"precisions": precisions, "anybits": None} | ours
    for label, speeds in figures["speed"]["models"].items():
        for speed in speeds:
            yield {"table": "decoding speed", "model": label} | speed
    for table in ("upscaling", "sizes", "layout"):
        for row in figures.get(table, []):
            yield {"table": table} | {key: value for key, value in row.items() if key != "shape"}


def main() -> None:
    """Write one file of lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--name", required=True, help="the file's stem")
    arguments = parser.parse_args()
    figures = json.loads(arguments.figures.read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    about = {key: figures["about"][key] for key in ("machine", "threads", "anybits", "torch")}
    run = {"commit": commit.stdout.strip(), "date": datetime.date.today().isoformat()} | about
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = []
    seen: set[str] = set()
    for row in rows(figures):
        kept = {key: value for key, value in row.items() if value is not None or key in ("kl_divergence",)}
        line = json.dumps(kept | run)
        if line not in seen:  # the float model is the same for every quantized one
            lines.append(line)
        seen.add(line)
    (RESULTS / f"{arguments.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
