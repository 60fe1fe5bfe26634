"""The parts of benchmarks/gpu.py that need no GPU: its report, and the layouts of the papers' kernels."""

import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from anybits import bits
from anybits.evaluate import end_to_end
from anybits.integrations.importers import unpermute
from anybits.kernels.cuda import gpu as gpus
from anybits.kernels.cuda import layout, plan
from anybits.weight import PlaneWeight
from conftest import random_weight

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import gpu_report
import gpu_rivals
import gpu_run
import gpu_stages

FACTS = {"device": "a GPU", "driver": "1.2", "nvrtc": "13.0", "torch": "2.9", "commit": "abc", "copy_gb_per_s": 4300}
FACTS |= {"date": "2026-01-01", "anybits": "0.1", "threads": 2}


def lines() -> list[dict]:
    """A run of every stage, with figures that are made up."""
    made = []
    for method in gpu_stages.METHODS:
        made.append({"stage": "check", "method": method, "m": 1, "precision": 2, "ok": True, "error": 1e-3})
        for shape in ([4096, 14336], [1024, 4096]):
            for p in (2, 3, 4):
                share = 0.9 - 0.1 * p
                made.append(
                    {"stage": "time", "shape": shape, "method": method, "m": 1, "precision": p, "us": 10.0 * p}
                    | {"bytes": 1000, "bandwidth_share": share, "speedup_vs_bf16": 8.0 / p, "error": 1e-3}
                )
        for p, graph in ((16, "shared"), (2, "shared"), (4, "shared"), (2, "own"), (4, "own"), (0, "shared")):
            made.append(
                {"stage": "e2e", "model": "llama-3.1-8b", "method": method, "precision": p, "graph": graph}
                | {"context": 512, "ms": 1.0 + p, "tokens_per_s": 1000 / (1 + p), "speedup_vs_bf16": 17 / (1 + p)}
                | {"bandwidth_share": 0.5}
            )
    made.append({"stage": "e2e", "model": "llama-3.1-8b", "method": "anybcq", "failed": "AnybitsError: it is wrong"})
    made.append(
        {"stage": "rows", "shape": [4096, 4096], "method": "anybcq", "m": 64, "precision": 2, "us": 50.0}
        | {"bandwidth_share": 0.2, "speedup_vs_bf16": 1.5, "dense_path_us": 80.0}
    )
    rival = {"stage": "rivals", "shape": [4096, 4096], "m": 1, "precision": 2, "our_us": 5.0}
    made.append(rival | {"name": "AnyBCQ", "us": 10.0, "our_gain": 2.0, "error": 1e-3})
    made.append(rival | {"name": "Any-Precision", "us": None, "our_gain": None, "error": 0.7})
    made.append(
        {"stage": "together", "name": "gate, up", "method": "anybcq", "m": 1, "precision": 0, "us": 9.0, "ratio": 0.8}
    )
    made.append({"stage": "rates", "name": "8-bit", "tera_multiply_adds": 900.0})
    made.append({"stage": "mixed", "method": "anybcq", "m": 4, "us": 20.0, "ratio": 1.1})
    for us in (None, 12.0, 11.0):
        made.append(
            {"stage": "tune", "shape": [4096, 4096], "precision": 2, "us": us, "plane_share": 0.5, "tuning": f"{us}"}
        )
    return [line | FACTS for line in made]


def test_a_synthetic_run_becomes_a_table_a_page_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "gpu.jsonl"
    file.write_text("\n".join(map(json.dumps, lines())) + '\n{"stage": "ti')  # the last line was being written
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(file), "--out", str(tmp_path / "out")])
    gpu_report.main()
    text = gpu_report.text_table(gpu_report.read(file))
    for said in (
        "a GPU, driver 1.2, copy 4300 GB/s",
        "check: 2 of 2 right",
        "time  4096x14336 anybcq        m   1 p 2    20.00 us   70 %  4.00x bf16",
        "e2e llama-3.1-8b any-precision switching graph shared    1.000 ms",
        "FAILED stage e2e model llama-3.1-8b method anybcq: AnybitsError: it is wrong",
        "dense path    80.00 us",
        "AnyBCQ        m   1 p 2    10.00 us, ours     5.00 us = 2.00x as fast",
        "Any-Precision m   1 p 2 is wrong by 0.7: not timed",
        "together gate, up          anybcq        m   1 mixed",
    ):
        assert said in text
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "| AnyBCQ | 4096 × 14336 | 20.0 µs, 70 %, 4.0× | 30.0 µs, 60 %, 2.7× | 40.0 µs, 50 %, 2.0× |" in page
    assert "| Any-Precision | bf16 | shared | 17.000 | 59 | 1.00 | 50 % |" in page
    assert "| AnyBCQ | 4096 × 4096 | 1 | 2 | 10.0 | 5.0 | 2.00 |" in page
    assert (tmp_path / "out" / "gpu.png").stat().st_size > 10_000


