"""`generate(..., static_cache=True)`: transformers prepares and stops, a StaticDecoder runs the passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.integrations.static_decode.capture import Reader
from anybits.integrations.static_decode.decoder import Decoders, StaticDecoder, refuse
from anybits.precision import ModelPrecision, Precision, active


@dataclass
class StaticPlan:
    """Plain generation of a batch, as transformers' `custom_generate`; precision: that of the scope it runs in."""

    default: ModelPrecision
    decoders: Decoders
    streamer: Any = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Return ids `[B, T]`, or an output object without a cache if asked for; tokens are those of `generate`."""
        _refuse(model, generation_config, model_kwargs)
        prefilled = model_kwargs["past_key_values"]
        precision = active(self.default)
        if isinstance(precision, torch.Tensor):
            precision = precision.to(input_ids.device)
        first = first_positions(model_kwargs.get("attention_mask"))
        logits = _prefill(model, input_ids, prefilled, model_kwargs)
        decoder = self.decoders.take(model, prefilled, generation_config.max_length, first)
        ids = self._decode(
            decoder, precision, input_ids, logits, logits_processor, stopping_criteria, generation_config
        )
        if self.streamer is not None:
            self.streamer.end()
        return hf.generation_output(ids, None) if generation_config.return_dict_in_generate else ids

    def _decode(
        self,
        decoder: StaticDecoder,
        precision: Precision,
        ids: torch.Tensor,
        logits: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
    ) -> torch.Tensor:
        """Return `ids` `[B, T]` continued until all sequences have ended; logits: float32 `[B, V]` behind them.

        The next step is queued before the last one's tokens are looked at, so a GPU never waits for that.
        """
        unfinished = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        pad, reader, more = config._pad_token_tensor, Reader(), True
        while more:
            scores = processors(ids, logits)
            new = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
            if pad is not None:
                new = torch.where(unfinished, new, pad)
            ids = torch.cat([ids, new[:, None]], dim=1)
            unfinished = unfinished & ~criteria(ids, None)
            reader.start(torch.cat([new, unfinished.any()[None].long()]))
            room = ids.shape[1] < config.max_length
            if room:
                logits = decoder.forward(new[:, None], precision)[:, -1]
            *tokens, going_on = reader.finish().tolist()
            if self.streamer is not None:
                self.streamer.put(torch.tensor(tokens))
            more = room and bool(going_on)
        return ids


def _prefill(model: Any, input_ids: torch.Tensor, cache: Any, model_kwargs: dict[str, Any]) -> torch.Tensor:
    """Run what the cache does not hold yet, as transformers does; return float32 logits `[B, V]` of the last row."""
    past = cache.get_seq_length()
    if past >= input_ids.shape[1]:
        raise AnybitsError("past_key_values holds the whole prompt: leave at least its last token out")
    rest = input_ids.shape[1] - past if past else None
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=rest, is_first_iteration=True, **model_kwargs
    )
    return model(**inputs, return_dict=True).logits[:, -1].to(torch.float32, copy=True)


def first_positions(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return int64 `[B]`, the first position of each sequence that `mask` `[B, T]` does not call padding.

    Raises AnybitsError unless padding stands at the left alone.
    """
    if mask is None:
        return None
    real = mask.bool()
    first = (real.long().cumsum(1) == 0).sum(1)
    if not bool((real == (torch.arange(mask.shape[1], device=mask.device) >= first[:, None])).all()):
        raise AnybitsError("a static cache needs prompts padded at the left: set the tokenizer's padding_side to left")
    return first


def _refuse(model: Any, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise AnybitsError for what generation in a static cache cannot do."""
    refuse(model)
    if config.num_beams != 1:
        raise AnybitsError(f"a static cache runs one beam, and num_beams is {config.num_beams}")
    if config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
        raise AnybitsError("a static cache returns tokens only: leave output_scores and its like out")
    if model_kwargs.get("past_key_values") is None:
        raise AnybitsError("a static cache needs a KV cache to begin with: leave use_cache on")
    if model_kwargs.get("inputs_embeds") is not None:
        raise AnybitsError("a static cache takes input_ids, not inputs_embeds")
