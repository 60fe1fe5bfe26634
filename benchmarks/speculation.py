"""Self-speculation: how often drafts are accepted on trained models, and what it gains where decoding is memory-bound.

python benchmarks/speculation.py acceptance MODEL... --text FILE --out benchmarks/results/speculation.jsonl
python benchmarks/speculation.py speed --out benchmarks/results/speculation.jsonl      # quiet machine, a few minutes
python benchmarks/speculation.py table --out benchmarks/results/speculation.jsonl

Random weights have no acceptance worth the name and trained models of this size no memory traffic, so the two are
measured apart: `acceptance` compares distributions over held-out text for all pairs of precisions; `speed` times
real passes of a random model with at least a billion weights, and then real generations of it in which the outcome
of each draft is drawn with an acceptance measured before.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from anybits.decode.choice import Choice
from anybits.decode.draft_length import MAX_DRAFT, AdaptiveLength, expected_tokens
from anybits.decode.speculation import speculate
from anybits.decode.statistics import Statistics
from anybits.evaluate.end_to_end import put_random_planes
from anybits.evaluate.perplexity import split_windows
from anybits.integrations import random_model
from anybits.integrations import transformers as hf
from anybits.integrations.generation import ModelStepper
from anybits.integrations.row_invariance import row_invariant
from anybits.precision import precision

PAIRS = [(target, draft) for target in (3, 4, 8) for draft in (2, 3) if draft < target]
CONTEXT = 64


@torch.no_grad()
def acceptance(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield for each model and pair: share of equal best tokens, and mean sum of min(p, q)."""
    for folder in arguments.models:
        model = hf.load_model(folder, dtype=torch.float32)
        ids = hf.encoder(hf.load_tokenizer(folder))(Path(arguments.text).read_text("utf-8"))
        sums: dict[tuple[int, int], list[float]] = {pair: [0.0, 0.0, 0.0] for pair in PAIRS}
        for window in split_windows(ids, 512, arguments.max_tokens):
            found = {}
            for p in sorted({p for pair in PAIRS for p in pair}):
                with precision(p):
                    found[p] = model(input_ids=window, use_cache=False).logits[0].softmax(-1)
            for (target, draft), sums_of in sums.items():
                p, q = found[target], found[draft]
                sums_of[0] += len(p)
                sums_of[1] += float((p.argmax(-1) == q.argmax(-1)).sum())
                sums_of[2] += float(torch.minimum(p, q).sum())
        for (target, draft), (count, equal, shared) in sums.items():
            yield {
                "table": "acceptance",
                "model": Path(folder).resolve().name,
                "method": hf.stored_config(folder).method,
                "target": target,
                "draft": draft,
                "tokens": int(count),
                "greedy": round(equal / count, 4),
                "sampled": round(shared / count, 4),
            }


def make_model(method: str, layers: int, distinct: int) -> tuple[Any, int]:
    """Return a bf16 Llama of random planes and the number of its quantized weights.

    Layers beyond `distinct` run the planes of an earlier one again; with enough distinct bytes none of them waits in
    a cache until its turn comes.
    """
    sizes = {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    model = random_model.llama(sizes, distinct)
    weights = put_random_planes(model, method, (2, 3, 4, 8))
    random_model.fill(model)
    model.tie_weights()
    # One token far above the others: random logits are all near ties, which a verifying pass computes again row by row.
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(sizes["vocab_size"], dtype=torch.bfloat16), requires_grad=False)
    model.lm_head.bias[0] = 64
    random_model.repeat_layers(model, layers)
    return model, weights * layers // distinct


class Injected(ModelStepper):
    """Real passes whose logits say what a trained model's would: drafts fall with a given chance."""

    def __init__(self, model: Any, agreement: float, target: int, seed: int) -> None:
        super().__init__(model, transformers.DynamicCache(config=model.config))
        self.agreement, self.target, self.random = agreement, target, random.Random(seed)
        self.agrees: dict[int, bool] = {}

    def forward(self, tokens: list[int], precision: Any) -> torch.Tensor:
        start = self.cache.get_seq_length()
        logits = super().forward(tokens, precision)
        for row in range(len(tokens)):
            agrees = self.agrees.setdefault(start + row, self.random.random() < self.agreement)
            token = (start + row) % 100 + (0 if precision == self.target or agrees else 1)
            logits[row, token] = logits[row].max() + 4
        return logits


def pass_seconds(model: Any, clock: Any, rounds: int) -> dict[tuple[int, int], float]:
    """Return (precision, rows) -> median seconds of a pass after CONTEXT positions, all measured in turn."""
    stepper = ModelStepper(model, transformers.DynamicCache(config=model.config))
    stepper.prefill(torch.randint(0, 100, (1, CONTEXT)), 2)
    cases = [(p, 1) for p in (2, 3, 4, 8)] + [(p, m) for p in (3, 4, 8) for m in range(2, MAX_DRAFT + 2)]
    times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 1):
        for p, m in cases:
            start = clock()
            stepper.forward([5] * m, p)
            if turn:
                times[p, m].append(clock() - start)
            stepper.drop(m)
    return {case: statistics.median(seen) for case, seen in times.items()}


