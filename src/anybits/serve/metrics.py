"""What /metrics says, in the Prometheus text format: counts and times by precision, and the present load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from anybits.config import Single

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)


@dataclass(frozen=True)
class Snapshot:
    """The present load; mappings go from precision to a number, `auto` from targets to (precision, changes).

    drafts: (precision, draft precision) -> (drafted tokens, those that stood), since the server started.
    """

    running: Mapping[Single, int] = field(default_factory=dict)
    waiting: Mapping[Single, int] = field(default_factory=dict)
    kv_positions: Mapping[Single, int] = field(default_factory=dict)
    kv_used: int = 0
    kv_cached: int = 0
    kv_total: int = 0
    drafts: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    auto: Mapping[tuple[str, str], tuple[int, Mapping[str, int]]] = field(default_factory=dict)


class _Load(Collector):
    """Asks for the present load when it is scraped, so that no step pays for gauges."""

    def __init__(self, snapshot: Callable[[], Snapshot], precisions: tuple[Single, ...]) -> None:
        self._snapshot, self._precisions = snapshot, precisions

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """Yield the gauges."""
        now = self._snapshot()
        by_precision = {
            "anybits_running": ("Requests in the batch.", now.running),
            "anybits_waiting": ("Requests in the queue.", now.waiting),
            "anybits_kv_positions": ("Positions of KV blocks held.", now.kv_positions),
        }
        for name, (text, values) in by_precision.items():
            gauge = GaugeMetricFamily(name, text, labels=["precision"])
            for p in self._precisions:
                gauge.add_metric([str(p)], values.get(p, 0))
            yield gauge
        blocks = max(now.kv_total, 1)
        yield GaugeMetricFamily("anybits_kv_used_ratio", "Share of KV blocks held.", now.kv_used / blocks)
        cached = "Share of KV blocks that nobody holds and that prefixes are reused from until others need them."
        yield GaugeMetricFamily("anybits_kv_cached_ratio", cached, now.kv_cached / blocks)
        level = GaugeMetricFamily("anybits_auto_precision", "Precision of auto.", labels=["tpot_ms", "ttft_ms"])
        changes = CounterMetricFamily("anybits_auto_changes", "Changes of auto.", labels=["tpot_ms", "ttft_ms", "to"])
        for targets, (precision, moves) in now.auto.items():
            level.add_metric(list(targets), precision)
            for direction in ("up", "down"):
                changes.add_metric([*targets, direction], moves.get(direction, 0))
        yield level
        yield changes
        drafted = CounterMetricFamily("anybits_drafted_tokens", "Drafted tokens.", labels=["precision", "draft"])
        accepted = CounterMetricFamily("anybits_accepted_tokens", "Drafts that stood.", labels=["precision", "draft"])
        for pair, (tried, stood) in now.drafts.items():
            drafted.add_metric(list(pair), tried)
            accepted.add_metric(list(pair), stood)
        yield drafted
        yield accepted


class Metrics:
    """Counters and histograms that the worker and the API feed; safe from any thread."""

    def __init__(self, precisions: tuple[Single, ...], snapshot: Callable[[], Snapshot]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Load(snapshot, precisions))
        labels, r = ["precision"], self._registry
        self._requests = Counter(
            "anybits_requests", "Requests by how they ended.", ["precision", "mode", "outcome"], registry=r
        )
        self._refused = Counter("anybits_refused", "Requests that were not accepted.", ["status"], registry=r)
        self._prompt = Counter("anybits_prompt_tokens", "Prompt tokens.", labels, registry=r)
        self._reused = Counter(
            "anybits_prefix_tokens_reused", "Prompt tokens found computed, at their precision.", labels, registry=r
        )
        self._generated = Counter("anybits_generated_tokens", "Generated tokens.", labels, registry=r)
        self._ttft = Histogram("anybits_ttft_seconds", "Time to first token.", labels, buckets=TTFT_BUCKETS, registry=r)
        self._tpot = Histogram(
            "anybits_tpot_seconds", "Time per token after the first.", labels, buckets=TPOT_BUCKETS, registry=r
        )

    def refused(self, status: int) -> None:
        """Count a request that got an error before it reached the queue."""
        self._refused.labels(str(status)).inc()

    def token(self, precision: Single) -> None:
        """Count a generated token."""
        self._generated.labels(str(precision)).inc()

    def first_token(self, precision: Single, prompt_tokens: int, seconds: float, reused: Mapping[Single, int]) -> None:
        """Count a prompt, the time to its first token, and its tokens that were found computed, by precision."""
        self._prompt.labels(str(precision)).inc(prompt_tokens)
        for own, tokens in reused.items():
            self._reused.labels(str(own)).inc(tokens)
        self._ttft.labels(str(precision)).observe(seconds)

    def finished(self, precision: Single, mode: str, outcome: str, seconds_per_token: float | None) -> None:
        """Count a request that ended, and its time per token when it had more than one."""
        self._requests.labels(str(precision), mode, outcome).inc()
        if seconds_per_token is not None:
            self._tpot.labels(str(precision)).observe(seconds_per_token)

    def text(self) -> bytes:
        """Return the Prometheus exposition."""
        return generate_latest(self._registry)
