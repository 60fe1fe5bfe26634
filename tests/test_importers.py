"""Folders written by the two papers' own code: tests/data/README.md says how they were made."""

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from anybits import AnybitsError, bits
from anybits.checkpoint import CheckpointReader, checkpoint_files, read_stored_config
from anybits.integrations import transformers as hf
from anybits.integrations.importers import import_checkpoint, unpermute
from test_cli import run

DATA = Path(__file__).parent / "data"
SOURCES = ["anyprec", "anybcq"]
WEIGHTS = {"anyprec": "pytorch_model.bin", "anybcq": "model.safetensors"}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS[folder.name]
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / WEIGHTS[folder.name]
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a fixture that the test may damage."""
    return Path(shutil.copytree(DATA / request.param, tmp_path / request.param))


def dense(tensors: dict[str, torch.Tensor], module: str, p: int) -> torch.Tensor:
    """The source's formula, weight by weight, without any code of the importer: float32 [N, K]."""
    words = tensors[f"{module}.qweight"].long() & 0xFFFFFFFF
    if f"{module}.alpha_{p}" in tensors:
        groups, planes, rows = words.shape[0], words.shape[1], words.shape[2]
        bit = (words[:, None] >> torch.arange(32).view(1, 32, 1, 1)) & 1  # [K/32, 32, P, N]
        sign = (2 * bit - 1).view(groups * 32, planes, rows).double()
        alpha, beta = tensors[f"{module}.alpha_{p}"].double(), tensors[f"{module}.beta_{p}"].double()
        size = groups * 32 // alpha.shape[0]
        columns = [(sign[k, :p] * alpha[k // size]).sum(0) + beta[k // size] for k in range(len(sign))]
        return torch.stack(columns, 1).float()
    planes, rows, count = words.shape
    codes = torch.zeros(rows, count * 32, dtype=torch.long)
    for column in range(count * 32):  # fewer than 32 words here: byte `column // 8` goes round all threads
        byte, thread = column // 8 // count, column // 8 % count
        bit = (words[:p, :, thread] >> (8 * (3 - byte) + 7 - column % 8)) & 1
        codes[:, column] = sum(bit[i] << (p - 1 - i) for i in range(p))
    return tensors[f"{module}.lut{p}"].float().gather(1, codes)


@pytest.mark.parametrize("name", SOURCES)
def test_weights_are_the_source_formula(tmp_path: Path, name: str) -> None:
    """Equal to what the source's own code dequantizes, recorded as hashes by the code that made the fixture."""
    stored = import_checkpoint(DATA / name, tmp_path / "any")
    assert read_stored_config(tmp_path / "any") == stored
    reader = CheckpointReader(checkpoint_files(tmp_path / "any"), stored)
    expected = json.loads((DATA / name / "expected.json").read_text())
    tensors = tensors_of(DATA / name)
    assert {key.rpartition("/")[0] for key in expected} == set(reader.modules())
    for key, digest in expected.items():
        module, _, p = key.rpartition("/")
        columns = 96 if "down_proj" in module else 32
        weight = reader.read(module, columns, stored.precisions).dequantize(int(p))
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == digest
        assert torch.equal(weight, dense(tensors, module, int(p)))


@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_those_of_the_source_formula(tmp_path: Path, name: str) -> None:
    stored = import_checkpoint(DATA / name, tmp_path / "any")
    ours = hf.load_model(tmp_path / "any", dtype=torch.float32)
    tensors = tensors_of(DATA / name)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DATA / name), dtype=torch.float32).eval()
    ids = torch.arange(48).view(2, 24)
    for p in stored.precisions:
        state = {k: v.float() for k, v in tensors.items() if k in plain.state_dict()}
        state |= {f"{m}.weight": dense(tensors, m, p) for m in hf.plane_modules(ours)}
        missing, unexpected = plain.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= set(plain.all_tied_weights_keys)
        ours.set_precision(p)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [32, 1024, 1056, 2144])
def test_bytes_of_full_and_tail_warps(columns: int) -> None:
    cases = load_file(DATA / "anyprec_words.safetensors")
    straight = cases[f"bytes_{columns}"]
    expected = bits.pack((straight[..., None] >> torch.arange(7, -1, -1)).bitwise_and(1).flatten(-2).to(torch.uint8))
    for plane, wanted in zip(cases[f"words_{columns}"], expected, strict=True):
        assert torch.equal(unpermute(plane), wanted)


@pytest.mark.parametrize("source", ["anybcq"], indirect=True)
@pytest.mark.parametrize("group_size", [32, -1])
def test_zero_offsets_are_dropped(source: Path, tmp_path: Path, group_size: int) -> None:
    tensors = tensors_of(source)
    for key in tensors:
        if ".beta_" in key:
            tensors[key] = torch.zeros_like(tensors[key])
        if group_size == -1 and (".beta_" in key or ".alpha_" in key):
            tensors[key] = tensors[key][:1].contiguous()
    store(source, tensors)
    edit_config(source, lambda c: c["anybcq"].update(group_size=group_size))
    stored = import_checkpoint(source, tmp_path / "any")
    assert stored.symmetric is True
    reader = CheckpointReader(checkpoint_files(tmp_path / "any"), stored)
    assert not [name for name in reader.names() if "offsets" in name]
    module = "model.layers.1.mlp.down_proj"
    assert torch.equal(reader.read(module, 96, stored.precisions).dequantize(3), dense(tensors, module, 3))


