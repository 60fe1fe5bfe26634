"""One figure for each claim about a running `anybits serve`, from interleaved runs; one command each.

    python benchmarks/serve_claims.py streams     tokens/s of 8 streams over the same requests one after another
    python benchmarks/serve_claims.py mixed       tokens/s of mixed precisions over all at the highest of them
    python benchmarks/serve_claims.py overload    p99 latency of accepted requests at 10x capacity over that at capacity
    python benchmarks/serve_claims.py auto --quality eval.json
                                                  bursts with idle phases: quality and share of requests on time,
                                                  every static precision and auto

`auto` takes `anybits eval --reference FLOAT --json` of a trained model; quality is the mean, over generated tokens, of
the gap in ln perplexity to the float model at the precision that generated each. The served model may be another one,
of random weights (random_checkpoint.py): it gives the times. Unless --target-ms is given, the target is the geometric
mean of what a burst takes at the highest precision and at the one below.
Give --pid of the server for tokens per processor second as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from serve import Client, Result, closed, opened, percentile, processor_s


@dataclass
class Load:
    """What the functions of serve.py read of their options."""

    url: str
    api_key: str | None
    tokens: int
    requests: int = 0
    clients: int = 1
    rate: float = 0.0
    seconds: float = 0.0
    seed: int = 0
    extra: dict = field(default_factory=dict)


class Bench:
    """Runs loads over one set of prompts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rng = args, random.Random(args.seed)
        text = args.text.read_text(encoding="utf-8") if args.text else "abcdefgh " * 2000
        starts = [self.rng.randrange(max(1, len(text) - 600)) for _ in range(40)]
        self.prompts = [text[s : s + self.rng.randint(20, args.prompt_chars)] for s in starts]

    def load(self, **what: object) -> tuple[Client, Load]:
        """Return a client and its options."""
        load = Load(self.args.url, self.args.api_key, self.args.tokens, **what)  # type: ignore[arg-type]
        return Client(load), load

    def pick(self, precisions: list[int | str]):
        """Return a function that draws (prompt, precision, no early leave)."""
        return lambda: (self.rng.choice(self.prompts), self.rng.choice(precisions), None)

    async def closed(self, clients: int, requests: int, precisions: list[int | str], **extra: float) -> dict:
        """Run a closed loop; return tokens per second and per processor second, and the results."""
        client, load = self.load(clients=clients, requests=requests, extra=extra)
        used, started = processor_s(self.args.pid) or 0.0, time.perf_counter()
        results = await closed(client, load, self.pick(precisions))
        seconds, spent = time.perf_counter() - started, (processor_s(self.args.pid) or 0.0) - used
        tokens = sum(r.tokens for r in results)
        if not tokens:
            raise SystemExit(f"{self.args.url} answered nothing: {results[0].error or results[0].status}")
        return {"per_s": tokens / seconds, "per_cpu_s": tokens / spent if spent else math.nan, "results": results}

    async def ratio(self, first: tuple, second: tuple) -> dict:
        """Return the median over rounds of the ratios of two closed loops, run in turn."""
        ratios: dict[str, list[float]] = {"per_s": [], "per_cpu_s": []}
        for _ in range(self.args.rounds):
            one, two = await self.closed(*first), await self.closed(*second)
            for unit, values in ratios.items():
                values.append(one[unit] / two[unit])
        return {unit: round(statistics.median(values), 2) for unit, values in ratios.items()} | {"rounds": ratios}


async def streams(bench: Bench) -> dict:
    """8 streams against one."""
    top = [bench.args.precisions[-1]]
    return {"claim": ">= 3"} | await bench.ratio((8, 32, top), (1, 8, top))


async def mixed(bench: Bench) -> dict:
    """Mixed precisions against the highest."""
    every = bench.args.precisions
    return {"claim": ">= 0.8"} | await bench.ratio((16, 64, every), (16, 64, every[-1:]))


async def overload(bench: Bench) -> dict:
    """Arrivals at ten times the capacity, which is measured first, then whether service is as before."""
    args, every = bench.args, bench.args.precisions
    full = await bench.closed(args.clients, 4 * args.clients, every)
    capacity = full["per_s"] / args.tokens
    client, load = bench.load(rate=capacity, seconds=args.seconds, seed=args.seed)
    at_capacity = await opened(client, load, bench.pick(every))
    load.rate = 10 * capacity
    over = await opened(client, load, bench.pick(every))
    after = await bench.closed(args.clients, 4 * args.clients, every)

    def p99(results: list[Result]) -> float:
        return percentile([r.last for r in results if r.status == 200 and not r.error], 0.99)

    return {
        "claim": "<= 2",
        "p99_ratio": round(p99(over) / p99(at_capacity), 2),
        "p99_s": [round(p99(at_capacity), 2), round(p99(over), 2)],
        "capacity_requests_per_s": round(capacity, 2),
        "only_200_and_429": {r.status for r in over} <= {200, 429} and not any(r.error for r in over),
        "recovered_throughput": round(after["per_s"] / full["per_s"], 2),
    }