def test_few_lines_are_enough_and_none_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    gpu_report.write(lines()[:1], tmp_path)
    assert "## " not in (tmp_path / "gpu.md").read_text()
    assert gpu_report.text_table([]) == "nothing was measured"
    (tmp_path / "none").write_text("")
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="holds no lines"):
        gpu_report.main()


def test_published_lines_are_what_the_results_page_takes() -> None:
    for line in gpu_report.published(lines()):
        assert {"table", *gpu_report.RUN} <= set(line)
        assert not any(isinstance(value, list | dict) for value in line.values())


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    file = tmp_path / "gpu.jsonl"
    file.write_text(json.dumps({"stage": "time", "shape": [16, 32], "m": 1}) + '\n{"stage": "ti')
    run = gpu_run.Run(file, 1)
    assert run.have(stage="time", shape=(16, 32), m=1)
    assert not run.have(stage="time", shape=(16, 32), m=2)
    run.add(stage="time", shape=(16, 32), m=2)
    again = gpu_run.Run(file, 1, "def")
    assert again.have(stage="time", shape=(16, 32), m=2)["copy_gb_per_s"] == 4000
    assert {"date", "anybits", "threads", "device", "commit"} <= set(again.lines[-1])
    again.add(stage="rates", name="8-bit")
    assert again.lines[-1]["commit"] == "def"


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks the GPU for before it measures."""
    facts = {"device": "a GPU", "driver": "1", "nvrtc": "13.0", "torch": "2", "commit": "abc"}
    monkeypatch.setattr(gpu_run.timing, "environment", lambda: facts)
    monkeypatch.setattr(gpu_run.timing, "copy_bandwidth", lambda: 4e12)


def test_what_fails_becomes_a_line_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(gpu_run, "_usable", lambda: True)
    run = gpu_run.Run(tmp_path / "gpu.jsonl", 1)
    for m in (1, 2):
        with run.doing(stage="time", shape=(16, 32), m=m):
            assert json.loads(gpu.doing_file(run.out).read_text())["m"] == m
            if m == 1:
                raise RuntimeError("no kernel image\nis there")
            run.add(stage="time", shape=(16, 32), m=m, us=1.0)
    assert not gpu.doing_file(run.out).exists()
    assert run.have(stage="time", shape=(16, 32), m=1, precision=2)["failed"] == "RuntimeError: no kernel image"
    assert "failed" not in run.have(stage="time", shape=(16, 32), m=2)
    ended = []
    monkeypatch.setattr(gpu_run, "_usable", lambda: False)
    monkeypatch.setattr(gpu_run.os, "_exit", ended.append)
    with run.doing(stage="rows", shape=(16, 32)):
        raise RuntimeError("an illegal memory access")
    assert ended == [gpu.AGAIN]
    gpu.forget_failures(run.out)
    assert [line["stage"] for line in gpu_report.read(run.out)] == ["time"]
    assert "FAILED" in capsys.readouterr().out


WORKER = """
import json, os, sys, time
from pathlib import Path
out, doing = Path(sys.argv[1]), Path(sys.argv[2])
have = [json.loads(line)["m"] for line in out.read_text().splitlines()]
for m in range(6):
    if m in have: continue
    doing.write_text(json.dumps({"stage": "time", "m": m}))
    if m == 1: os.kill(os.getpid(), 11)
    if m == 2: time.sleep(60)
    line = {"stage": "time", "m": m} | ({"failed": "illegal"} if m == 3 else {})
    with out.open("a") as file: file.write(json.dumps(line) + chr(10))
    doing.unlink()
    if m == 3: os._exit(75)
    if m == 4: sys.exit(sys.argv[3])