@pytest.mark.parametrize("name", SOURCES)
def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    code, out, _ = run(capsys, "import", DATA / name, "-o", tmp_path / "any")
    assert code == 0
    assert "precisions" in out
    if (DATA / name / "tokenizer.json").exists():
        assert run(capsys, "generate", tmp_path / "any", "--prompt", "abc", "--max-new-tokens", 2)[0] == 0
    assert run(capsys, "import", DATA / name, "-o", tmp_path / "any")[0] == 1


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def section(config: dict) -> dict:
    return config.get("anyprec") or config["anybcq"]


BROKEN_CONFIGS = {
    "neither": lambda c: (c.pop("anyprec", None), c.pop("anybcq", None)),
    "seed 1": lambda c: section(c).update(seed_precision=1),
    "huge parent": lambda c: section(c).update(parent_precision=10**9),
    "text precision": lambda c: section(c).update(parent_precision="4"),
    "unknown model": lambda c: c.update(model_type="nonsense"),
    "other size": lambda c: c.update(hidden_size=64),
    "more layers": lambda c: c.update(num_hidden_layers=3),
    "fewer layers": lambda c: c.update(num_hidden_layers=1),
    "heads of text": lambda c: c.update(num_attention_heads="four"),
    "foreign code": lambda c: c.update(model_type="x", auto_map={"AutoConfig": "evil.Config"}),
}


@pytest.mark.parametrize("source", SOURCES, indirect=True)
@pytest.mark.parametrize("edit", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_wrong_configs_are_refused(source: Path, tmp_path: Path, edit: Callable[[dict], object]) -> None:
    edit_config(source, edit)
    with pytest.raises(AnybitsError):
        import_checkpoint(source, tmp_path / "any")
    assert not list(tmp_path.glob("any*.partial"))
    assert not (tmp_path / "any").exists()


def test_group_size_and_group_count_are_refused(tmp_path: Path) -> None:
    for name, change in (
        ("anyprec", {"group_count": 2}),
        ("anybcq", {"group_size": 48}),
        ("anybcq", {"group_size": 64}),
    ):
        folder = shutil.copytree(DATA / name, tmp_path / f"{name}{len(list(tmp_path.iterdir()))}")
        edit_config(folder, lambda c, change=change: section(c).update(change))
        with pytest.raises(AnybitsError):
            import_checkpoint(folder, tmp_path / "any")


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "anyprec", tmp_path / "anyprec")

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(AnybitsError, match="more than plain tensors"):
        import_checkpoint(folder, tmp_path / "any")
    assert not (tmp_path / "ran").exists()


def truncate(folder: Path, rng: random.Random) -> None:
    file = folder / WEIGHTS[folder.name]
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def flip_header(folder: Path, rng: random.Random) -> None:
    """Flip bytes where the structure is described: the safetensors header, or anywhere in a pickle's archive."""
    file = folder / WEIGHTS[folder.name]
    data = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0] if file.suffix == ".safetensors" else len(data)
    for _ in range(rng.choice((1, 1, 4))):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def flip_config(folder: Path, rng: random.Random) -> None:
    file = folder / "config.json"
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(7)
    file.write_bytes(data)


def retype(folder: Path, rng: random.Random) -> None:
    tensors = tensors_of(folder)
    name = rng.choice(sorted(tensors))
    dtypes = (torch.float64, torch.int64, torch.uint8, torch.bool, torch.int16, torch.float32)
    tensors[name] = tensors[name].to(rng.choice(dtypes))
    store(folder, tensors)


def reshape(folder: Path, rng: random.Random) -> None:
    tensors = tensors_of(folder)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    tensors[name] = rng.choice((t[:-1], t[None], t.flatten(), t[..., :0], torch.cat([t, t]), t.transpose(0, -1)))
    tensors[name] = tensors[name].contiguous()
    store(folder, tensors)


def rename(folder: Path, rng: random.Random) -> None:
    tensors = tensors_of(folder)
    name = rng.choice(sorted(tensors))
    moved = tensors.pop(name)
    if rng.random() < 0.5:
        tensors[name.replace(".", "_", 1)] = moved
    store(folder, tensors)


def poison(folder: Path, rng: random.Random) -> None:
    tensors = tensors_of(folder)
    name = rng.choice([n for n in sorted(tensors) if tensors[n].is_floating_point()])
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice((float("nan"), float("inf")))
    store(folder, tensors)


MUTATIONS = [truncate, flip_header, flip_header, flip_config, retype, reshape, rename, poison]


def test_500_mutated_sources(tmp_path: Path) -> None:
    """Either one AnybitsError, or a model whose every weight is the formula of the bytes that are there."""
    refused = imported = 0
    for seed in range(500):
        rng = random.Random(seed)
        folder = Path(shutil.copytree(DATA / SOURCES[seed % 2], tmp_path / f"{seed}" / SOURCES[seed % 2]))
        (folder / "tokenizer.json").unlink(missing_ok=True)  # reading it takes longer than all the rest
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        rng.choice(MUTATIONS)(folder, rng)
        out = tmp_path / f"{seed}" / "any"
        try:
            stored = import_checkpoint(folder, out)
        except AnybitsError:
            refused += 1
            assert not out.exists()
        else:
            imported += 1
            check_import(folder, out, stored.precisions)
        shutil.rmtree(tmp_path / f"{seed}")
    assert refused + imported == 500
    assert refused > 350


def check_import(folder: Path, out: Path, precisions: tuple[int, ...]) -> None:
    tensors = tensors_of(folder)
    reader = CheckpointReader(checkpoint_files(out), read_stored_config(out))
    modules = hf.plane_modules(hf.load_model(out))
    assert set(modules) == {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")}
    module = sorted(modules)[-1]
    for p in precisions:
        weight = reader.read(module, modules[module].in_features, precisions)
        assert torch.equal(weight.dequantize(p), dense(tensors, module, p))
