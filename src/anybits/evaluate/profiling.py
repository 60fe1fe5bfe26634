"""Find per-layer profiles for budgets of bytes and store them in the checkpoint: what `anybits profile` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from anybits import checkpoint
from anybits.config import Single, StoredConfig, check_profile_name, parse_precision
from anybits.errors import AnybitsError
from anybits.evaluate.inspection import module_bytes
from anybits.evaluate.sensitivity import Divergence, measure_changes
from anybits.integrations import transformers as hf
from anybits.integrations.model_card import with_table
from anybits.quantize import allocation
from anybits.quantize.allocation import Changes, Profile
from anybits.quantize.calibration import Calibration, read_texts, sample_windows
from anybits.quantize.profile_search import Search, refine

SENSITIVITIES = "sensitivities.json"
"""File of the checkpoint's folder that keeps what was measured, so that another budget costs only its search."""

STEP = 0.25
"""Bits between the budgets of `default_budgets`."""


@dataclass(frozen=True)
class Settings:
    """How sensitivities and profiles are measured: `samples` windows of `seq_len` tokens, and the search."""

    samples: int = 16
    seq_len: int = 512
    seed: int = 0
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        """Raise AnybitsError naming the first setting that is out of range."""
        for name, value, least in (("samples", self.samples, 1), ("seq_len", self.seq_len, 2)):
            if value < least:
                raise AnybitsError(f"{name} is {value}: it must be a whole number of at least {least}")
        if self.search.generations < 0:
            raise AnybitsError(f"generations is {self.search.generations}: it must not be negative")


@dataclass(frozen=True)
class Found:
    """A profile: its budget and its own bytes, the loss of the knapsack's solution and after the search.

    Losses are mean divergences a token, in nats; kept: it was found by an earlier run with the same settings.
    """

    name: str
    bits: float
    budget_bytes: int
    weight_bytes: int
    knapsack_loss: float
    loss: float
    kept: bool = False


@dataclass(frozen=True)
class Progress:
    """Callbacks: sensitivities(done, total) in modules, searching(name, done, total) in generations, found(Found)."""

    sensitivities: Callable[[int, int], None] = lambda done, total: None
    searching: Callable[[str, int, int], None] = lambda name, done, total: None
    found: Callable[[Found], None] = lambda found: None


def default_budgets(precisions: tuple[int, ...]) -> dict[str, float]:
    """Return name -> bits for every quarter of a bit between the lowest and the highest precision, not whole ones."""
    quarters = range(round(precisions[0] / STEP), round(precisions[-1] / STEP) + 1)
    return {f"{i * STEP:g}": i * STEP for i in quarters if (i * STEP) % 1}


def parse_budgets(text: str) -> dict[str, float]:
    """Read "2.25,2.5,laptop=2.3" as name -> bits; raise AnybitsError for what is neither."""
    budgets: dict[str, float] = {}
    for part in text.split(","):
        name, _, bits = part.strip().rpartition("=")
        try:
            value = float(bits)
        except ValueError:
            raise AnybitsError(f"budget '{part.strip()}' cannot be read: write bits as 2.5, or NAME=BITS") from None
        named = parse_precision(name or value)
        check_profile_name(named)
        budgets[str(named)] = value
    return budgets


def profile_model(
    folder: str | Path,
    text: str,
    budgets: Mapping[str, float] | None = None,
    settings: Settings | None = None,
    reference: str | None = None,
    progress: Progress | None = None,
) -> list[Found]:
    """Find a profile for each of `budgets` (name -> bits) and store it in the checkpoint `folder`.

    text: a calibration text file or dataset, never the text that the model is judged by; reference: the float
    model to stay close to, else the highest stored precision. Each profile is stored as soon as it is found, and
    what was measured before with the same text and settings is not measured again. Raises AnybitsError for budgets
    outside of the stored precisions.
    """
    settings, progress, path = settings or Settings(), progress or Progress(), Path(folder)
    stored = checkpoint.read_stored_config(path)
    reader = checkpoint.CheckpointReader(checkpoint.checkpoint_files(path), stored)
    sizes = module_bytes(reader)
    budgets = default_budgets(stored.precisions) if budgets is None else budgets
    for name, bits in budgets.items():
        check_profile_name(name)
        allocation.neighbours(bits, stored.precisions)
    encode = hf.encoder(hf.load_tokenizer(path))
    windows = sample_windows(read_texts(text), encode, settings.samples, settings.seq_len, settings.seed, text)
    made = _provenance(reader, windows, settings, reference)
    model = hf.load_model(path)
    original = None if reference is None else hf.load_float_model(reference)
    loss = Divergence(model, windows.tokens, original)
    changes = _sensitivities(path / SENSITIVITIES, made, loss, stored, sizes, progress)
    weights = {name: m.in_features * m.out_features for name, m in hf.plane_modules(model).items()}
    results = []
    for name, bits in budgets.items():
        about = made | {"bits": bits, "seed": settings.seed, "search": asdict(settings.search)}
        found = _stored_before(stored, name, about)
        if found is None:
            found, profile = _find(name, bits, changes, sizes, loss, settings, progress)
            stored = _with_profile(stored, name, profile, about | {"found": asdict(found)})
            _save(path, stored, sizes, sum(weights.values()))
        progress.found(found)
        results.append(found)
    return results


