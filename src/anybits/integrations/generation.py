"""`model.generate` with drafts or a schedule: transformers prepares and stops, anybits.decode chooses the passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from anybits.config import Single
from anybits.decode.choice import Choice
from anybits.decode.draft_length import MAX_DRAFT, AdaptiveLength, DraftLength, FixedLength
from anybits.decode.loop import decode
from anybits.decode.schedule import Schedule, Split, parse_schedule
from anybits.decode.speculation import speculate
from anybits.decode.statistics import Statistics
from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.integrations.row_invariance import row_invariant, verifying
from anybits.integrations.static_decode import Decoders, StaticDecoder
from anybits.precision import ModelPrecision, Precision, active
from anybits.precision import precision as scoped


@dataclass
class Plan:
    """What to do instead of one pass a token at one precision: drafts at `draft`, or a schedule.

    length: how many tokens to draft, kept from call to call as it learns; streamer: given here because transformers
    shows it the prompt but does not hand it on; decoders: for decoding in a static cache, None for one that grows.
    """

    precision: Precision
    draft: Precision | None = None
    schedule: Schedule | None = None
    length: DraftLength = field(default_factory=AdaptiveLength)
    statistics: Statistics = field(default_factory=Statistics)
    streamer: Any = None
    decoders: Decoders | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Generate as transformers' `custom_generate`: return ids `[1, T]`, or an output object if asked for."""
        _refuse(input_ids, generation_config, model_kwargs)
        processors = logits_processor if len(logits_processor) else None
        choice = Choice(generation_config.do_sample, processors)
        stepper = ModelStepper(model, model_kwargs["past_key_values"])
        if self.decoders is not None:
            stepper = StaticStepper(model, stepper.cache, self.decoders, generation_config.max_length)
        tokens = input_ids[0].tolist()
        schedule = self.schedule or Split(self.precision, self.precision)
        logits = stepper.prefill(input_ids, schedule.prefill())
        first = choice.choose(tokens, logits)
        tokens.append(first)
        emitted = _Emitted(input_ids, stopping_criteria, self.streamer)
        with row_invariant(model, not choice.sample, processors is not None):
            if not emitted.stops([first]):
                for new in self._passes(stepper, choice, tokens, logits, emitted.limit):
                    if emitted.stops(new):
                        break
        stepper.shorten(emitted.ids.shape[1] - 1)
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            return hf.generation_output(emitted.ids, stepper.cache)
        return emitted.ids

    def _passes(
        self, stepper: ModelStepper, choice: Choice, tokens: list[int], logits: torch.Tensor, limit: int
    ) -> Iterator[list[int]]:
        if self.schedule is not None:
            return decode(stepper, choice, tokens, logits, self.schedule, limit, self.statistics)
        assert self.draft is not None
        return speculate(stepper, choice, tokens, self.precision, self.draft, self.length, limit, self.statistics)