async def auto(bench: Bench) -> dict:
    """Idle phases and bursts at every static precision and at auto, in turn; every round is judged by itself."""
    args = bench.args
    report = json.loads(args.quality.read_text())
    gaps = {
        str(row["precision"]): math.log(row["perplexity"] / report["reference"]["perplexity"])
        for row in report["results"]
    }
    target = args.target_ms or await _target_ms(bench)
    names = [*map(str, args.precisions), "auto"]
    rounds = []
    for turn in range(args.rounds):
        rows = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            results: list[Result] = []
            for clients, each in ((1, args.idle), (args.clients, args.burst)) * args.phases:
                wanted = [name if name == "auto" else int(name)]
                part = await bench.closed(clients, clients * each, wanted, target_tpot_ms=target)
                results += part["results"]
            await asyncio.sleep(1.5)  # auto forgets the load after a second of silence
            rows[name] = _policy_row(results, gaps, target) | {"seconds": round(sum(r.last for r in results), 1)}
            rows[name]["meets_target"] = rows[name]["on_time"] >= args.share
        rounds.append({name: rows[name] for name in names})
    return {
        "claim": "every static precision misses the target that auto meets, or writes worse than auto, in every round",
        "target_tpot_ms": round(target, 2),
        "share_that_meets": args.share,
        "rounds": rounds,
        "auto_wins": [_auto_wins(rows) for rows in rounds],
    }


def _policy_row(results: list[Result], gaps: dict[str, float], target: float) -> dict:
    """Return times per token, share on time, and the mean gap in ln perplexity over all generated tokens."""
    done = [r for r in results if r.tpot is not None and not r.error]
    if len(done) < len(results):
        raise SystemExit(f"{len(results) - len(done)} requests failed: {[r.error or r.status for r in results][:3]}")
    used = sum((r.used for r in done), Counter())
    paces = [1000 * r.tpot for r in done if r.tpot is not None]
    return {
        "requests": len(done),
        "on_time": round(sum(pace <= target for pace in paces) / len(paces), 3),
        "tpot_p50_ms": round(percentile(paces, 0.5), 1),
        "tpot_p99_ms": round(percentile(paces, 0.99), 1),
        "ln_ppl_gap": round(sum(n * gaps[str(p)] for p, n in used.items()) / used.total(), 5),
        "mean_bits": round(sum(n * int(p) for p, n in used.items()) / used.total(), 2),
        "tokens_by_precision": {str(p): used[p] for p in sorted(used)},
    }


def _auto_wins(rows: dict[str, dict]) -> bool:
    """Return whether auto meets the target, and each static precision misses it or has a larger gap."""
    auto = rows["auto"]
    others = [row for name, row in rows.items() if name != "auto"]
    return auto["meets_target"] and all(
        not row["meets_target"] or row["ln_ppl_gap"] > auto["ln_ppl_gap"] for row in others
    )


async def _target_ms(bench: Bench) -> float:
    """Return a time per token that a burst misses at the highest precision and meets at the next lower one."""
    paces = []
    for p in bench.args.precisions[-2:]:
        part = await bench.closed(bench.args.clients, 4 * bench.args.clients, [p])
        paces.append(statistics.median(1000 * r.tpot for r in part["results"] if r.tpot))
    return math.sqrt(paces[0] * paces[1])


def append_lines(figures: dict, args: argparse.Namespace) -> None:
    """Append what `auto` measured to args.out, one line a round and policy."""
    from common import about_run

    about = about_run() | {"threads": args.server_threads}
    with args.out.open("a", encoding="utf-8") as out:
        for number, rows in enumerate(figures["rounds"], 1):
            for name, row in rows.items():
                flat = {key: value for key, value in row.items() if key != "tokens_by_precision"}
                line = {"round": number, "policy": name, "target_ms": figures["target_tpot_ms"], **flat}
                out.write(json.dumps(line | {"table": "automatic precision", **about}) + "\n")


def main() -> None:
    """Read the command line, run one claim, print its figures as JSON."""
    claims = {f.__name__: f for f in (streams, mixed, overload, auto)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=claims)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--pid", type=int, help="process of the server")
    parser.add_argument("--text", type=Path, help="file that prompts are cut from")
    parser.add_argument("--precisions", default="2,3,4", help="what the server stores, or some of it")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of every answer")
    parser.add_argument("--rounds", type=int, default=3, help="times that the loads are run in turn")
    parser.add_argument(
        "--clients", type=int, default=32, help="overload: batch of the server; auto: clients of a burst"
    )
    parser.add_argument("--seconds", type=float, default=60, help="overload: how long")
    parser.add_argument("--quality", type=Path, help="auto: JSON of anybits eval on the served model")
    parser.add_argument("--target-ms", type=float, help="auto: milliseconds a token may take")
    parser.add_argument("--prompt-chars", type=int, default=200, help="longest prompt")
    parser.add_argument("--phases", type=int, default=2, help="auto: idle and burst phases of a round")
    parser.add_argument("--idle", type=int, default=12, help="auto: requests of an idle phase, one after another")
    parser.add_argument("--burst", type=int, default=4, help="auto: requests of each client in a burst")
    parser.add_argument("--share", type=float, default=0.95, help="auto: share of requests that must be on time")
    parser.add_argument("--out", type=Path, help="auto: append a line for each round and policy to this file")
    parser.add_argument("--server-threads", type=int, default=1, help="auto: what the lines say of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.precisions = [int(p) for p in args.precisions.split(",")]
    if args.claim == "auto" and args.quality is None:
        parser.error("auto needs --quality: the JSON of `anybits eval MODEL --text FILE --json`")
    figures = {"measured": args.claim} | asyncio.run(claims[args.claim](Bench(args)))
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.out and args.claim == "auto":
        append_lines(figures, args)


if __name__ == "__main__":
    main()