def _provenance(
    reader: checkpoint.CheckpointReader, windows: Calibration, settings: Settings, reference: str | None
) -> dict[str, Any]:
    """Return what sensitivities depend on."""
    tokens = {"source": windows.source, "sha256": windows.sha256, "tokens": windows.tokens.numel()}
    return {"calibration": tokens, "reference": reference, "weights": reader.fingerprint()}


def _sensitivities(
    file: Path,
    made: dict[str, Any],
    loss: Divergence,
    stored: StoredConfig,
    sizes: allocation.Sizes,
    progress: Progress,
) -> Changes:
    """Return the changes of the loss, from `file` as far as they are there for the same text and weights."""
    known: dict[str, dict[tuple[int, int], float]] = {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["made"] == made:
            for module, steps in kept["changes"].items():
                pairs = {key: key.split(">") for key in steps}
                known[module] = {(int(rest), int(own)): float(steps[key]) for key, (rest, own) in pairs.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        known = {}  # a file from elsewhere, or cut off: it is only a memory of measurements, and they are made again

    def keep(module: str, found: dict[tuple[int, int], float]) -> None:
        known[module] = found
        changes = {m: {f"{rest}>{own}": value for (rest, own), value in each.items()} for m, each in known.items()}
        checkpoint.write_json(file, {"made": made, "changes": changes})

    def first_part(profile: Mapping[str, int]) -> float:
        # These losses, four and more for each matrix, are what takes the time, and a divergence needs little text;
        # what single changes do not tell is how they interact, and that the search sees on all of it.
        return loss(profile, 0)

    modules = dict.fromkeys(sizes, stored.precisions)
    return measure_changes(first_part, modules, dict(known), keep, progress.sensitivities)


def _find(
    name: str,
    bits: float,
    changes: Changes,
    sizes: allocation.Sizes,
    loss: Divergence,
    settings: Settings,
    progress: Progress,
) -> tuple[Found, Profile]:
    budget, costs = allocation.budget_bytes(sizes, bits), allocation.estimated_costs(changes, bits)
    start = allocation.allocate(costs, sizes, budget)

    def searching(done: int, total: int) -> None:
        progress.searching(name, done, total)

    before = loss(start)
    profile, after = refine(
        start, costs, sizes, budget, loss, loss.parts, settings.search, settings.seed, progress=searching
    )
    return Found(name, bits, budget, allocation.total_bytes(profile, sizes), before, after), profile


def _with_profile(stored: StoredConfig, name: str, profile: Profile, about: dict[str, Any]) -> StoredConfig:
    told = dict(stored.recipe.get("profiles", {})) | {name: about}
    recipe = dict(stored.recipe) | {"profiles": told}
    return replace(stored, profiles=dict(stored.profiles) | {name: profile}, recipe=recipe)


def _stored_before(stored: StoredConfig, name: str, about: dict[str, Any]) -> Found | None:
    """Return the stored profile `name` when it was found with the very same settings."""
    told = stored.recipe.get("profiles", {}).get(name) if name in stored.profiles else None
    if not isinstance(told, dict) or {key: told.get(key) for key in about} != about:
        return None
    return Found(**(told["found"] | {"kept": True}))


def _save(path: Path, stored: StoredConfig, sizes: allocation.Sizes, weights: int) -> None:
    """Write the model card, then config.json, each complete or not at all; the config is what counts."""
    facts: dict[Single, tuple[int, int]] = {}
    for p in stored.precisions:
        facts[p] = (allocation.total_bytes(dict.fromkeys(sizes, p), sizes), weights)
    for name, profile in stored.profiles.items():
        facts[name] = (allocation.total_bytes(profile, sizes), weights)
    card = path / "README.md"
    if card.exists():
        checkpoint.write_text(card, with_table(card.read_text(encoding="utf-8"), facts))
    checkpoint.update_stored_config(path, stored)
