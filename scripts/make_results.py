"""Write docs/results.md from benchmarks/results/*.jsonl, or with --check fail when it is not current."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
# Facts about a run, the same on all of its lines; the other keys become columns.
RUN = ("commit", "machine", "threads", "anybits", "torch", "date")


def read_lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return file stem -> its lines; a line that lacks a fact about its run is an error."""
    files = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            missing = {"table", *RUN} - set(line)
            if missing:
                sys.exit(f"{path.name}, line {number}: lacks {', '.join(sorted(missing))}")
        files[path.stem] = lines
    return files


def cell(value: Any) -> str:
    """Return a value as the page shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str("" if value is None else value)


def page(files: dict[str, list[dict[str, Any]]]) -> str:
    """Return the whole page."""
    parts = ["# Results\n\nMade by `scripts/make_results.py` from `benchmarks/results/*.jsonl`; do not edit.\n"]
    for stem, lines in files.items():
        parts.append(f"## {stem}\n")
        tables: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for line in lines:
            tables[(line["table"], *(str(line[key]) for key in RUN))].append(line)
        for (title, commit, machine, threads, version, torch, date), rows in tables.items():
            columns = list(dict.fromkeys(key for row in rows for key in row if key not in (*RUN, "table")))
            about = f"commit {commit}, {date}, {machine}, {threads} threads, anybits {version}, torch {torch}"
            body = [[cell(row.get(column)) for column in columns] for row in rows]
            lines_ = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *body)]
            parts.append(f"### {title}\n\n{about}\n\n" + "\n".join(lines_) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is not current")
    text = page(read_lines(RESULTS))
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/results.md is not current: run python scripts/make_results.py")


if __name__ == "__main__":
    main()
