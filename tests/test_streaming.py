"""Streaming: one block in memory, killed and resumed runs, full disks, and the sensitivity measured block by block."""

import errno
import filecmp
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anybits import AnybitsError, DataAware, Recipe, checkpoint
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.integrations.lazy import load_lazily
from anybits.integrations.quantizing import estimate_model, quantize_model
from anybits.quantize import activations, anybcq, pipeline
from anybits.quantize.activations import Activations
from anybits.quantize.head import find_head
from anybits.quantize.sensitivity import Sensitivity
from anybits.quantize.source import Source
from anybits.quantize.targets import find_targets
from conftest import save_tiny, tiny_model

TEXT = ["the quick brown fox jumps over the lazy dog 0123456 " * 20]
SMALL = dict(group_size=32, precisions=(2, 3), samples=4, seq_len=16, rounds=2)
RECIPES = {
    "anybcq": Recipe(
        **SMALL, preset="best", steps=2, distillation_steps=2, data_aware=DataAware(descents=1, refit_sweeps=1)
    ),
    "any-precision": Recipe(**SMALL, method="any-precision", data_aware=DataAware(descents=1)),
}
WITH_8_BITS = RECIPES | {"anybcq in 8 bits": replace(RECIPES["anybcq"], scale_bits=8)}


def same_files(one: Path, other: Path) -> bool:
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    _, differing, unreadable = filecmp.cmpfiles(one, other, names, shallow=False)
    return not differing + unreadable


