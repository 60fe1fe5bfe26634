"""Per-layer profiles: what they mean, that rows may mix them with precisions, and the life of one in a checkpoint."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import anybits
from anybits import AnybitsError, Recipe, checkpoint
from anybits.config import StoredConfig, parse_precision, parse_singles
from anybits.evaluate import profiling, sensitivity
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.integrations.model_card import with_table
from anybits.precision import FIRST_PROFILE, ModelPrecision
from anybits.quantize import allocation
from conftest import save_tiny
from test_cli import run

TOKENS = torch.tensor([[5, 9, 33, 7, 12, 40, 8, 21]])
TEXT = "the quick brown fox jumps over the lazy dog 0123456 " * 40


def with_profiles(folder: Path, names: tuple[str, ...] = ("2.5", "small")) -> StoredConfig:
    """Give every module of the checkpoint a precision under each name, in a pattern of its own."""
    stored = checkpoint.read_stored_config(folder)
    modules = checkpoint.CheckpointReader(checkpoint.checkpoint_files(folder), stored).modules()
    profiles = {n: {m: 2 + (i * (k + 1) + k) % 3 for i, m in enumerate(modules)} for k, n in enumerate(names)}
    stored = replace(stored, profiles=profiles)
    checkpoint.update_stored_config(folder, stored)
    return stored


def made(folder: Path, architecture: str = "llama") -> Path:
    save_tiny(folder / "float", architecture)
    (folder / "text.txt").write_text(TEXT)
    anybits.quantize(str(folder / "float"), folder / "any", Recipe(preset="fast", group_size=32, precisions=(2, 3, 4)))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def folder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the profiles 2.5 and small."""
    copy = tmp_path_factory.mktemp("profiled") / "any"
    shutil.copytree(plain / "any", copy)
    with_profiles(copy)
    return copy


@contextmanager
def by_hand(model: torch.nn.Module, wanted: dict[str, int | torch.Tensor]) -> Iterator[None]:
    """Give every layer its own precision, with no profile and no table involved."""
    modules = hf.plane_modules(model)
    before = {name: (m.default, m.profiles) for name, m in modules.items()}
    for name, module in modules.items():
        module.default, module.profiles = ModelPrecision(wanted[name]), {}
    yield
    for name, module in modules.items():
        module.default, module.profiles = before[name]


def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_a_profile_is_every_layer_set_by_hand(tmp_path: Path, architecture: str) -> None:
    stored = with_profiles(made(tmp_path, architecture) / "any")
    model = hf.load_model(tmp_path / "any")
    for name, profile in stored.profiles.items():
        with by_hand(model, dict(profile)):
            expected = logits(model)
        with anybits.precision(name):
            assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(model), expected)
        model.set_precision(name)
        assert torch.equal(logits(model), expected)
        model.set_precision(4)


def test_rows_may_mix_profiles_and_precisions(folder: Path) -> None:
    model, stored = hf.load_model(folder), checkpoint.read_stored_config(folder)
    mix = [4, "2.5", 2, "small", 2.5]
    codes = model.precision_codes(mix)
    assert codes.tolist() == [4, FIRST_PROFILE, 2, FIRST_PROFILE + 1, FIRST_PROFILE]
    named = [parse_precision(value) for value in mix]
    rows = {
        m: torch.tensor([v if isinstance(v, int) else stored.profiles[v][m] for v in named], dtype=torch.int32)
        for m in hf.plane_modules(model)
    }
    batch = torch.randint(4, 64, (len(mix), 7), generator=torch.Generator().manual_seed(0))
    with by_hand(model, rows):
        expected = logits(model, batch)
    with anybits.precision(codes):
        assert torch.equal(logits(model, batch), expected)
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    together = model.generate(input_ids=batch, precision=mix, **settings)
    for row, value in enumerate(mix):
        alone = model.generate(input_ids=batch[row : row + 1], precision=value, **settings)
        assert torch.equal(together[row], alone[0])


def test_unknown_profiles_and_codes_are_refused_with_what_is_allowed(folder: Path) -> None:
    model = hf.load_model(folder)
    allowed = "is not stored: choose one of 2, 2.5, 3, 4, small"
    for bad in ("2.7", 2.7, 5, [2, "x"], torch.tensor([2, FIRST_PROFILE + 2])):
        with pytest.raises(AnybitsError, match=allowed):
            model.generate(input_ids=TOKENS.repeat(2, 1), max_new_tokens=2, precision=bad)
        with pytest.raises(AnybitsError, match=allowed):
            model.set_precision(bad)
    with pytest.raises(AnybitsError, match=allowed), anybits.precision("2.7"):
        logits(model)
    for code in (FIRST_PROFILE + 2, -1, 1000):
        with (
            pytest.raises(AnybitsError, match="stored precisions or 16 to 17 for profiles"),
            anybits.precision(torch.tensor([code], dtype=torch.int32)),
        ):
            logits(model)
    for bad in (True, "", "2-3", None, -1.0, "a b"):
        with pytest.raises(AnybitsError, match="cannot be read"), anybits.precision(bad):
            pass


