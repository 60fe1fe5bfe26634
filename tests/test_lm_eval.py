"""lm-eval on the planes gives what lm-eval gives on the dense export of the same precision."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'anybits[eval]'")

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import anybits
from anybits import AnybitsError, Recipe
from anybits.integrations.exporting import export_model
from anybits.integrations.lm_eval import run_tasks
from conftest import save_tiny
from test_cli import run

CHOICE = """task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
GENERATE = """task: own_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} "
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match}}
  - {{metric: chrf}}
"""
PERPLEXITY = """task: own_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
PRECISIONS = (2, 3, 4)
TASKS = ("own_choice", "own_generate", "own_perplexity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, quantized with AnyBCQ, and three tasks over one data file."""
    where = tmp_path_factory.mktemp("lm-eval")
    save_tiny(where / "float", "llama")
    anybits.quantize(str(where / "float"), where / "any", Recipe(preset="fast", group_size=32))
    (where / "tasks").mkdir()
    words = ("the quick brown fox", "jumps over", "the lazy dog", "a b c d", "bits and planes", "no one knows")
    rows = [
        {"question": w, "choices": [w[::-1], w.upper(), "x y z"], "answer": i % 3, "text": f"{w} again"}
        for i, w in enumerate(words * 2)
    ]
    (where / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in zip(TASKS, (CHOICE, GENERATE, PERPLEXITY), strict=True):
        (where / "tasks" / f"{name}.yaml").write_text(text.format(data=where / "data.jsonl"))
    return where


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_planes_and_dense_export_agree(
    folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYBITS_BACKEND", "reference")  # a perplexity of 1e9 magnifies a kernel's 1e-4
    model = folder / "any"
    if method != "anybcq":
        model = tmp_path / "any"
        recipe = Recipe(method=method, samples=4, seq_len=32, precisions=PRECISIONS)
        anybits.quantize(str(folder / "float"), model, recipe, str(folder / "data.jsonl"))
    ours = run_tasks(model, TASKS, PRECISIONS, folder / "tasks", dtype=torch.float32)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    for p in PRECISIONS:
        export_model(model, tmp_path / f"dense{p}", p, "float32")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / f"dense{p}")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"dense{p}")
        wanted = lm_eval.simple_evaluate(
            model=HFLM(pretrained=dense, tokenizer=tokenizer),
            tasks=list(TASKS),
            task_manager=manager,
            bootstrap_iters=0,
        )["results"]
        for task in TASKS:
            assert ours[p][task]
            for metric, value in ours[p][task].items():
                key = metric if "," in metric else f"{metric},none"
                assert value == pytest.approx(wanted[task].get(key, wanted[task].get(metric)), rel=1e-4)
    assert len({str(ours[p]["own_perplexity"]) for p in PRECISIONS}) == len(PRECISIONS)


def test_command(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    arguments = ("--tasks", "own_choice", "--include-path", folder / "tasks", "--limit", 3, "--precisions", "2-3")
    code, out, _ = run(capsys, "eval", folder / "any", *arguments, "--json", tmp_path / "r.json")
    assert code == 0
    assert "acc_norm" in out
    assert set(json.loads((tmp_path / "r.json").read_text())["results"]) == {"2", "3"}


def test_unknown_tasks_get_one_sentence(folder: Path) -> None:
    with pytest.raises(AnybitsError, match="no task 'own_choic'.*own_choice"):
        run_tasks(folder / "any", ["own_choic"], (2,), folder / "tasks")