@dataclass(frozen=True)
class Generation:
    """What drafts did: speed over plain decoding; lost: share of the time that rounds added, less than 0 for a gain."""

    found: Statistics
    speed_up: float
    lost: float


def generate(model: Any, clock: Any, target: int, draft: int, agreement: float, tokens: int, seed: int) -> Generation:
    """Generate with adaptive drafts, and beside it, after every step, as many tokens plainly.

    A machine that gets slower does so for both. The plain steps between rounds are the same passes on both sides.
    """
    plain, fast = (Injected(model, agreement, target, seed) for _ in range(2))
    for stepper in (plain, fast):
        stepper.prefill(torch.randint(0, 100, (1, CONTEXT)), target)
    done, found, choice = [0] * (CONTEXT + 1), Statistics(), Choice()
    plain_s = rounds_s = 0.0
    before = (0, 0.0)
    for new in speculate(fast, choice, done, target, draft, AdaptiveLength(), CONTEXT + tokens, found, clock):
        start = clock()
        for token in new:
            choice.choose(done, plain.forward([token], target)[0])
        beside = clock() - start
        plain_s += beside
        now = (found.rounds, found.draft_s + found.verify_s)
        if now[0] > before[0]:
            rounds_s += now[1] - before[1] - beside
        before = now
    return Generation(found, plain_s / found.seconds, 1 - plain_s / (plain_s + rounds_s))


@torch.no_grad()
def speed(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the times of single passes, then for each pair what drafts gain: predicted, and generated."""
    clock = time.thread_time if arguments.cpu_seconds else time.perf_counter
    measured = {(r["method"], r["target"], r["draft"]): r["greedy"] for r in read(arguments.out, "acceptance")}
    for method in arguments.methods:
        model, weights = make_model(method, arguments.layers, arguments.distinct or arguments.layers)
        about = {"method": method, "weights": weights, "clock": "cpu" if arguments.cpu_seconds else "wall"}
        with row_invariant(model, True, False):
            seconds = pass_seconds(model, clock, arguments.rounds)
            for (p, m), value in seconds.items():
                yield {"table": "passes", "precision": p, "rows": m, "ms": round(value * 1e3, 2)} | about
            for target, draft in arguments.pairs:
                agreement = measured.get((method, target, draft))
                if agreement is None:
                    continue
                d, plain = seconds[draft, 1], seconds[target, 1]
                gains = {
                    k: expected_tokens(agreement, k) * plain / (k * d + seconds[target, k + 1])
                    for k in range(1, MAX_DRAFT + 1)
                }
                best = max(gains, key=lambda k: gains[k])
                settings = target, draft, agreement, arguments.tokens
                ran = [generate(model, clock, *settings, seed) for seed in range(arguments.runs)]
                row = {"table": "gain", "target": target, "draft": draft, "acceptance": agreement}
                row |= {"best_drafts": best, "predicted": round(gains[best], 3)}
                row |= {"predicted_over_4_bits": round(gains[best] * seconds[4, 1] / plain, 3)}
                if ran:
                    drafted, rounds = (sum(getattr(r.found, name) for r in ran) for name in ("drafted", "rounds"))
                    row |= {
                        "generated": round(statistics.median(r.speed_up for r in ran), 3),
                        "tokens": arguments.tokens,
                    }
                    row |= {"mean_drafts": round(drafted / max(1, rounds), 2), "rounds": rounds, "runs": len(ran)}
                    row |= {"most_lost": round(max(r.lost for r in ran), 4)}
                yield row | about


def pair(text: str) -> tuple[int, int]:
    """Read target,draft."""
    target, draft = text.split(",")
    return int(target), int(draft)


def read(path: Path, table: str) -> list[dict[str, Any]]:
    """Return the rows of one table in a file of JSON lines, none where there is no file."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["table"] == table]


def table(path: Path) -> None:
    """Print what a file holds as Markdown."""
    for name in ("acceptance", "passes", "gain"):
        rows = read(path, name)
        if rows:
            columns = [key for key in rows[0] if key not in ("table", "commit", "date", "machine", "threads")]
            print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
            for row in rows:
                print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")


def main() -> None:
    """Read the arguments and measure, or print what was measured."""
    from common import about_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["acceptance", "speed", "table"])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--text", help="held-out text (acceptance)")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--methods", nargs="*", default=["anybcq", "any-precision"])
    parser.add_argument("--layers", type=int, default=18, help="18 hold 1.09 billion weights")
    parser.add_argument("--distinct", type=int, help="layers with planes of their own; default: all")
    parser.add_argument("--rounds", type=int, default=9, help="times that every pass is measured in turn")
    parser.add_argument("--runs", type=int, default=3, help="generations of each pair")
    parser.add_argument("--pairs", type=pair, nargs="*", default=PAIRS, help="target,draft ... of the speeds")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a generation")
    parser.add_argument("--cpu-seconds", action="store_true", help="processor time of one thread: for a busy machine")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.what == "table":
        table(arguments.out)
        return
    if arguments.cpu_seconds:
        torch.set_num_threads(1)
    for row in (acceptance if arguments.what == "acceptance" else speed)(arguments):
        line = json.dumps(row | about_run())
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