def test_precisions_have_one_form() -> None:
    assert [parse_precision(v) for v in (3, 3.0, "3", "3.0", " 3 ")] == [3] * 5
    assert [parse_precision(v) for v in (2.5, "2.5", "2.50")] == ["2.5"] * 3
    assert parse_singles("small,2-4, 2.5,2.25") == (2, "2.25", "2.5", 3, 4, "small")


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], "profiles .* must be an object"),
        ({"3": {"a": 2}}, "profile name '3' does not fit"),
        ({"3.0": {"a": 2}}, "does not fit"),
        ({"auto": {"a": 2}}, "does not fit"),
        ({"a b": {"a": 2}}, "does not fit"),
        ({"2.50": {"a": 2}}, "does not fit"),
        ({"2.5": {}}, "profile 2.5 must be an object of module names and precisions"),
        ({"2.5": 3}, "profile 2.5 must be an object"),
        ({"2.5": {"a": 5}}, "profile 2.5 gives a the precision 5: choose one of 2, 3, 4"),
        ({"2.5": {"a": "3"}}, "gives a the precision '3'"),
        ({"2.5": {"a": [3]}}, "gives a the precision"),
    ],
)
def test_unreadable_profiles_are_refused(profiles: object, message: str) -> None:
    plain = {"quant_method": "anybits", "method": "anybcq", "precisions": [2, 3, 4], "targets": ["a"]}
    plain |= {"group_size": 32, "format_version": 1}
    assert "profiles" not in StoredConfig.from_dict(plain).to_dict()  # as every checkpoint before profiles
    with pytest.raises(AnybitsError, match=message):
        StoredConfig.from_dict(plain | {"profiles": profiles})


def test_a_profile_must_name_the_quantized_modules_and_no_others(tmp_path: Path, folder: Path) -> None:
    for change, message in (("drop", "lacks"), ("add", "names other: it is no quantized module")):
        shutil.copytree(folder, tmp_path / change)
        config = json.loads((tmp_path / change / "config.json").read_text())
        profile = config["quantization_config"]["profiles"]["2.5"]
        profile.popitem() if change == "drop" else profile.update({"other": 2})
        (tmp_path / change / "config.json").write_text(json.dumps(config))
        with pytest.raises(AnybitsError, match=f"profile 2.5 {message}"):
            hf.load_model(tmp_path / change)


def test_profiles_survive_saving_and_a_lower_maximum(tmp_path: Path, folder: Path) -> None:
    stored = checkpoint.read_stored_config(folder)
    low = {m: min(p, 3) for m, p in stored.profiles["2.5"].items()}
    shutil.copytree(folder, tmp_path / "any")
    checkpoint.update_stored_config(tmp_path / "any", replace(stored, profiles=dict(stored.profiles) | {"low": low}))
    whole, small = hf.load_model(tmp_path / "any"), hf.load_model(tmp_path / "any", max_precision="low")
    assert (small.precisions, small.profiles) == ((2, 3), ("low",))
    assert small.anybits_bytes_read < whole.anybits_bytes_read
    whole.save_pretrained(tmp_path / "again")
    again = hf.load_model(tmp_path / "again")
    assert again.profiles == whole.profiles == ("2.5", "low", "small")
    with anybits.precision("low"):
        assert torch.equal(logits(small), logits(whole))
        assert torch.equal(logits(again), logits(whole))
    facts = swapping.weight_facts(whole)
    modules = hf.plane_modules(whole)
    assert facts["low"][0] == sum(m.plane_weight.weight_bytes(low[name]) for name, m in modules.items())


