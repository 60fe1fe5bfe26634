"""Load a running `anybits serve` at mixed precisions and print requests/s, TTFT and TPOT by precision.

Closed loop: a number of clients, each with one request at a time.
    python benchmarks/serve.py --clients 64 --requests 500 --cancel 0.1 --check
Open loop: requests arrive at a rate, whatever the server does.
    python benchmarks/serve.py --rate 20 --seconds 60
The claims of docs/serving.md, one command each: benchmarks/serve_claims.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Result:
    """What one request met with; times in seconds. status 0: the connection failed."""

    prompt: str
    precision: int | str
    status: int = 0
    cancelled: bool = False
    text: str = ""
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    used: Counter[int] = field(default_factory=Counter)
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first."""
        return (self.last - self.first) / (self.tokens - 1) if self.first is not None and self.tokens > 1 else None


class Client:
    """Just enough HTTP over asyncio: the load must not take the processor from the server."""

    def __init__(self, args: argparse.Namespace) -> None:
        address = urlsplit(args.url)
        self.host, self.port, self.args = address.hostname, address.port, args
        self.extra = getattr(args, "extra", {})  # more fields of every body

    async def _open(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        key = f"Authorization: Bearer {self.args.api_key}\r\n" if self.args.api_key else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{key}"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer

    async def get(self, path: str) -> str:
        """Return the body of a GET."""
        reader, writer = await self._open("GET", path)
        text = (await reader.read()).decode()
        writer.close()
        return text.partition("\r\n\r\n")[2]

    async def ask(self, prompt: str, precision: int | str, cancel_after: int | None = None) -> Result:
        """Stream one greedy completion; leave after `cancel_after` tokens."""
        result = Result(prompt, precision)
        body = dict(prompt=prompt, precision=precision, max_tokens=self.args.tokens, temperature=0, stream=True)
        started = time.perf_counter()
        writer = None
        try:
            reader, writer = await self._open(
                "POST", "/v1/completions", json.dumps(body | {"ignore_eos": True} | self.extra).encode()
            )
            result.status = int((await reader.readline()).split()[1])
            async for line in reader:
                if line.startswith(b"data: {") and not self._take(result, json.loads(line[6:]), started):
                    break
                if cancel_after is not None and result.tokens >= cancel_after:
                    result.cancelled = True
                    break
        except (OSError, IndexError, ValueError) as problem:
            result.error = repr(problem)
        finally:
            if writer is not None:
                writer.close()
        return result

    @staticmethod
    def _take(result: Result, event: dict, started: float) -> bool:
        if "error" in event:
            result.error = event["error"]["message"]
            return False
        result.last = time.perf_counter() - started
        result.first = result.last if result.first is None else result.first
        result.tokens += 1
        result.used[event["precision"]] += 1
        result.text += event["choices"][0]["text"]
        return True


def percentile(values: list[float], share: float) -> float:
    """Return a percentile of unsorted values, NaN of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def summary(results: list[Result], seconds: float) -> dict:
    """Return the figures of a load, in all and by precision."""
    out: dict = {"seconds": round(seconds, 2), "statuses": dict(Counter(r.status for r in results))}
    rows: dict = {}
    for name in ["all", *sorted({str(r.precision) for r in results})]:
        own = [r for r in results if name in ("all", str(r.precision))]
        done = [r for r in own if r.status == 200 and not r.cancelled and not r.error]
        first, pace = [r.first for r in done if r.first is not None], [r.tpot for r in done if r.tpot is not None]
        ms = {
            f"{label}_{tag}_ms": round(1000 * percentile(values, share), 1)
            for label, values in (("ttft", first), ("tpot", pace), ("latency", [r.last for r in done]))
            for tag, share in (("p50", 0.5), ("p99", 0.99))
        }
        rows[name] = {
            "completed": len(done),
            "refused": sum(r.status == 429 for r in own),
            "cancelled": sum(r.cancelled for r in own),
            "failed": sum(bool(r.error) or r.status not in (200, 429) for r in own),
            "requests_per_s": round(len(done) / seconds, 2),
            "tokens_per_s": round(sum(r.tokens for r in own) / seconds, 1),
            "mean_bits": round(
                sum(p * n for r in done for p, n in r.used.items()) / max(sum(r.tokens for r in done), 1), 3
            ),
        } | ms
    return out | {"by_precision": rows}


async def closed(client: Client, args: argparse.Namespace, pick) -> list[Result]:
    """Run args.requests requests through args.clients clients."""
    results: list[Result] = []
    left = iter(range(args.requests))

    async def one() -> None:
        for _ in left:
            results.append(await client.ask(*pick()))

    await asyncio.gather(*(one() for _ in range(args.clients)))
    return results


async def opened(client: Client, args: argparse.Namespace, pick) -> list[Result]:
    """Send requests at random moments, args.rate a second on average, for args.seconds."""
    tasks, start, due = [], time.perf_counter(), 0.0
    arrivals = random.Random(args.seed)
    while due < args.seconds:
        due += arrivals.expovariate(args.rate)
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask(*pick())))
    return list(await asyncio.gather(*tasks))


async def check(client: Client, results: list[Result]) -> tuple[int, int]:
    """Ask every completed (prompt, precision) again alone; return (answers compared, answers that differ)."""
    alone: dict[tuple[str, int | str], str] = {}
    compared = wrong = 0
    for r in results:
        if r.status == 200 and not r.error and r.precision != "auto":
            key = (r.prompt, r.precision)
            if key not in alone:
                alone[key] = (await client.ask(*key)).text
            compared += 1
            wrong += not alone[key].startswith(r.text) if r.cancelled else alone[key] != r.text
    return compared, wrong


def memory_mb(pid: int | None) -> float | None:
    """Return the resident memory of a process."""
    if pid is None:
        return None
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


def processor_s(pid: int | None) -> float | None:
    """Return the processor seconds of a process: a measure that other work on the machine disturbs less."""
    if pid is None:
        return None
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def main(args: argparse.Namespace) -> dict:
    """Run the load and return its figures."""
    client, rng = Client(args), random.Random(args.seed)
    text = args.text.read_text(encoding="utf-8") if args.text else "abcdefgh " * 2000
    starts = [rng.randrange(max(1, len(text) - 600)) for _ in range(args.prompts)]
    prompts = [text[s : s + rng.randint(20, args.prompt_chars)] for s in starts]
    precisions = [p if p == "auto" else int(p) for p in args.precisions.split(",")]

    def pick() -> tuple[str, int | str, int | None]:
        leaves = rng.randint(1, max(1, args.tokens - 1)) if rng.random() < args.cancel else None
        return rng.choice(prompts), rng.choice(precisions), leaves

    before, used, started = memory_mb(args.pid), processor_s(args.pid), time.perf_counter()
    results = await (opened if args.rate else closed)(client, args, pick)
    out = summary(results, time.perf_counter() - started)
    if used is not None:
        spent = (processor_s(args.pid) or 0.0) - used
        out["processor_s"] = round(spent, 2)
        out["tokens_per_processor_s"] = round(sum(r.tokens for r in results) / spent, 1) if spent else None
    if args.check:
        out["compared"], out["wrong"] = await check(client, results)
    await asyncio.sleep(0.5)
    held = [line for line in (await client.get("/metrics")).splitlines() if line.startswith("anybits_kv_used_ratio ")]
    out["kv_used_after"] = float(held[0].split()[1]) if held else None
    out["memory_mb"] = [before, memory_mb(args.pid)]
    out["errors"] = dict(Counter(r.error for r in results if r.error).most_common(3))
    return out


def show(out: dict) -> None:
    """Print the figures as a table."""
    rows = out["by_precision"]
    names = list(rows["all"])
    print(f"{'':16}" + "".join(f"{name:>12}" for name in rows))
    for name in names:
        print(f"{name:16}" + "".join(f"{row[name]:>12}" for row in rows.values()))
    print({key: value for key, value in out.items() if key != "by_precision"})


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--clients", type=int, default=8, help="closed loop: clients at once")
    parser.add_argument("--requests", type=int, default=64, help="closed loop: requests in all")
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--seconds", type=float, default=30, help="open loop: how long")
    parser.add_argument("--precisions", default="2,3,4", help="drawn at random for each request; auto is one too")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--prompts", type=int, default=40, help="different prompts")
    parser.add_argument("--prompt-chars", type=int, default=400, help="longest prompt")
    parser.add_argument("--text", type=Path, help="file that prompts are cut from")
    parser.add_argument("--cancel", type=float, default=0.0, help="share of clients that leave early")
    parser.add_argument("--check", action="store_true", help="ask each again alone and compare the text")
    parser.add_argument("--pid", type=int, help="process of the server, to report its memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures")
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    figures = asyncio.run(main(options))
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
