"""One figure for each claim about a running `anybits serve`, from interleaved runs; one command each.

    python benchmarks/serve_claims.py streams     tokens/s of 8 streams over the same requests one after another
    python benchmarks/serve_claims.py mixed       tokens/s of mixed precisions over all at the highest of them
    python benchmarks/serve_claims.py overload    p99 latency of accepted requests at 10x capacity over that at capacity
    python benchmarks/serve_claims.py auto --quality eval.json
                                                  bursts with idle phases: quality and share of requests on time,
                                                  every static precision and auto

`auto` takes `anybits eval --json` of the served model; quality is the mean ln-likelihood of a held-out token at the
precisions that wrote the answers. Unless --target-ms is given, the target lies between what a burst takes at the lowest
and at the highest precision. Give --pid of the server for tokens per processor second as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
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
        self.prompts = [text[s : s + self.rng.randint(20, 200)] for s in starts]

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
    """Bursts and idle phases at every static precision and at auto, in turn."""
    args = bench.args
    table = json.loads(args.quality.read_text())["results"]
    loglik = {str(row["precision"]): -math.log(row["perplexity"]) for row in table}
    target = args.target_ms or await _target_ms(bench)
    rows: dict[str, dict] = {}
    seen: dict[str, list[Result]] = {str(p): [] for p in [*args.precisions, "auto"]}
    for _ in range(args.rounds):
        for name, results in seen.items():
            precision = name if name == "auto" else int(name)
            for clients, each in ((1, args.idle), (args.clients, args.burst)) * args.phases:
                part = await bench.closed(clients, clients * each, [precision], target_tpot_ms=target)
                results += part["results"]
            await asyncio.sleep(1.5)  # auto forgets the load after a second of silence
    for name, results in seen.items():
        done = [r for r in results if r.tpot is not None and not r.error]
        tokens = sum(n for r in done for n in r.used.values())
        rows[name] = {
            "on_time": round(sum(1000 * r.tpot <= target for r in done if r.tpot) / len(done), 3),
            "mean_loglik": round(sum(n * loglik[str(p)] for r in done for p, n in r.used.items()) / tokens, 4),
            "mean_bits": round(sum(n * int(p) for r in done for p, n in r.used.items()) / tokens, 2),
            "tpot_p50_ms": round(1000 * percentile([r.tpot for r in done if r.tpot], 0.5), 1),
        }
    equal = [n for n, row in rows.items() if n != "auto" and row["on_time"] >= rows["auto"]["on_time"] - args.tolerance]
    return {
        "claim": "auto beats every static precision that is on time as often",
        "target_tpot_ms": round(target, 2),
        "policies": rows,
        "static_as_often_on_time": equal,
        "auto_wins": all(rows["auto"]["mean_loglik"] > rows[n]["mean_loglik"] for n in equal),
    }


async def _target_ms(bench: Bench) -> float:
    """Return a time per token that a burst meets at the lowest precision and misses at the highest."""
    paces = []
    for p in (bench.args.precisions[0], bench.args.precisions[-1]):
        part = await bench.closed(bench.args.clients, 2 * bench.args.clients, [p])
        paces.append(statistics.median(1000 * r.tpot for r in part["results"] if r.tpot))
    return math.sqrt(paces[0] * paces[1])


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
    parser.add_argument("--phases", type=int, default=2, help="auto: idle and burst phases of a round")
    parser.add_argument("--idle", type=int, default=24, help="auto: requests of an idle phase, one after another")
    parser.add_argument("--burst", type=int, default=2, help="auto: requests of each client in a burst")
    parser.add_argument("--tolerance", type=float, default=0.02, help="auto: share on time that counts as equal")
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


if __name__ == "__main__":
    main()