def test_the_divergence_is_that_of_coarse_distributions(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "TOP", 5)
    model = hf.load_model(plain / "any", dtype=torch.float32)
    tokens = torch.randint(4, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    loss = sensitivity.Divergence(model, tokens, batch=2)
    everything = dict.fromkeys(hf.plane_modules(model), 4)
    assert loss.parts == 2
    assert loss(everything) == pytest.approx(0, abs=1e-9)
    total = 0.0
    with anybits.precision(4):
        wanted = logits(model, tokens).double().softmax(-1)
    with anybits.precision(2):
        found = logits(model, tokens).double().softmax(-1)
    for p, q in zip(wanted.view(-1, 64), found.view(-1, 64), strict=True):
        top = p.argsort(descending=True)[:5]
        p, q = torch.cat([p[top], 1 - p[top].sum()[None]]), torch.cat([q[top], 1 - q[top].sum()[None]])
        total += float((p * (p / q).log()).sum()) / tokens.numel()
    assert loss(dict.fromkeys(everything, 2)) == pytest.approx(total, rel=1e-3)
    assert loss(dict.fromkeys(everything, 2), 1) != loss(dict.fromkeys(everything, 2), 0)


def test_the_command_stores_profiles_that_every_command_knows(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = tmp_path / "any", plain / "text.txt"
    shutil.copytree(plain / "any", model)
    arguments = ("profile", model, "--text", text, "--samples", 4, "--seq-len", 32, "--generations", 2)
    code, out, _ = run(capsys, *arguments, "--budgets", "2.5,small=2.25")
    assert code == 0
    assert "sensitivities: 14/14" in out
    again = run(capsys, *arguments, "--budgets", "2.5,3.5")[1]
    assert "sensitivities" not in again  # measured once
    assert "profile 2.5" in again.splitlines()[0]
    assert "found before" in again.splitlines()[0]
    stored = checkpoint.read_stored_config(model)
    assert stored.singles == (2, "2.5", 3, "3.5", 4, "small")
    facts = json.loads(run(capsys, "inspect", model, "--json")[1])
    sizes = {p["precision"]: p["weight_bytes"] for p in facts["precisions"]}
    for profile, share in zip(facts["profiles"], (0.5, 1.5, 0.25), strict=True):
        low = 2 + int(share)
        budget = sizes[low] + share % 1 * (sizes[low + 1] - sizes[low])
        assert profile["weight_bytes"] <= budget
        assert profile["effective_bits"] <= 2 + share
    assert "effective" in run(capsys, "inspect", model)[1]
    assert "| 2.5 |" in (model / "README.md").read_text()
    run(capsys, "eval", model, "--text", text, "--precisions", "2,2.5,3", "--json", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [r["precision"] for r in results] == [2, "2.5", 3]
    assert results[1]["weight_bytes"] == facts["profiles"][0]["weight_bytes"]
    assert run(capsys, "generate", model, "--precision", "2.5", "--prompt", "the", "--max-new-tokens", 3)[0] == 0
    assert run(capsys, "export", model, "--precision", "small", "-o", tmp_path / "dense")[0] == 0
    dense, loaded = hf.load_float_model(str(tmp_path / "dense"), dtype=torch.float32), hf.load_model(model)
    for name, module in hf.plane_modules(loaded).items():
        expected = module.plane_weight.dequantize(stored.profiles["small"][name]).bfloat16()
        assert torch.equal(dense.get_submodule(name).weight.bfloat16(), expected)


def test_a_run_that_was_stopped_goes_on_and_finds_the_same(plain: Path, tmp_path: Path) -> None:
    settings = profiling.Settings(samples=2, seq_len=32)
    for name in ("whole", "cut"):
        shutil.copytree(plain / "any", tmp_path / name)
    text = str(plain / "text.txt")
    whole = profiling.profile_model(tmp_path / "whole", text, {"2.5": 2.5}, settings)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiling.profile_model(
            tmp_path / "cut", text, {"2.5": 2.5}, settings, progress=profiling.Progress(sensitivities=stop)
        )
    counts: list[int] = []
    progress = profiling.Progress(sensitivities=lambda done, total: counts.append(done))
    resumed = profiling.profile_model(tmp_path / "cut", text, {"2.5": 2.5}, settings, progress=progress)
    assert counts[0] == 6
    assert resumed == whole
    assert checkpoint.read_stored_config(tmp_path / "cut") == checkpoint.read_stored_config(tmp_path / "whole")
    assert whole[0].loss <= whole[0].knapsack_loss
    (tmp_path / "cut" / profiling.SENSITIVITIES).write_text('{"made": ')
    assert profiling.profile_model(tmp_path / "cut", text, {"2.6": 2.6}, settings)[0].name == "2.6"


def test_budgets_are_read_and_refused(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profiling.parse_budgets("2.25, a=2.3") == {"2.25": 2.25, "a": 2.3}
    assert list(profiling.default_budgets((2, 3, 4))) == ["2.25", "2.5", "2.75", "3.25", "3.5", "3.75"]
    bad = {"x": "budget 'x' cannot be read", "3": "profile name 3 does not fit", "9.5": "out of range"}
    bad |= {"auto=2.5": "does not fit", "4=2.5": "does not fit", "nan": "cannot be read"}
    for budgets, message in bad.items():
        arguments = ("profile", plain / "any", "--text", plain / "text.txt", "--budgets", budgets)
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert message in err, err
        assert err.strip().count("\n") == 0
    assert checkpoint.read_stored_config(plain / "any").profiles == {}


def test_a_model_card_gets_its_table_anew() -> None:
    facts: dict[int | str, tuple[int, int]] = {2: (1000, 4000), "2.5": (1250, 4000)}
    once = with_table("# A\n\nMy own words.\n", facts)
    assert "My own words." in once
    assert once.count("| 2.5 |") == 1
    twice = with_table(once + "\nMore words.\n", facts | {3: (1500, 4000)})
    assert twice.count("| 2.5 |") == 1
    assert "| 3 |" in twice
    assert twice.endswith("\nMore words.\n")
    assert allocation.total_bytes({"a": 2}, {"a": {2: 7}}) == 7
