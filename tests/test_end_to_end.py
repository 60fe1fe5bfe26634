"""Timing of whole decode steps on a random-weight model whose layers repeat."""

import json
from pathlib import Path

import pytest
import torch

from anybits import AnybitsError
from anybits.evaluate import end_to_end, end_to_end_cuda

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=32)
FACTS = {"device": "none", "driver": "0", "torch": "0", "nvrtc": "0", "commit": "0"}


def test_decode_steps_of_a_random_model_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(end_to_end.MODELS, "tiny", SIZES | {"num_key_value_heads": 2})
    file = tmp_path / "steps.json"
    timings = list(end_to_end.bench_decoding("tiny", "2,3", (5, 9), rounds=1, distinct=2, json_file=file))
    assert [(t.context, t.precision) for t in timings] == [(c, p) for c in (5, 9) for p in (16, 2, 3)]
    assert [json.loads(line)["precision"] for line in file.read_text().splitlines()] == [16, 2, 3] * 2
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert timings[0].bytes == 2 * (matrices + 64 * 32)
    assert timings[1].bytes < timings[2].bytes < timings[0].bytes
    assert all(t.distinct_layers == 2 and t.layers == 3 and t.speedup_vs_bf16 > 0 for t in timings)
    head = next(
        end_to_end.bench_decoding("tiny", "2", rounds=1, distinct=1, quantize_head=True, method="any-precision")
    )
    assert head.quantized_head
    for bad in ({"model": "none"}, {"contexts": (0,)}, {"method": "x"}):
        with pytest.raises(AnybitsError):
            next(end_to_end.bench_decoding(**{"model": "tiny"} | bad))


def on_cpu(**more) -> list[end_to_end_cuda.CudaDecodeTiming]:
    """The GPU's benchmark with its steps uncaptured: all of it but the capture and the clock."""
    arguments = {"model": "tiny", "precisions": "2,3", "contexts": (20,), "rounds": 1, "distinct": 2}
    fixed = {"device": "cpu", "facts": FACTS, "bandwidth": 1e9}
    return list(end_to_end_cuda.bench_decoding_cuda(**arguments | fixed | more))


def test_steps_of_the_gpu_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(end_to_end.MODELS, "tiny", SIZES | {"num_key_value_heads": 2})
    file = tmp_path / "steps.jsonl"
    timings = on_cpu(json_file=file)
    found = [(t.precision, t.graph) for t in timings]
    assert found == [(16, "shared"), (2, "shared"), (3, "shared"), (2, "own"), (3, "own"), (0, "shared")]
    assert all(t.tokens_per_s > 0 and t.error < 0.05 and t.layers == 3 and t.distinct_layers == 2 for t in timings)
    assert timings[1].bytes < timings[2].bytes < timings[0].bytes
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    plain = set(end_to_end.DecodeTiming.__dataclass_fields__)
    assert all(plain | set(FACTS) <= set(line) for line in lines)
    assert len(lines) == len(timings)


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(end_to_end.MODELS, "tiny", SIZES | {"num_key_value_heads": 2})
    forward = end_to_end_cuda.StaticDecoder.forward

    def other(self, tokens: torch.Tensor, precision: object) -> torch.Tensor:
        return forward(self, tokens, precision) * (-1 if precision == 3 else 1)

    monkeypatch.setattr(end_to_end_cuda.StaticDecoder, "forward", other)
    with pytest.raises(AnybitsError, match="a step of precision 3 is 2 away from the growing cache: nothing is timed"):
        on_cpu()
    if not torch.cuda.is_available():
        with pytest.raises(AnybitsError, match="no NVIDIA GPU was found"):
            on_cpu(device="cuda")
    with pytest.raises(AnybitsError, match="device 'tpu' is unknown"):
        end_to_end.decoding_on("tpu")