class ModelStepper:
    """A transformers model with its cache, as anybits.decode wants it."""

    def __init__(self, model: Any, cache: Any) -> None:
        if not hf.can_be_shortened(cache):
            raise AnybitsError(
                f"drafts and schedules need a cache of full or sliding-window attention that grows, not "
                f"{type(cache).__name__}: leave cache_implementation out, or generate without them"
            )
        self.model, self.cache = model, cache
        self._slides = hf.has_window(cache)

    def prefill(self, input_ids: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Run what the cache does not hold yet and return float32 logits `[V]` of the last position."""
        rest = input_ids[:, self.cache.get_seq_length() :]
        if rest.shape[1] == 0:
            raise AnybitsError("past_key_values holds the whole prompt: leave at least its last token out")
        with scoped(precision):
            out = self.model(input_ids=rest, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache.activate_past_recording()
        return out.logits[0, -1].float()

    def forward(self, tokens: list[int], precision: Precision) -> torch.Tensor:
        """Append `tokens` to the cache at `precision` and return float32 logits `[len(tokens), V]`."""
        ids = torch.tensor([tokens], device=self.model.device)
        with scoped(precision), verifying():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        return out.logits[0].float()

    def drop(self, count: int) -> None:
        """Forget the last `count` positions of the cache; 0 lets sliding windows forget what they have passed."""
        if count or self._slides:
            self.cache.crop(-count)

    def shorten(self, length: int) -> None:
        """Leave `length` positions in the cache."""
        self.drop(max(0, self.cache.get_seq_length() - length))


class StaticStepper(ModelStepper):
    """The same in a static cache: the prompt runs in the cache that grows, which is then copied."""

    def __init__(self, model: Any, cache: Any, decoders: Decoders, positions: int) -> None:
        super().__init__(model, cache)
        self._decoders, self._positions = decoders, positions
        self._decoder: StaticDecoder | None = None

    def prefill(self, input_ids: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Run what the cache does not hold yet and return float32 logits `[V]` of the last position."""
        logits = super().prefill(input_ids, precision)
        self._decoder, self.cache = self._decoders.take(self.model, self.cache, self._positions), None
        return logits

    def forward(self, tokens: list[int], precision: Precision) -> torch.Tensor:
        """Append `tokens` to the cache at `precision` and return float32 logits `[len(tokens), V]`."""
        assert self._decoder is not None
        return self._decoder.forward(torch.tensor([tokens], device=self.model.device), precision)[0]

    def drop(self, count: int) -> None:
        """Forget the last `count` positions of the cache."""
        assert self._decoder is not None
        self._decoder.drop(count)

    def shorten(self, length: int) -> None:
        """Do nothing: the cache ends with the generation."""


class _Emitted:
    """The text so far: streams new tokens and asks the stopping criteria after each."""

    def __init__(self, input_ids: torch.Tensor, criteria: Any, streamer: Any) -> None:
        self.ids, self._criteria, self._streamer = input_ids, criteria, streamer
        self.limit = criteria.max_length or 1 << 62

    def stops(self, new: list[int]) -> bool:
        """Take tokens over until one ends the text; return whether one did."""
        for token in new:
            one = self.ids.new_tensor([[token]])
            self.ids = torch.cat([self.ids, one], dim=1)
            if self._streamer is not None:
                self._streamer.put(one[0].cpu())
            if bool(self._criteria(self.ids, None)[0]):
                return True
        return False


def plan(
    default: ModelPrecision,
    lengths: dict[tuple[Single, Single], DraftLength],
    precision: Any,
    draft_precision: Any,
    draft_tokens: int | None,
    schedule: Schedule | str | None,
    statistics: Statistics | None,
    decoders: Decoders | None = None,
) -> Plan:
    """Return the `custom_generate` that was asked for, or raise AnybitsError for what cannot be.

    default: what the model runs at outside scopes, and can run at; precision: None for the active one;
    lengths: (precision, draft precision) -> what was learned in earlier calls; decoders: None for a cache that grows.
    """
    draft_precision = None if draft_precision is None else hf.checked(draft_precision, default)
    schedule = parse_schedule(schedule) if isinstance(schedule, str) else schedule
    if schedule is not None and precision is not None:
        raise AnybitsError("a schedule names its precisions itself: leave the precision out")
    for one in () if schedule is None else schedule.precisions:
        hf.checked(one, default)
    precision = hf.checked(active(default) if precision is None else precision, default)
    if schedule is not None and draft_precision is not None:
        raise AnybitsError("a schedule and a draft precision contradict each other: give one of them")
    if draft_tokens is not None and draft_precision is None:
        raise AnybitsError("draft_tokens says how far to draft and needs a draft_precision")
    if draft_tokens is not None and not 1 <= draft_tokens <= MAX_DRAFT:
        raise AnybitsError(f"draft_tokens is {draft_tokens}: it must be 1 to {MAX_DRAFT}")
    if any(isinstance(p, torch.Tensor) for p in (precision, draft_precision)):
        raise AnybitsError("drafts need one precision for the sequence, not one for each row")
    _refuse_high_draft(draft_precision, precision)
    counts = Statistics() if statistics is None else statistics
    made = Plan(precision, draft_precision, schedule, statistics=counts, decoders=decoders)
    if draft_tokens is not None:
        made.length = FixedLength(draft_tokens)
    elif draft_precision is not None:
        made.length = lengths.setdefault((precision, draft_precision), made.length)
    return made


def _refuse_high_draft(draft: Precision | None, precision: Precision) -> None:
    """Raise AnybitsError when drafts would take as long as what verifies them, or longer."""
    if draft is not None and draft == precision:
        raise AnybitsError(f"draft precision {draft} is the precision itself: give a lower one")
    if isinstance(draft, int) and isinstance(precision, int) and draft > precision:
        raise AnybitsError(f"draft precision {draft} is above the precision {precision}: give a lower one")


def _refuse(input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise AnybitsError for what drafts and schedules cannot do."""
    mask = model_kwargs.get("attention_mask")
    if config.num_beams != 1:
        raise AnybitsError(f"drafts and schedules run one beam, and num_beams is {config.num_beams}")
    if input_ids.shape[0] != 1:
        raise AnybitsError(f"drafts and schedules run one sequence at a time, and the batch has {input_ids.shape[0]}")
    if mask is not None and not bool(mask.all()):
        raise AnybitsError("drafts and schedules need a prompt without padding")
    if config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
        raise AnybitsError("drafts and schedules return tokens only: leave output_scores and its like out")
    if model_kwargs.get("past_key_values") is None:
        raise AnybitsError("drafts and schedules need the KV cache: leave use_cache on")