@pytest.mark.parametrize("architecture", ["llama", "llama-tied-bias", "gemma2", "opt", "qwen3-moe"])
def test_sensitivity_is_the_sum_of_squared_gradients(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny(tmp_path / "float", architecture)
    tokens = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    model = tiny_model(architecture)
    for lazy in (False, True):
        skeleton, weights = load_lazily(str(folder), tmp_path / "offload") if lazy else (model, None)
        swapping.run_experts_eagerly(skeleton)
        source = Source(skeleton, weights)
        targets = [find_targets(block) for block in source.blocks]
        measured = Sensitivity(source, targets, tokens, tmp_path / f"sums-{lazy}")
        if architecture == "qwen3-moe":  # as training may leave it: the balance of experts is no part of the sums
            skeleton.config.output_router_logits = True
        measured.measure(range(len(source.blocks)), lambda done, total: None)
        skeleton.config.output_router_logits = False
        model.zero_grad()
        expected: dict[str, torch.Tensor] = {}
        for window in tokens:
            model.zero_grad()
            model(input_ids=window[None], labels=window[None]).loss.backward()
            for name, p in model.named_parameters():
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                expected[name] = expected.get(name, 0) + gradient.square()
        for index in range(len(source.blocks)):
            found = measured.read(index)
            assert set(found) == {t.parameter for t in targets[index]}
            for name, sums in found.items():
                torch.testing.assert_close(sums, expected[f"{source.prefix}.{index}.{name}"], rtol=1e-4, atol=1e-10)
        model.zero_grad()
        assert all(p.requires_grad for p in model.parameters())
        assert not list((tmp_path / f"sums-{lazy}").glob("*.activations"))


def test_weights_are_in_memory_only_while_their_block_is_at_work(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "float", "llama", torch.bfloat16)
    model, weights = load_lazily(str(folder), tmp_path / "offload")
    source = Source(model, weights)
    reference = hf.load_float_model(str(folder)).state_dict()

    def resident() -> set[str]:
        return {name.split(".")[2] for name, p in model.named_parameters() if ".mlp." in name and not p.is_meta}

    def held() -> int:
        return len(resident())

    before = held()
    with source.block(1) as block:
        assert "1" in resident()
        assert torch.equal(block.mlp.up_proj.weight, reference["model.layers.1.mlp.up_proj.weight"])
    assert held() == before
    alive = []
    hook = source.blocks[1].register_forward_hook(lambda *_: alive.append(resident()))
    with source.running() as running, torch.no_grad():
        logits = running(input_ids=torch.tensor([[5, 9, 33]])).logits
    hook.remove()
    assert alive == [{"1"}]
    assert held() == before
    with torch.no_grad():
        assert torch.equal(logits, hf.load_float_model(str(folder))(input_ids=torch.tensor([[5, 9, 33]])).logits)
    assert not (tmp_path / "offload").exists() or not any((tmp_path / "offload").iterdir())


def test_activations_in_files_are_those_in_memory(tmp_path: Path) -> None:
    batches = [torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    kept = Activations.in_folder(tmp_path, iter(batches))
    assert len(kept) == 4
    assert all(torch.equal(a, b) for a, b in zip(kept, batches, strict=True))
    assert torch.equal(kept[3], batches[3])
    assert list(tmp_path.iterdir()) == []  # nothing to sweep up after a kill
    Activations.named(tmp_path / "x.activations", iter(batches))
    again = Activations.opened(tmp_path / "x.activations")
    assert len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(again, batches, strict=True))
    with pytest.raises(IndexError):
        again[4]


@pytest.mark.parametrize("method", RECIPES)
def test_a_lazily_read_model_with_spilled_activations_gives_the_same_bytes(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "float", "llama")
    quantize_model(str(source), tmp_path / "memory", RECIPES[method], TEXT)
    monkeypatch.setattr(activations, "IN_MEMORY", 0)
    monkeypatch.setattr(pipeline, "REST_BYTES", 1)
    quantize_model(str(source), tmp_path / "files", RECIPES[method], TEXT)
    for block in sorted((tmp_path / "memory").glob("model-block-*")):
        assert filecmp.cmp(block, tmp_path / "files" / block.name, shallow=False)
    tokens = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        one, other = (hf.load_model(tmp_path / name)(input_ids=tokens).logits for name in ("memory", "files"))
    assert torch.equal(one, other)
    assert len(list((tmp_path / "files").glob("model-rest*"))) > 1


@pytest.mark.parametrize("method", WITH_8_BITS)
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(tmp_path: Path, method: str) -> None:
    recipe = WITH_8_BITS[method]
    source = save_tiny(tmp_path / "float", "llama")
    out, moments, kills = tmp_path / "killed" / "model", random.Random(0), 0
    started = time.monotonic()
    quantize_model(str(source), tmp_path / "whole" / "model", recipe, TEXT)
    seconds = time.monotonic() - started
    for _ in range(10):
        child = os.fork()  # costs no imports
        if child == 0:  # pragma: no cover
            try:
                quantize_model(str(source), out, recipe, TEXT)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 0.3 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
    assert kills >= 3
    if (out / pipeline.STATE_FILE).exists() or not out.exists():
        quantize_model(str(source), out, recipe, TEXT)
    assert same_files(tmp_path / "whole" / "model", out)


@pytest.mark.parametrize("method", RECIPES)
def test_a_full_disk_is_one_sentence_and_the_run_resumes(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "float", "llama")
    quantize_model(str(source), tmp_path / "whole" / "model", RECIPES[method], TEXT)
    real, room = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    for files in (0, 2):
        room = files
        with pytest.raises(AnybitsError, match="no space left in .* the same command resumes"):
            quantize_model(str(source), tmp_path / "full" / "model", RECIPES[method], TEXT)
        assert not list((tmp_path / "full").rglob("*.partial"))
    room = 1000
    quantize_model(str(source), tmp_path / "full" / "model", RECIPES[method], TEXT)
    assert same_files(tmp_path / "whole" / "model", tmp_path / "full" / "model")


def test_out_of_memory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(anybcq, "quantize_matrix", fail)
            with pytest.raises(AnybitsError, match="out of memory: fewer --samples .* the same command resumes"):
                quantize_model(str(llama_folder), tmp_path / "out", RECIPES["anybcq"], TEXT)
    quantize_model(str(llama_folder), tmp_path / "out", RECIPES["anybcq"], TEXT)
    assert hf.load_model(tmp_path / "out")


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path, llama_folder: Path) -> None:
    out = tmp_path / "interrupted" / "model"

    def interrupt(report: pipeline.BlockReport) -> None:
        raise KeyboardInterrupt

    stop = pipeline.Progress(block_done=interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(str(llama_folder), out, RECIPES["anybcq"], TEXT, progress=stop)
    quantize_model(str(llama_folder), tmp_path / "whole" / "model", RECIPES["anybcq"], TEXT)
    quantize_model(str(llama_folder), out, RECIPES["anybcq"], TEXT)
    assert same_files(tmp_path / "whole" / "model", out)


@pytest.mark.parametrize("changed", ["model", "text", "recipe", "version"])
def test_a_run_with_another_fingerprint_is_refused(
    tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anybits

    source, recipe, text = save_tiny(tmp_path / "float", "llama"), RECIPES["anybcq"], TEXT
    stop = pipeline.Progress(block_done=lambda report: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_model(str(source), tmp_path / "out", recipe, text, progress=stop)
    if changed == "model":
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[-1].add_(1e-3)  # far from the first elements
            model.save_pretrained(source)
    elif changed == "text":
        text = [TEXT[0][::-1]]
    elif changed == "recipe":
        recipe = Recipe(**SMALL | {"rounds": 3}, preset="best", steps=2, distillation_steps=2)
    else:
        monkeypatch.setattr(anybits, "__version__", "0.0.0")
    with pytest.raises(AnybitsError, match="unfinished run with another model, data, settings or version"):
        quantize_model(str(source), tmp_path / "out", recipe, text)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied-bias", "gemma2", "opt"])
@pytest.mark.parametrize("method", RECIPES)
def test_the_head_is_quantized_when_it_is_wanted(tmp_path: Path, method: str, architecture: str) -> None:
    source = save_tiny(tmp_path / "float", architecture)
    plain = Recipe(**SMALL, method=method, data_aware=DataAware(descents=1))
    quantize_model(str(source), tmp_path / "plain", plain, TEXT)
    quantize_model(str(source), tmp_path / "head", replace(plain, quantize_lm_head=True), TEXT)
    without, model = hf.load_model(tmp_path / "plain"), hf.load_model(tmp_path / "head")
    modules = swapping.plane_modules(model)
    assert set(modules) - set(swapping.plane_modules(without)) == {"lm_head"}
    name = find_embedding(model)
    assert torch.equal(model.get_parameter(name), without.get_parameter(name))
    tokens = torch.tensor([[5, 9, 33, 7, 12]])
    inputs: list[torch.Tensor] = []
    hook = without.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        without(input_ids=tokens, logits_to_keep=0)
        hook.remove()
        expected = inputs[0] @ modules["lm_head"].plane_weight.dequantize(3).T
        logits = model(input_ids=tokens).logits
    if architecture == "gemma2":
        expected = 30 * torch.tanh(expected / 30)
    torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(AnybitsError, match="no linear output layer"):
        find_head(torch.nn.Sequential(torch.nn.Linear(3, 3)))


def find_embedding(model: torch.nn.Module) -> str:
    return next(name for name, _ in model.named_parameters() if name.endswith("embed_tokens.weight"))


@pytest.mark.parametrize(
    ("method", "architecture"), [*((name, "llama") for name in WITH_8_BITS), ("anybcq", "qwen3-moe")]
)
def test_a_dry_run_knows_the_result_and_writes_nothing(tmp_path: Path, method: str, architecture: str) -> None:
    source = save_tiny(tmp_path / "float", architecture)
    recipe = replace(WITH_8_BITS[method], quantize_lm_head=True)
    before = sorted(tmp_path.rglob("*"))
    found = estimate_model(str(source), recipe)
    assert sorted(tmp_path.rglob("*")) == before
    assert min(found.seconds.values()) > 0
    assert ("sensitivities" in found.seconds) == (method == "any-precision")
    quantize_model(str(source), tmp_path / "out", recipe, TEXT)
    stored = checkpoint.CheckpointReader(
        checkpoint.checkpoint_files(tmp_path / "out"), hf.stored_config(tmp_path / "out")
    )
    assert found.disk["result"] == sum(stored.stored_bytes(name) for name in stored.names())
