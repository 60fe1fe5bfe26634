"""Puts the server together: checks the options, loads the model, builds engine, worker and application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from anybits.config import Single, StoredConfig, precision_order
from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.serve import api
from anybits.serve.engine import Limits, load_engine
from anybits.serve.jobs import Prompts, Served
from anybits.serve.policy import Policy, Targets
from anybits.serve.worker import Worker

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What `anybits serve` may be told; see its help for each."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    precision: str | None = None
    draft_precision: str | None = None
    api_key: str | None = None
    max_batch: int = 32
    max_rows: int = 512
    max_queue: int | None = None
    max_model_len: int | None = None
    kv_cache_gb: float = 2.0
    prefix_reuse: bool = True
    target_tpot_ms: float | None = None
    target_ttft_ms: float | None = None
    timeout_s: float = 600.0
    drain_s: float = 60.0
    max_body_mb: float = 4.0
    chat_template: Path | None = None
    dtype: str = "auto"
    device: str = "auto"


def run(options: Options, started: Callable[[str], None]) -> None:
    """Serve until SIGTERM; started(url) is called once the model is loaded.

    Raises AnybitsError for an option that cannot be, OSError when the port is taken.
    """
    stored = hf.stored_config(options.model)
    default = _default_precision(options.precision, stored)
    draft = _default_draft(options.draft_precision, default, stored)
    if options.dtype not in DTYPES:
        raise AnybitsError(f"dtype '{options.dtype}' is unknown: choose {' or '.join(DTYPES)}")
    if options.api_key is not None and not options.api_key.isascii():
        raise AnybitsError("the API key may hold ASCII characters only: HTTP headers carry no others")
    template = None if options.chat_template is None else options.chat_template.read_text(encoding="utf-8")
    listener = api.listen(options.host, options.port)
    engine, tokenizer, ends = load_engine(
        options.model,
        Limits(
            options.max_batch,
            options.max_rows,
            options.max_model_len,
            options.kv_cache_gb * 1e9,
            options.prefix_reuse,
        ),
        DTYPES[options.dtype],
        hf.chosen_device(options.device),
    )
    # A full queue delays a newcomer by about half a batch: an accepted request takes less than twice its own time.
    max_queue = (options.max_batch + 1) // 2 if options.max_queue is None else options.max_queue
    policy = Policy(engine.precisions, Targets(options.target_tpot_ms, options.target_ttft_ms))
    served = Served(
        name=options.name or Path(options.model).resolve().name,
        precisions=engine.precisions,
        default_precision=default,
        max_model_len=engine.max_model_len,
        max_choices=options.max_batch,
        profiles=engine.profiles,
        default_draft=draft,
        vocabulary=engine.model.get_input_embeddings().num_embeddings,
    )
    worker = Worker(engine, policy, ends, max_queue, options.timeout_s)
    front = api.make_front(worker, Prompts(tokenizer, template), served)
    app = api.create_app(front, options.api_key, int(options.max_body_mb * 1e6))
    host, port = listener.getsockname()[:2]
    started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    api.serve(app, listener, options.drain_s)


def _default_precision(asked: str | None, stored: StoredConfig) -> Single | None:
    """Return the precision of requests that name none: the highest unless told otherwise; None is auto."""
    if asked == "auto":
        return None
    if asked is None:
        return stored.precisions[-1]
    try:
        return stored.check_single(asked)
    except AnybitsError as error:
        raise AnybitsError(f"{error} or auto") from None


def _default_draft(asked: str | None, default: Single | None, stored: StoredConfig) -> Single | None:
    """Return the precision of drafts: none unless asked for, and lower than the precision of most requests."""
    if asked is None:
        return None
    draft, highest = stored.check_single(asked), stored.precisions[-1] if default is None else default
    if precision_order(draft) >= precision_order(highest):
        raise AnybitsError(f"draft precision {draft} is not lower than the precision {highest}: give a lower one")
    return draft
