"""What it costs to change the precision at every token of a live generation.

python benchmarks/switching.py MODEL --out benchmarks/results/switching.jsonl

Decodes the same tokens over one cache in three ways, step by step in turn: at precision a, at precision b, and
changing between a and b at every token. Changing reloads and recompiles nothing, so a changing step should take the
mean of the two. Prints the ratio of the changing steps' time to that mean, paired over steps and rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from anybits.integrations import transformers as hf
from anybits.integrations.generation import ModelStepper


@torch.no_grad()
def ratios(model: Any, pair: tuple[int, int], steps: int, rounds: int, clock: Any) -> list[float]:
    """Return one ratio for each round: seconds of the changing cache over the mean of the constant ones."""
    found = []
    for turn in range(rounds + 1):
        steppers = [ModelStepper(model, transformers.DynamicCache(config=model.config)) for _ in range(3)]
        for stepper in steppers:
            stepper.prefill(torch.randint(0, 100, (1, 32)), pair[0])
        seconds: list[list[float]] = [[], [], []]
        for step in range(steps):
            wanted = (pair[0], pair[1], pair[step % 2])
            for index in ((0, 1, 2), (2, 0, 1), (1, 2, 0))[step % 3]:
                start = clock()
                steppers[index].forward([5 + step % 90], wanted[index])
                seconds[index].append(clock() - start)
        # Every changing step stands against the constant one at its precision in the same moment.
        constant = [seconds[step % 2][step] for step in range(steps)]
        if turn:
            found.append(statistics.median(a / b for a, b in zip(seconds[2], constant, strict=True)))
    return found


def main() -> None:
    """Measure and print one line for each pair."""
    from common import about_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", nargs="*", default=["2,4", "2,8", "3,4"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-seconds", action="store_true", help="processor time of one thread: for a busy machine")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.cpu_seconds:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.cpu_seconds else time.perf_counter
    model = hf.load_model(arguments.model, dtype=torch.float32)
    for text in arguments.pairs:
        low, high = (int(p) for p in text.split(","))
        found = ratios(model, (low, high), arguments.steps, arguments.rounds, clock)
        row = {
            "table": "switching", "model": Path(arguments.model).resolve().name, "pair": [low, high],
            "ratio": round(statistics.median(found), 4), "least": round(min(found), 4), "most": round(max(found), 4),
            "steps": arguments.steps, "rounds": arguments.rounds,
            "clock": "cpu" if arguments.cpu_seconds else "wall",
        }  # fmt: skip
        line = json.dumps(row | about_run())
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
