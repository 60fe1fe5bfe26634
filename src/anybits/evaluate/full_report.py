"""Measure checkpoints and write one report: what `anybits report` does."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from anybits.checkpoint import write_json
from anybits.errors import AnybitsError
from anybits.evaluate import document, measurements, perplexity, upscaling
from anybits.evaluate.evaluation import evaluate
from anybits.integrations import transformers as hf

PROMPT_TOKENS, NEW_TOKENS = 16, 32
CALIBRATION_WINDOWS = 8
SIZES, SIZE_PRECISIONS = (512, 1024, 2048, 4096), "2-4"


def report(
    models: Sequence[str],
    out: str | Path,
    text: str,
    reference: str | None = None,
    seq_len: int = 512,
    max_tokens: int = 8192,
    sizes: Sequence[int] = SIZES,
    progress: Callable[[str], None] = lambda step: None,
) -> None:
    """Write figures.json, report.md, report.html and plots about the checkpoints `models` into folder `out`.

    text: what to predict; reference: the float model, which adds divergences, its speed and the upscaling of
    uniform quantization; sizes: square matrices to time. Raises AnybitsError for models that are not ours.
    """
    if not models:
        raise AnybitsError("a report needs at least one quantized model")
    labels = _labels(models)
    stored = {label: hf.stored_config(model).precisions for label, model in labels.items()}
    figures: dict[str, Any] = {"quality": {}, "memory": {}}
    for label, model in labels.items():
        progress(f"quality of {label}")
        evaluation = evaluate(model, hf.stored_config(model).singles, text, seq_len, max_tokens, reference)
        figures["quality"][label] = evaluation.to_dict() | {"model": label}
        figures["memory"][label] = measurements.memory(model)
    figures["published_memory"] = measurements.published_memory()
    progress("speed of decoding")
    figures["speed"] = _speed(labels, stored, text, reference)
    if reference is not None:
        progress("upscaling of uniform quantization")
        figures["upscaling"] = _upscaling(reference, models[0], text, seq_len, max_tokens)
    progress("products of many sizes")
    figures["sizes"] = measurements.product_times(sizes, SIZE_PRECISIONS)
    figures["layout"] = measurements.layout_costs(max(sizes))
    figures["about"] = _about(next(iter(figures["quality"].values())))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / document.FIGURES, figures)
    document.render(folder)


def _labels(models: Sequence[str]) -> dict[str, str]:
    """Return label -> model: the folder's name, numbered where two are the same."""
    labels: dict[str, str] = {}
    for model in models:
        name = Path(model).name or model
        labels[name if name not in labels else f"{name} ({len(labels) + 1})"] = model
    return labels


def _about(evaluation: dict[str, Any]) -> dict[str, Any]:
    from anybits import __version__

    return {
        "anybits": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "text_tokens": evaluation["text_tokens"],
        "seq_len": evaluation["seq_len"],
    }


def _speed(
    labels: dict[str, str], stored: dict[str, tuple[int, ...]], text: str, reference: str | None
) -> dict[str, Any]:
    read = measurements.bandwidth()
    models = {}
    for label, model in labels.items():
        prompt = _prompt(model, text)
        models[label] = measurements.speeds(model, stored[label], prompt, NEW_TOKENS, read)
    plain = None
    if reference is not None:
        original = hf.load_float_model(reference, dtype=torch.float32)
        tokenizer = hf.load_tokenizer(reference)
        plain = measurements.decoding_speed(original, tokenizer, _prompt(reference, text), NEW_TOKENS)
    return {"bandwidth": read, "models": models, "float": plain}


def _prompt(model: str, text: str) -> str:
    tokenizer = hf.load_tokenizer(model)
    ids = hf.encoder(tokenizer)(text[:10_000])
    return str(tokenizer.decode(ids[:PROMPT_TOKENS]))


def _upscaling(reference: str, model: str, text: str, seq_len: int, max_tokens: int) -> list[dict[str, Any]]:
    """Compare on the linear layers that `model` has quantized; GPTQ sees text behind what is scored."""
    original = hf.load_float_model(reference, dtype=torch.float32)
    names = [name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)]
    stored = hf.stored_config(model)
    names = [name for name in names if stored.is_target(name)]
    if not names:
        return []
    ids = hf.encoder(hf.load_tokenizer(reference))(text)
    windows = perplexity.split_windows(ids, seq_len, max_tokens)
    behind = ids[max_tokens:] if len(ids) > max_tokens + seq_len else ids
    calibration = perplexity.split_windows(behind, seq_len, seq_len * CALIBRATION_WINDOWS)
    return upscaling.compare(original, names, calibration, windows, stored.precisions[:3])