"""


def test_a_worker_that_crashes_or_hangs_is_begun_again_behind_it(tmp_path: Path) -> None:
    worker, out = tmp_path / "worker.py", tmp_path / "gpu.jsonl"
    worker.write_text(WORKER)
    out.write_text("")
    command = [sys.executable, str(worker), str(out), str(gpu.doing_file(out))]
    assert gpu.supervise([*command, ""], out, 1, longest=1.5) == "no measurement was under way when the worker " + (
        "ended with status 1"
    )
    lines = {line["m"]: line.get("failed") for line in gpu_report.read(out)}
    assert lines == {0: None, 1: "ended by SIGSEGV", 2: "took more than 2 s", 3: "illegal", 4: None}
    assert gpu.supervise([*command, ""], out, 1) is None
    gpu.forget_failures(out)
    assert gpu.supervise([*command, ""], out, -0.49) == gpu.LATE


class OnCpu(TorchFunctionMode):
    """What is made on "cuda" is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        changed = [{str: lambda a: "cpu" if a == "cuda" else a}.get(type(a), lambda a: a)(a) for a in args]
        named = kwargs or {}
        if torch.device(named.get("device") or "cpu").type == "cuda":
            named = named | {"device": "cpu"}
        return func(*changed, **named)


class Specified:
    """The backend in the CUDA backend's place: products by the specification, float64."""

    name = "cuda"
    dense: ClassVar[dict[int, dict[int, torch.Tensor]]] = {}

    def prepare(self, weight: PlaneWeight) -> layout.CudaWeight:
        prepared = layout.prepare(weight)
        self.dense[prepared.planes.data_ptr()] = {p: weight.dequantize(p).double() for p in weight.precisions}
        return prepared

    def matmul(self, x: torch.Tensor, prepared: layout.CudaWeight, precision: int | torch.Tensor) -> torch.Tensor:
        dense = self.dense[prepared.planes.data_ptr()]
        each = [precision] * len(x) if isinstance(precision, int) else precision.tolist()
        return torch.stack([dense[p] @ row for p, row in zip(each, x.double(), strict=True)]).to(x.dtype)

    def products(self, x: torch.Tensor, weights: list, precision: int | torch.Tensor) -> list[torch.Tensor]:
        return [self.matmul(x, one, precision) for one in weights]


def seconds(run, copies: int, rounds: int = 5) -> float:
    """A clock that stands still."""
    run(0), run(copies - 1)
    return 1e-6


