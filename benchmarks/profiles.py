"""Perplexity against effective bits: profiles and whole-model precisions of quantized models, as JSON lines.

python benchmarks/profiles.py demo-out/anybcq demo-out/any-precision --calibration C.txt --text HELD_OUT.txt --name demo

Repeated after an interruption, it goes on where it stopped: profiles, sensitivities and lines that exist are kept.
`scripts/make_plots.py` draws what it found.
Exit code 1 when a profile exceeds its bytes or does not lie below the straight line between its neighbours.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from anybits import __version__
from anybits.checkpoint import read_stored_config
from anybits.config import Single, StoredConfig
from anybits.evaluate import profiling
from anybits.evaluate.evaluation import evaluate, read_text
from anybits.quantize.allocation import neighbours
from anybits.quantize.profile_search import Search

ROOT = Path(__file__).resolve().parent.parent


def run_facts() -> dict[str, Any]:
    """Return what a line says of its run."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT)
    return {
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "anybits": __version__,
        "torch": torch.__version__,
    }


def key(line: dict[str, Any]) -> tuple[str, ...]:
    """Return what makes a measurement the same one: the model, the precision, and what it gives each matrix."""
    return (line["model"], str(line["precision"]), line["allocation"])


def allocation(stored: StoredConfig, p: Single) -> str:
    """Return a few digits that stand for a profile's map."""
    plain = json.dumps(p if isinstance(p, int) else dict(stored.profiles[p]), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:8]


def measure(folder: Path, text: str, max_tokens: int | None, out: Path) -> list[dict[str, Any]]:
    """Evaluate every precision and profile of one model that has no line in `out` yet; return all its lines."""
    stored, known = read_stored_config(folder), {}
    if out.exists():
        known = {key(line): line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    lines = []
    for p in stored.singles:
        line = {"table": "profiles", "model": folder.name, "precision": p, "allocation": allocation(stored, p)}
        if key(line) in known:
            lines.append(known[key(line)])
            continue
        evaluation = evaluate(str(folder), (p,), text, max_tokens=max_tokens)
        result = evaluation.results[0]
        line |= {
            "weight_bytes": result.weight_bytes,
            "bits_per_weight": result.bits_per_weight,
            "perplexity": result.perplexity,
        }
        line |= {"text_tokens": evaluation.text_tokens} | run_facts()
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{folder.name} {p}: {result.perplexity:.4f}", flush=True)
        lines.append(line)
    return lines


def judge(folder: Path, lines: list[dict[str, Any]]) -> bool:
    """Add to each profile's line its budget and the straight line at its bits; return whether all are within both."""
    stored = read_stored_config(folder)
    whole = {line["precision"]: line for line in lines if isinstance(line["precision"], int)}
    good = True
    for line in lines:
        about = stored.recipe.get("profiles", {}).get(str(line["precision"]))
        if about is None:
            continue
        low, high, share = neighbours(about["bits"], stored.precisions)
        straight = (1 - share) * whole[low]["perplexity"] + share * whole[high]["perplexity"]
        line |= {"budget_bytes": about["found"]["budget_bytes"], "straight_line": straight}
        line["below"] = 100 * (1 - line["perplexity"] / straight)
        good &= line["weight_bytes"] <= line["budget_bytes"] and line["perplexity"] < straight
        print(f"{folder.name} {line['precision']}: {line['perplexity']:.4f}, {line['below']:.2f} % below the line")
    return good


def main() -> None:
    """Find profiles, measure, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--calibration", required=True, help="text that profiles are found on")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--name", required=True, help="end of the name of the results file")
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--generations", type=int, default=12)
    chosen = parser.parse_args()
    settings = profiling.Settings(chosen.samples, chosen.seq_len, search=Search(generations=chosen.generations))
    out = ROOT / "benchmarks" / "results" / f"profiles-{chosen.name}.jsonl"
    text, everything, good = read_text(chosen.text), [], True
    for folder in chosen.models:
        shown = profiling.Progress(found=lambda found: print(found, flush=True))
        profiling.profile_model(folder, chosen.calibration, None, settings, progress=shown)
        lines = measure(folder, text, chosen.max_tokens, out)
        good &= judge(folder, lines)
        everything += lines
    out.write_text("".join(json.dumps(line) + "\n" for line in everything), encoding="utf-8")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
