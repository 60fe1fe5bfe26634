"""Timing of whole decode steps on a random-weight model whose layers repeat."""

import json
from pathlib import Path

import pytest

from anybits import AnybitsError
from anybits.evaluate import end_to_end


def test_decode_steps_of_a_random_model_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=32)
    monkeypatch.setitem(end_to_end.MODELS, "tiny", sizes | {"num_key_value_heads": 2})
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