@pytest.fixture
def tiny_stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """All of the stages but the GPU, on small shapes; what they launch and compile."""
    on_a_gpu(monkeypatch)
    seen: dict[str, list] = {"launched": [], "compiled": []}
    backend, device = Specified(), gpus.Gpu(0, 90, plan.Device(132, 227 << 10))
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(end_to_end.MODELS, "tiny", sizes | {"num_key_value_heads": 2, "vocab_size": 32})
    bench = partial(gpu_stages.end_to_end_cuda.bench_decoding_cuda, device="cpu", rounds=1)
    extension_ = extension(matmul_kbit=matmul_kbit, anybcq_gemv=anybcq_gemv)
    for owner, values in (
        (gpu_stages.cuda, {"prepare": backend.prepare, "CudaBackend": Specified}),
        (gpu_stages.cuda, {"_dense": lambda x, weight, p, rows: backend.matmul(x, weight, p)}),
        (gpu_stages.timing, {"CudaBackend": Specified}),
        (gpu_stages.timing, {"rotating": lambda prepared, least: [prepared] * 2, "graph_seconds": seconds}),
        (gpu_stages.timing, {"_BEYOND_CACHE": 1 << 12}),
        (gpu_rivals, {"queued_seconds": seconds}),
        (gpu_rivals.Rival, {"found": lambda rival: extension_}),
        (gpus, {"of": lambda index: device}),
        (gpus, {"launch": lambda gpu_, launch, arguments: seen["launched"].append(launch.kernel.text())}),
        (gpu_stages.toolchain, {"compile_ahead": lambda kernels, arch: seen["compiled"].extend(kernels)}),
        (torch.cuda, dict.fromkeys(("current_device", "empty_cache", "synchronize"), lambda: 0)),
        (gpu_stages.end_to_end_cuda, {"bench_decoding_cuda": bench}),
        (gpu_stages, {"LARGE": ((32, 256), (16, 512)), "CHECKED_SHAPE": (32, 256), "MIXED_SHAPE": (16, 512)}),
        (gpu_stages, {"TUNED_SHAPES": ((32, 256),), "GROUPS": {"gate, up": ((32, 256), (16, 256))}, "MODEL": "tiny"}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)
    return seen


def test_every_stage_runs_to_its_end(tmp_path: Path, tiny_stages: dict[str, list]) -> None:
    run = gpu_run.Run(tmp_path / "gpu.jsonl", 10)
    with torch.inference_mode(), OnCpu():
        gpu_stages.run_stages(run, gpu.STAGES)
    assert not [line for line in run.lines if "failed" in line]
    assert {line["stage"] for line in run.lines} == {*gpu.STAGES, "cublas"}
    assert all(line["ok"] for line in run.lines if line["stage"] == "check")
    assert len(tiny_stages["launched"]) == 2 * len(gpu_stages.RATES)
    assert {kernel.source for kernel in tiny_stages["compiled"]} == {
        "signs.cu",
        "codebook.cu",
        "reduce.cu",
        "dequantize.cu",
    }
    count = len(run.lines)
    with torch.inference_mode(), OnCpu():
        gpu_stages.run_stages(run, gpu.STAGES)  # all is there
    assert len(run.lines) == count
    assert gpu_report.page(gpu_report.read(run.out))


@pytest.mark.parametrize("columns", [2048, 1024, 1568, 96])
def test_planes_in_any_precisions_order_come_back(columns: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (3, bits.words(columns)), dtype=torch.int32)
    assert torch.equal(unpermute(gpu_rivals.permute(words)), words)


def extension(**functions: object) -> types.ModuleType:
    module = types.ModuleType("extension")
    module.__dict__.update(functions)
    return module


def matmul_kbit(x: torch.Tensor, planes: torch.Tensor, centroids: torch.Tensor, p: int) -> torch.Tensor:
    """What Any-Precision's kernel computes, written from its layout."""
    codes = sum(bits.unpack(unpermute(planes[i]), x.shape[1]).long() << (p - 1 - i) for i in range(p))
    return x @ centroids.gather(1, codes).t()


def anybcq_gemv(x, output, planes, scales, offsets, p: int, stored: int, group: int) -> None:
    """What AnyBCQ's kernel adds to its output, written from its layout."""
    assert planes.shape[1] == stored
    weight = offsets.repeat_interleave(group, 0).float()
    for i in range(p):
        signs = 2.0 * bits.unpack(planes[:, i].t().contiguous(), x.numel()) - 1
        weight += scales[:, i].repeat_interleave(group, 0).float() * signs.t()
    output += (x.view(1, 1, -1).float() @ weight).half()


@pytest.mark.parametrize("rival", gpu_rivals.RIVALS, ids=lambda rival: rival.method)
def test_rivals_are_checked_and_timed_on_our_weights(rival: gpu_rivals.Rival) -> None:
    group = None if rival.method == "any-precision" else 64
    weight = random_weight(40, 1088, (2, 3, 4), group)
    calls = []

    def seconds(run, copies: int) -> float:
        calls.append([run(i) for i in range(copies)])
        return 1e-6 * copies

    module = extension(matmul_kbit=matmul_kbit, anybcq_gemv=anybcq_gemv)
    for p in (2, 4):
        for m in (1, rival.most_rows):
            found = gpu_rivals.time_rival(rival, module, weight, m, p, 3, seconds)
            assert found["ok"], found["error"]
            assert found["us"] == pytest.approx(3)
    assert len(calls) == 4
    broken = extension(matmul_kbit=lambda *a: matmul_kbit(*a) * 2, anybcq_gemv=lambda x, y, *rest: None)
    found = gpu_rivals.time_rival(rival, broken, weight, 1, 2, 3, seconds)
    assert found["us"] is None
    assert len(calls) == 4


def test_a_rival_that_is_not_installed_is_one_line() -> None:
    for rival in gpu_rivals.RIVALS:
        said = rival.found()
        assert isinstance(said, str)
        assert said.startswith(f"{rival.name}'s kernels were not found")
        assert "clone github.com/" in said
        assert "\n" not in said
