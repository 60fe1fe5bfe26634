"""Precision schedules against one precision throughout, at equal mean bits, on held-out text with a real KV cache.

python benchmarks/schedules.py MODEL... --text FILE --out benchmarks/results/schedules.jsonl
python benchmarks/schedules.py --table --out benchmarks/results/schedules.jsonl

Every window is decoded token by token, as generation would: each token's pass runs at the precision that the
schedule says, given the distribution that the model itself, at its mixed precisions, has just had for that token,
and leaves its keys and values in the cache. A batch runs many windows at once, each row at its own precision.
A schedule's rival is what the same mean bits buy without it: tokens drawn at random to run at the same precisions
in the same shares (`random`), and the straight line between the two static precisions around it (`line`).
Each seed has windows of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from anybits.decode.schedule import ByEntropy, Step, parse_schedule
from anybits.integrations import transformers as hf
from anybits.precision import precision

Rule = Callable[[int, torch.Tensor | None, int], list[int]]
"""(position, logits [B, V] of the last pass or None, batch) -> a precision for each row."""

SCHEDULES = (
    "entropy:2,3@1", "entropy:2,3@2", "entropy:2,3@3", "entropy:2,4@1", "entropy:2,4@2", "entropy:2,4@3",
    "entropy:3,4@2", "length:4,3@64,2@128", "length:4,2@128", "length:3,2@128",
)  # fmt: skip


def by_schedule(text: str) -> Rule:
    """Return the rule of a schedule; the first token counts as the whole prompt."""
    schedule = parse_schedule(text)

    def rule(position: int, logits: torch.Tensor | None, batch: int) -> list[int]:
        if logits is None:
            return [schedule.prefill()] * batch
        return [schedule.decode(Step(position, 1, row)) for row in logits]

    return rule


def calm_first(text: str) -> Rule:
    """Return an entropy rule turned upside down: the higher precision where the model is sure."""
    schedule = parse_schedule(text)
    assert isinstance(schedule, ByEntropy)
    (threshold, high), low = schedule.above[0], schedule.calm

    def rule(position: int, logits: torch.Tensor | None, batch: int) -> list[int]:
        if logits is None:
            return [high] * batch
        return [low if Step(position, 1, row).entropy > threshold else high for row in logits]

    return rule


def by_chance(shares: dict[int, float], seed: int) -> Rule:
    """Return the rule that draws each row's precision with the given shares."""
    generator = torch.Generator().manual_seed(seed)
    levels, weights = list(shares), torch.tensor(list(shares.values()))

    def rule(position: int, logits: torch.Tensor | None, batch: int) -> list[int]:
        drawn = torch.multinomial(weights, batch, replacement=True, generator=generator)
        return [levels[i] for i in drawn.tolist()]

    return rule


@torch.no_grad()
def run(model: Any, windows: torch.Tensor, rule: Rule) -> tuple[float, dict[int, int]]:
    """Return ln perplexity over windows `[B, T]` decoded under `rule`, and how many rows ran at each precision."""
    cache, logits, nll = transformers.DynamicCache(config=model.config), None, 0.0
    used: dict[int, int] = {}
    for position in range(windows.shape[1] - 1):
        rows = rule(position, logits, len(windows))
        for p in rows:
            used[p] = used.get(p, 0) + 1
        with precision(torch.tensor(rows, dtype=torch.int32)):
            out = model(input_ids=windows[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1].float()
        nll -= float(logits.log_softmax(-1).gather(1, windows[:, position + 1, None]).sum())
    return nll / (windows.shape[0] * (windows.shape[1] - 1)), used


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, seed and rule."""
    for folder in arguments.models:
        model = hf.load_model(folder, dtype=torch.float32)
        ids = torch.tensor(hf.encoder(hf.load_tokenizer(folder))(Path(arguments.text).read_text("utf-8")))
        size = arguments.windows * arguments.seq_len
        for seed in range(arguments.seeds):
            windows = ids[seed * size : (seed + 1) * size].view(arguments.windows, arguments.seq_len)
            about = {"table": "schedules", "model": Path(folder).resolve().name, "seed": seed}
            about |= {"tokens": arguments.windows * (arguments.seq_len - 1)}
            static = {p: run(model, windows, by_chance({p: 1.0}, 0))[0] for p in (2, 3, 4)}
            for p, loss in static.items():
                yield {"rule": f"static {p}", "bits": float(p), "ln_ppl": round(loss, 5)} | about
            for name in arguments.schedules:
                rules = {name: by_schedule(name)}
                if name.startswith("entropy"):
                    rules[f"{name}, upside down"] = calm_first(name)
                for label, rule in rules.items():
                    loss, used = run(model, windows, rule)
                    count = sum(used.values())
                    shares = {p: n / count for p, n in sorted(used.items())}
                    bits = sum(p * share for p, share in shares.items())
                    chance, _ = run(model, windows, by_chance(shares, seed))
                    low = min(math.floor(bits), 3)
                    line = static[low] + (static[low + 1] - static[low]) * (bits - low)
                    row = {"rule": label, "bits": round(bits, 4), "ln_ppl": round(loss, 5)}
                    yield row | {"random": round(chance, 5), "line": round(line, 5)} | about


def table(path: Path) -> None:
    """Print gains over the rivals at equal mean bits, the median and range over the seeds."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    print("| model | rule | mean bits | ln ppl | below random mix | below the static line |\n|---|---|---|---|---|---|")
    for model, rule in dict.fromkeys((row["model"], row["rule"]) for row in rows):
        own = [row for row in rows if (row["model"], row["rule"]) == (model, rule)]
        cells = [
            f"{statistics.median(r['bits'] for r in own):.2f}",
            f"{statistics.median(r['ln_ppl'] for r in own):.4f}",
        ]
        for rival in ("random", "line"):
            gains = [row[rival] - row["ln_ppl"] for row in own if rival in row]
            cells.append(f"{statistics.median(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})" if gains else "")
        print(f"| {model} | {rule} | " + " | ".join(cells) + " |")


def main() -> None:
    """Read the arguments and measure, or print the table of what was measured."""
    from common import about_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--text")
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--table", action="store_true", help="print the table of --out and measure nothing")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.table:
        table(arguments.out)
        return
    for row in measure(arguments):
        line = json.dumps(row | about_run())
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
