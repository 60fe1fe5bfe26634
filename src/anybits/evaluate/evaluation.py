"""Evaluate one checkpoint at several precisions on a text: what `anybits eval` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from anybits.config import Single
from anybits.errors import AnybitsError
from anybits.evaluate import perplexity
from anybits.evaluate.report import Evaluation, Reference, Result
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.precision import precision as scoped
from anybits.quantize.documents import Corpus, evaluation_corpus

logger = logging.getLogger(__name__)


def read_text(path: str | Path) -> str:
    """Return the text of a file, or raise AnybitsError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AnybitsError(f"text file {path} does not exist") from None
    except UnicodeDecodeError:
        raise AnybitsError(f"text file {path} is not UTF-8") from None


def read_corpus(text: Path | None, dataset: str | None) -> Corpus:
    """Return the text of a file, or of a dataset by name; exactly one is given."""
    if dataset is not None:
        return evaluation_corpus(dataset)
    assert text is not None
    return Corpus(read_text(text), text.name)


def evaluate(
    folder: str,
    precisions: tuple[Single, ...],
    text: str,
    seq_len: int = 512,
    max_tokens: int | None = None,
    reference: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stride: int | None = None,
    source: str = "",
) -> Evaluation:
    """Score the checkpoint `folder` at each of `precisions` on `text`, loading it once.

    stride: tokens between windows that overlap, None for windows side by side; source: what the text is;
    reference: folder or name of the float model to compare with. Raises AnybitsError for precisions that
    are not stored and for texts without tokens.
    """
    stored = hf.stored_config(folder)
    precisions = tuple(map(stored.check_single, precisions))
    model = hf.load_model(folder, max_precision=max(map(stored.planes_of, precisions)))
    ids = hf.encoder(hf.load_tokenizer(folder))(text)
    if stride in (None, seq_len):
        stride, fresh, windows = None, None, perplexity.split_windows(ids, seq_len, max_tokens)
    else:
        assert stride is not None
        windows, fresh = perplexity.stride_windows(ids, seq_len, stride, max_tokens)
    context = hf.context_length(model)
    if context is not None and max(window.shape[1] for window in windows) > context:
        logger.warning("windows of %d tokens are longer than the model's context of %d tokens", seq_len, context)
    original = hf.load_float_model(reference) if reference is not None else None
    scores, own = perplexity.score(
        windows, [_at(model, p) for p in precisions], None if original is None else _plain(original), progress, fresh
    )
    facts = swapping.weight_facts(model)
    results = tuple(
        Result(
            precision=p,
            perplexity=s.perplexity,
            weight_bytes=facts[p][0],
            bits_per_weight=8 * facts[p][0] / facts[p][1],
            kl_divergence=None if own is None else s.kl_divergence,
            top1_agreement=None if own is None else s.top1_agreement,
        )
        for p, s in zip(precisions, scores, strict=True)
    )
    compared = None
    if original is not None and own is not None:
        compared = Reference(own.perplexity, _float_bytes(original, model))
    return Evaluation(folder, scores[0].tokens, seq_len, results, compared, stride, source)


def _plain(model: nn.Module) -> perplexity.Logits:
    device = next(model.parameters()).device

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens.to(device), use_cache=False).logits

    return logits


def _at(model: nn.Module, p: Single) -> perplexity.Logits:
    plain = _plain(model)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with scoped(p):
            return plain(tokens)

    return logits


def _float_bytes(original: nn.Module, quantized: nn.Module) -> int:
    """Return the bytes that the float model holds for the weights that are quantized in the other."""
    itemsize = next(original.parameters()).element_size()
    return sum(m.in_features * m.out_features for m in hf.plane_modules(quantized).values()) * itemsize
