"""From a model folder or hub name to a checkpoint folder: what `anybits quantize` does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from anybits import checkpoint
from anybits.config import Recipe, Single, StoredConfig
from anybits.errors import AnybitsError
from anybits.integrations import lazy, swapping
from anybits.integrations import transformers as hf
from anybits.integrations.model_card import model_card
from anybits.quantize import pipeline
from anybits.quantize.calibration import DEFAULT_DATASET, Calibration, read_texts, sample_windows
from anybits.quantize.estimate import Estimate, estimate
from anybits.quantize.layerwise import EXPERT_MEMORY

OFFLOAD_FOLDER = "offload"
"""Where transformers keeps what it has to convert while loading, such as the experts of most mixtures."""


def quantize_model(
    source: str,
    out: str | Path,
    recipe: Recipe,
    calibration: str | Sequence[str] | None = None,
    device: str = "auto",
    progress: pipeline.Progress | None = None,
    expert_memory: int = EXPERT_MEMORY,
) -> StoredConfig:
    """Quantize the causal language model `source` (folder or hub name) into folder `out`.

    calibration: a text file, a Hugging Face dataset name (NAME[:CONFIG[:SPLIT]]), a list of texts, or None
    for the default dataset; preset fast reads none; expert_memory: bytes for the second moments of several experts at
    once, which does not change the result. Returns what was stored. Repeating an interrupted call resumes it. Raises
    AnybitsError for bad input.
    """
    from anybits import __version__

    if device not in ("auto", "cpu"):
        raise AnybitsError(f"device '{device}' is unknown: quantization runs on auto or cpu")
    folder = Path(out)
    pipeline.refuse_occupied(folder)  # wrong paths are told before a dataset is read
    hf.float_config(source)
    texts = _texts(recipe, calibration)
    model, weights = lazy.load_lazily(source, folder / OFFLOAD_FOLDER)
    swapping.run_experts_eagerly(model)
    tokenizer = hf.load_tokenizer(source) if texts is not None else None
    windows: Calibration | None = None
    if texts is not None and tokenizer is not None:
        name = calibration if isinstance(calibration, str) else "given texts"
        if calibration is None:
            name = DEFAULT_DATASET
        windows = sample_windows(texts, hf.encoder(tokenizer), recipe.samples, recipe.seq_len, recipe.seed, name)

    def last_step(stored: StoredConfig) -> None:
        shutil.rmtree(folder / OFFLOAD_FOLDER, ignore_errors=True)
        _finish(source, folder, model, stored)

    config = hf.plain_config(model)
    done = progress, weights, last_step, expert_memory
    return pipeline.quantize(model, config, recipe, windows, folder, __version__, *done)


def estimate_model(source: str, recipe: Recipe, expert_memory: int = EXPERT_MEMORY) -> Estimate:
    """Return what quantizing `source` will take, from its config and samples timed here; reads no weights."""
    return estimate(lazy.skeleton(source), recipe, expert_memory)


def _texts(recipe: Recipe, calibration: str | Sequence[str] | None) -> list[str] | None:
    """Return the calibration texts, read before anything slow starts; None when the recipe needs none."""
    if not recipe.needs_text:
        if calibration is not None:
            raise AnybitsError("preset fast uses no calibration text: leave it out, or choose preset default")
        return None
    if calibration is None:
        try:
            return read_texts(DEFAULT_DATASET)
        except AnybitsError as error:
            raise AnybitsError(
                f"preset {recipe.preset} needs calibration text: give a text file with --calibration, or choose "
                f"--preset fast, which needs none (the default is a dataset: {error})"
            ) from None
    return read_texts(calibration) if isinstance(calibration, str) else list(calibration)


def _finish(source: str, folder: Path, model: nn.Module, stored: StoredConfig) -> None:
    """Add tokenizer, generation settings and model card, and read every stored byte back once."""
    hf.save_companions(source, folder, model)
    reader = checkpoint.CheckpointReader(checkpoint.checkpoint_files(folder), stored)
    facts: dict[Single, tuple[int, int]] = {}
    for name in reader.modules():
        weight = reader.read(name, hf.in_features(model, name), stored.precisions)
        for p in stored.precisions:
            size, count = facts.get(p, (0, 0))
            facts[p] = (size + weight.weight_bytes(p), count + weight.in_features * weight.out_features)
    (folder / "README.md").write_text(model_card(folder.name, source, stored, facts), encoding="utf-8")
