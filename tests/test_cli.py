"""The command line from the outside: what it prints, writes, and refuses in one sentence with exit code 1."""

import json
from pathlib import Path

import pytest

from anybits import cli
from anybits.kernels import cpu, native
from conftest import save_tiny


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and, beside it, its quantized form and a text."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "float", "llama")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["quantize", str(folder / "float"), "-o", str(folder / "any"), "--preset", "fast", "--group-size", "32"]
        )
    assert not stop.value.code
    return folder


@pytest.mark.parametrize("command", ["quantize", "generate", "eval", "inspect", "bench", "demo"])
def test_help_teaches(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Usage" in out
    assert "--help" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from anybits import __version__

    assert run(capsys, "--version") == (0, f"anybits {__version__}\n", "")


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_quantize_says_what_it_does(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, method: str
) -> None:
    text = model / "text.txt"
    arguments = ("--method", method, "--precisions", "2-5", "--samples", 2, "--seq-len", 32, "--group-size", 32)
    code, out, _ = run(capsys, "quantize", model / "float", "-o", tmp_path / "any", *arguments, "--calibration", text)
    assert code == 0
    assert "block 2/2" in out
    assert "s left" in out
    stored = json.loads((tmp_path / "any" / "config.json").read_text())["quantization_config"]
    assert stored["precisions"] == [2, 3, 4, 5]
    assert stored["recipe"]["calibration"]["tokens"] == 64
    card = (tmp_path / "any" / "README.md").read_text()
    assert "import anybits" in card
    assert "| 5 |" in card


@pytest.mark.parametrize("precision", [2, 3, 4])
def test_generate_at_each_precision(capsys: pytest.CaptureFixture[str], model: Path, precision: int) -> None:
    arguments = ("generate", model / "any", "--precision", precision, "--prompt", "the fox", "--max-new-tokens", 4)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out.strip()
    assert run(capsys, *arguments, "--temperature", 2.0, "--seed", 3) == run(
        capsys, *arguments, "--temperature", 2.0, "--seed", 3
    )


def test_generate_in_a_static_cache_writes_the_same_text(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    arguments = ("generate", model / "any", "--prompt", "the fox", "--max-new-tokens", 12, "--device", "cpu")
    texts = []
    for more in ((), ("--static-cache",), ("--static-cache", "--schedule", "split:4,4")):
        code, text, _ = run(capsys, *arguments, *more)
        assert code == 0
        texts.append(text)
    assert len(set(texts)) == 1


def test_generate_with_drafts_writes_the_same_text_and_reports(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    arguments = ("generate", model / "any", "--prompt", "the fox", "--max-new-tokens", 12)
    _, plain, silent = run(capsys, *arguments, "--precision", 4)
    code, out, err = run(capsys, *arguments, "--precision", 4, "--draft-precision", 2, "--draft-tokens", 3)
    assert (code, out) == (0, plain)
    assert "% accepted" in err
    assert "accepted" not in silent
    code, out, err = run(capsys, *arguments, "--schedule", "length:4,2@6")
    assert code == 0
    assert "5 at 4 bits" in err


def test_eval_writes_the_documented_json_and_a_plot(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    paths = ("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    arguments = ("eval", model / "any", "--text", model / "text.txt", "--seq-len", 64, "--max-tokens", 512)
    code, out, _ = run(capsys, *arguments, "--precisions", "2,4", "--reference", model / "float", *paths)
    assert code == 0
    assert "perplexity" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result) == {"model", "text", "text_tokens", "seq_len", "stride", "results", "reference"}
    assert (result["text"], result["stride"]) == ("text.txt", 64)
    assert set(result["reference"]) == {"perplexity", "weight_bytes"}
    assert [row["precision"] for row in result["results"]] == [2, 4]
    for row in result["results"]:
        assert set(row) == {
            "precision", "perplexity", "weight_bytes", "bits_per_weight", "kl_divergence", "top1_agreement"
        }  # fmt: skip
    assert result["results"][0]["kl_divergence"] > result["results"][1]["kl_divergence"] > 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert run(capsys, *arguments, "--json", tmp_path / "plain.json")[0] == 0
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert plain["reference"] is None
    assert [row["precision"] for row in plain["results"]] == [2, 3, 4]
    assert plain["results"][0]["kl_divergence"] is None


def test_inspect_counts_bytes(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "inspect", model / "any", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["method"] == "anybcq"
    assert facts["quantized_modules"] == 14
    run(capsys, "eval", model / "any", "--text", model / "text.txt", "--max-tokens", 64, "--json", tmp_path / "r.json")
    evaluated = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["weight_bytes"] for row in facts["precisions"]] == [row["weight_bytes"] for row in evaluated]
    assert [row["bits_per_weight"] for row in facts["precisions"]] == pytest.approx(
        [row["bits_per_weight"] for row in evaluated], abs=1e-4
    )
    code, out, _ = run(capsys, "inspect", model / "any")
    assert code == 0
    assert "bits/weight" in out


def test_bench_writes_one_json_object_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--shapes", "64x128", "--precisions", "2,3", "--rows", "1,3", "--rounds", 1, "--json", tmp_path / "b")
    code, out, _ = run(capsys, "bench", *arguments)
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "b").read_text().splitlines()]
    assert len(lines) == len(out.splitlines()) == 2 * 2 * 2
    assert {(line["method"], line["m"], line["precision"]) for line in lines} == {
        (method, m, p) for method in ("anybcq", "any-precision") for m in (1, 3) for p in (2, 3)
    }
    keys = {"shape", "m", "precision", "method", "backend", "us", "bytes"}
    keys |= {"gb_per_s", "bandwidth_share", "speedup_vs_bf16"}
    assert all(keys <= set(line) for line in lines)


def test_bench_with_activations_in_8_bits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.ACTIVATION_BITS, "16")
    arguments = ("--shapes", "64x512", "--precisions", "4", "--rows", "16", "--rounds", 1, "--json", tmp_path / "b")
    errors = {}
    for bits in (16, 8):
        cpu._activation_bits_by_environment.cache_clear()
        assert run(capsys, "bench", *arguments, "--activation-bits", bits)[0] == 0
        lines = [json.loads(line) for line in (tmp_path / "b").read_text().splitlines()]
        assert {line["activation_bits"] for line in lines} == {bits}
        errors[bits] = next(line["error"] for line in lines if line["method"] == "anybcq")
    monkeypatch.setenv(cpu.ACTIVATION_BITS, "12")
    cpu._activation_bits_by_environment.cache_clear()
    assert "ANYBITS_CPU_ACTIVATION_BITS=12 is not allowed: choose 16 or 8" in run(capsys, "bench", *arguments)[2]
    cpu._activation_bits_by_environment.cache_clear()
    assert native.library() is None or errors[16] < errors[8]


BAD = {
    "precisions '5-x' cannot be read": ("quantize", "{float}", "-o", "{out}", "--precisions", "5-x"),
    "out of range: 2 to 8 bits": ("quantize", "{float}", "-o", "{out}", "--precisions", "1-4"),
    "group size 100 does not fit": ("quantize", "{float}", "-o", "{out}", "--group-size", "100"),
    "method 'gptq' is unknown": ("quantize", "{float}", "-o", "{out}", "--method", "gptq"),
    "preset 'x' is unknown": ("quantize", "{float}", "-o", "{out}", "--preset", "x"),
    "device 'tpu' is unknown": ("quantize", "{float}", "-o", "{out}", "--preset", "fast", "--device", "tpu"),
    "nothing.txt does not exist": ("quantize", "{float}", "-o", "{out}", "--calibration", "nothing.txt"),
    "none does not exist: give a model's folder": ("quantize", "{out}/none", "-o", "{out}", "--preset", "fast"),
    "is a file: give the folder of the original": ("quantize", "{text}", "-o", "{out}"),
    "has no config.json: give the folder of the original": ("quantize", "{out}", "-o", "{out}"),
    "is a file: choose a folder for the result": ("quantize", "{float}", "-o", "{text}"),
    "precisions '4-2' run downwards: write 2-4": ("quantize", "{float}", "-o", "{out}", "--precisions", "4-2"),
    "symmetric belongs to": ("quantize", "{float}", "-o", "{out}", "--method", "any-precision", "--symmetric"),
    "scale_bits belongs to": ("quantize", "{float}", "-o", "{out}", "--method", "any-precision", "--scale-bits", "8"),
    "already holds a model": ("quantize", "{float}", "-o", "{any}", "--preset", "fast"),
    "Missing option": ("quantize", "{float}"),
    "precision 7 is not stored: choose one of 2, 3, 4": ("generate", "{any}", "--precision", "7", "--prompt", "a"),
    "schedule 'x' cannot be read": ("generate", "{any}", "--schedule", "x", "--prompt", "a"),
    "leave the precision out": ("generate", "{any}", "--precision", "2", "--schedule", "split:4,2", "--prompt", "a"),
    "4 is above the precision 2": ("generate", "{any}", "--precision", "2", "--draft-precision", "4", "--prompt", "a"),
    "device 'tpu7' is unknown": ("generate", "{any}", "--device", "tpu7", "--prompt", "a"),
    "the prompt is empty": ("generate", "{any}", "--precision", "2", "--prompt", ""),
    "is not quantized": ("generate", "{float}", "--prompt", "a"),
    "neither a model folder": ("generate", "{out}/none", "--prompt", "a"),
    "precision 5 is not stored": ("eval", "{any}", "--precisions", "5", "--text", "{text}"),
    "text file {out}/none does not exist": ("eval", "{any}", "--text", "{out}/none"),
    "sequence length 1 is too short": ("eval", "{any}", "--text", "{text}", "--seq-len", "1"),
    "stride 600 must be at least 1 and below": ("eval", "{any}", "--text", "{text}", "--stride", "600"),
    "there is no folder {out}/none": ("eval", "{any}", "--text", "{text}", "--json", "{out}/none/r.json"),
    "must be named .png or .svg or .pdf": ("eval", "{any}", "--text", "{text}", "--plot", "{out}/r.txt"),
    "--dataset NAME or --tasks": ("eval", "{any}", "--text", "{text}", "--dataset", "c4"),
    "has no config.json": ("inspect", "{text}/.."),
    "rows 'x' must be whole numbers": ("bench", "--rows", "x"),
    "shapes 'x' are unknown": ("bench", "--shapes", "x"),
    "7 is not allowed: choose 16 or 8": ("bench", "--activation-bits", "7"),
    "No such command": ("quantise",),
    "No such option": ("inspect", "{any}", "--jason"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, message: str
) -> None:
    places = {"float": model / "float", "any": model / "any", "out": tmp_path, "text": model / "text.txt"}
    code, out, err = run(capsys, *(part.format(**places) for part in BAD[message]))
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert message.format(**places) in err
    assert err.strip().count("\n") == 0
    assert "Traceback" not in err
