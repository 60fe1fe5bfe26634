"""Times whole decode steps on a GPU: captured graphs of planes at every precision, and of the same model in bf16."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anybits.errors import AnybitsError
from anybits.evaluate import end_to_end, kernels_cuda
from anybits.evaluate.end_to_end import DecodeTiming
from anybits.integrations import random_model
from anybits.integrations.static_decode import StaticDecoder
from anybits.precision import ModelPrecision
from anybits.precision import precision as scoped

GRAPHS = ("shared", "own")
_STEPS = 32  # of one measurement: its start and end are then a small part
_CAPTURED = 1e-2  # relative L2 between a captured step and the same one uncaptured: libraries may choose other kernels
_FARTHEST = 0.3  # relative L2 of logits of random weights: more than rounding, which 32 layers of noise carry on
_SPARE = 16


@dataclass(frozen=True)
class CudaDecodeTiming(DecodeTiming):
    """Precision 0 is another one at every token; graph: "shared" by all precisions, or captured for this one, "own".

    batch: sequences, each with a new token in a step; error: relative L2 between the logits of a captured step and
    of transformers' growing cache; bandwidth_share: gb_per_s over that of a large copy.
    """

    graph: str = "shared"
    batch: int = 1
    error: float = 0.0
    bandwidth_share: float = 0.0


def bench_decoding_cuda(
    model: str,
    precisions: str = "2-4",
    contexts: Sequence[int] = (512,),
    method: str = "anybcq",
    rounds: int = 5,
    quantize_head: bool = False,
    distinct: int | None = None,
    json_file: Path | None = None,
    device: str = "cuda",
    facts: dict[str, Any] | None = None,
    bandwidth: float | None = None,
) -> Iterator[CudaDecodeTiming]:
    """Yield timings as `bench_decoding` does: bf16 first, then each precision in the graph of all and in its own.

    Every product is checked against float64 first, every captured step against the same step uncaptured and against
    the growing cache. json_file: one JSON object a line, with device and versions. device: "cpu" runs the same
    uncaptured, for tests; facts and bandwidth: those of a run that has them already.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise AnybitsError("no NVIDIA GPU was found: choose --device cpu")
    memory = torch.cuda.mem_get_info()[0] if on_gpu else end_to_end.available_memory()
    wanted, own = end_to_end.checked(model, precisions, contexts, method, rounds, distinct, memory)
    facts = kernels_cuda.environment() if facts is None else facts
    bandwidth = kernels_cuda.copy_bandwidth() if bandwidth is None else bandwidth
    sizes, lines = end_to_end.MODELS[model], list[str]()
    with torch.inference_mode():
        dense, planes = end_to_end.random_models(sizes, own, method, wanted, quantize_head, device)
        for context in contexts:
            measured = _measure(dense, planes, wanted, context, rounds)
            bf16 = measured[16, "shared"][0]
            for (p, graph), (seconds, error) in measured.items():
                read = [end_to_end.weight_bytes(dense if p == 16 else planes, q) for q in ([p] if p else wanted)]
                size = sum(read) // len(read)
                timing = CudaDecodeTiming(
                    model, method, p, context, round(seconds * 1e3, 4), round(1 / seconds, 2), size,
                    round(size / seconds / 1e9, 2), round(bf16 / seconds, 3), sizes["num_hidden_layers"], own,
                    quantize_head, graph, 1, error, round(size / seconds / bandwidth, 3),
                )  # fmt: skip
                lines.append(json.dumps(asdict(timing) | {"copy_gb_per_s": round(bandwidth / 1e9, 1)} | facts))
                yield timing
    if json_file is not None:
        json_file.write_text("\n".join(lines) + "\n")


def _measure(
    dense: Any, planes: Any, precisions: Sequence[int], context: int, rounds: int
) -> dict[tuple[int, str], tuple[float, float]]:
    """Return (precision, graph) -> (median seconds of a step, error of its logits); 16 is bf16, 0 switching."""
    default = ModelPrecision(precisions[-1], tuple(precisions))
    decoders = {
        (model is planes, graph): _Timed(model, default if model is planes else None, context, graph == "own")
        for model, graph in ((dense, "shared"), *((planes, graph) for graph in GRAPHS))
    }
    runs: dict[tuple[int, str], tuple[_Timed, tuple[int, ...]]] = {(16, "shared"): (decoders[False, "shared"], (16,))}
    runs |= {(p, graph): (decoders[True, graph], (p,)) for graph in GRAPHS for p in precisions}
    errors = {key: decoder.check(cycle[0]) for key, (decoder, cycle) in runs.items()}
    runs[0, "shared"] = (decoders[True, "shared"], tuple(precisions))
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, (decoder, cycle) in runs.items():
            seconds[key].append(decoder.seconds(cycle))
    return {key: (statistics.median(times), errors.get(key, 0.0)) for key, times in seconds.items()}


class _Timed:
    """A decoder behind a random context, whose steps leave it where it is."""

    def __init__(self, model: Any, default: ModelPrecision | None, context: int, own_graphs: bool) -> None:
        self._prefilled = random_model.context_of(model, context)
        capacity = -(-(context + _SPARE) // 64) * 64
        self._decoder = StaticDecoder(model, default, self._prefilled, capacity, own_graphs=own_graphs)
        self._token = torch.ones(1, 1, dtype=torch.int64, device=self._decoder.device)

    def check(self, precision: int) -> float:
        """Return the relative L2 error of a step's logits against the growing cache; AnybitsError when it is wrong."""
        decoder = self._decoder
        plain = StaticDecoder(
            decoder.model, decoder.default, self._prefilled, decoder.capacity, capture=False,
            own_graphs=decoder.own_graphs,
        )  # fmt: skip
        logits, uncaptured = decoder.forward(self._token, precision), plain.forward(self._token, precision)
        decoder.drop(1)
        with scoped(precision if precision < 16 else 2):
            out = decoder.model(input_ids=self._token, past_key_values=self._prefilled, use_cache=True)
        self._prefilled.crop(-1)
        wanted = out.logits.float()
        error = float((logits - wanted).norm() / wanted.norm())
        name = "bf16" if precision == 16 else f"precision {precision}"
        if not float((logits - uncaptured).norm() / uncaptured.norm()) < _CAPTURED:
            raise AnybitsError(f"a captured step of {name} is not the step that was captured: nothing is timed")
        if not error < _FARTHEST:
            raise AnybitsError(f"a step of {name} is {error:.3g} away from the growing cache: nothing is timed")
        return error

    def seconds(self, cycle: Sequence[int]) -> float:
        """Return seconds of a step, the mean of some, each at the next precision of `cycle`."""
        for i in range(3):
            self._step(cycle[i % len(cycle)])
        if self._token.device.type != "cuda":
            start = time.perf_counter()
            self._step(cycle[0])
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        steps = -(-_STEPS // len(cycle)) * len(cycle)
        begin.record()
        for i in range(steps):
            self._step(cycle[i % len(cycle)])
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / steps

    def _step(self, precision: int) -> None:
        self._decoder.forward(self._token, precision)
        self._decoder.drop(1)
