"""Decode steps of a model in a static cache: on a GPU one captured graph for each number of rows, at any precision.

A step reads its tokens, position, padding and precisions from tensors that stay where they are. So changing the
precision between two steps writes a few numbers on the GPU: nothing is captured, nothing waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from anybits.errors import AnybitsError
from anybits.integrations.attention import LAYER_TYPES
from anybits.integrations.decode_step import attention as decode_attention
from anybits.integrations.static_decode.cache import MOST_ROWS, build, fits
from anybits.integrations.static_decode.capture import Graph, new_pool
from anybits.kernels.cuda.step import small_kernels
from anybits.linear import PlaneLinear, PlaneStack, products_together
from anybits.precision import ModelPrecision, Precision
from anybits.precision import precision as scoped

ATTENTION = {"eager", "sdpa", decode_attention.NAME}
"""Implementations of attention that take a mask of slots."""


_FUSED = 0.1
"""Relative L2 at most between logits of fused and plain steps: rounding makes some 1e-2 of it in bfloat16."""

logger = logging.getLogger(__name__)


@dataclass
class _Inputs:
    """What a step of M rows for each of B sequences reads: tokens int64 `[B, M]`, codes of precisions int32 `[B * M]`.

    written: the precision that `codes` holds, None when it came as a tensor.
    """

    tokens: torch.Tensor
    codes: torch.Tensor
    written: Precision | None = None


class StaticDecoder:
    """Continues the sequences of a prefilled cache, B at a time and M new positions of each in a step.

    Padding stands at the left: first, int64 `[B]`, has each sequence's first position that is none. capture: None for
    CUDA graphs where there is a GPU. own_graphs: a graph of its own for every precision that is not given as a tensor,
    captured when it is first used, in which the kernels know their precision; without, one graph serves all. default:
    the model's precisions, None for a model without planes.
    """

    def __init__(
        self,
        model: Any,
        default: ModelPrecision | None,
        prefilled: Any,
        capacity: int,
        first: torch.Tensor | None = None,
        capture: bool | None = None,
        own_graphs: bool = False,
    ) -> None:
        refuse(model)
        self.model, self.capacity, self.own_graphs = model, capacity, own_graphs
        self.default = default
        self.cache, self._slots = build(prefilled, capacity)
        self.batch, self.device = prefilled.layers[0].keys.shape[0], prefilled.layers[0].keys.device
        self.capture = self.device.type == "cuda" if capture is None else capture
        with torch.inference_mode(False):
            self._position = torch.zeros((), dtype=torch.int64, device=self.device)
            self._first = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            self._offsets = torch.arange(MOST_ROWS, device=self.device)
        self._inputs: dict[int, _Inputs] = {}
        self._graphs: dict[tuple[int, Precision | None], Callable[[], torch.Tensor]] = {}
        self._pool = new_pool(self.device) if self.capture else None
        self._fused: bool | None = None
        self.weights = weights_of(model)
        self.length = 0
        self.restart(prefilled, first)

    def restart(self, prefilled: Any, first: torch.Tensor | None = None) -> None:
        """Begin anew behind another prefilled cache of the same shapes; graphs stay."""
        self.length = int(prefilled.get_seq_length())
        if self.length > self.capacity:
            raise AnybitsError(f"{self.length} positions do not fit into a static cache of {self.capacity}")
        for layer, filled in zip(self.cache.layers, prefilled.layers, strict=True):
            layer.fill(filled, self.length)
        self._first.zero_() if first is None else self._first.copy_(first)

    def takes(self, prefilled: Any, capacity: int) -> bool:
        """Return whether `restart` can take `prefilled`, with room for `capacity` positions, and graphs are valid."""
        shapes = self.capacity <= 2 * capacity and fits(self.cache, prefilled, capacity)
        return shapes and _same(weights_of(self.model), self.weights)

    def forward(self, tokens: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Append int64 `tokens` `[B, M]` and return float32 logits `[B, M, V]`.

        precision: one for all, or int32 codes for each sequence `[B]` or row `[B * M]`, on the decoder's device if
        nothing is to wait.
        """
        rows = tokens.shape[1]
        if rows > MOST_ROWS or self.length + rows > self.capacity:
            raise AnybitsError(
                f"{rows} tokens do not fit behind {self.length} in a static cache of {self.capacity} "
                f"positions, {MOST_ROWS} at a time"
            )
        inputs = self._inputs_of(rows)
        inputs.tokens.copy_(tokens)
        self._position.fill_(self.length)
        own = None if isinstance(precision, torch.Tensor) or not self.own_graphs else precision
        if own is None:
            self._write_precision(inputs, precision, rows)
        logits = self._step_of(rows, own)()
        self.length += rows
        return logits.to(torch.float32, copy=True)

    def drop(self, count: int) -> None:
        """Forget the last `count` positions, at most MOST_ROWS since the last step that kept its own."""
        self.length -= count

    def _inputs_of(self, rows: int) -> _Inputs:
        if rows not in self._inputs:
            with torch.inference_mode(False):
                tokens = torch.zeros(self.batch, rows, dtype=torch.int64, device=self.device)
                codes = torch.zeros(self.batch * rows, dtype=torch.int32, device=self.device)
            self._inputs[rows] = _Inputs(tokens, codes)
        return self._inputs[rows]

    def _write_precision(self, inputs: _Inputs, precision: Precision, rows: int) -> None:
        if isinstance(precision, torch.Tensor):
            if precision.numel() not in (self.batch, self.batch * rows):
                raise AnybitsError(
                    f"precision has {precision.numel()} entries for {self.batch} sequences of {rows} rows: give one "
                    "for all, one entry per sequence, or one per row"
                )
            each = precision.reshape(self.batch, -1)
            inputs.codes.view(self.batch, rows).copy_(each, non_blocking=True)
            inputs.written = None
        elif precision != inputs.written:
            inputs.codes.fill_(self._code(precision))
            inputs.written = precision

    def _code(self, precision: Any) -> int:
        return int(precision) if self.default is None else int(self.default.codes([precision])[0])

    def _step_of(self, rows: int, own: Precision | None) -> Callable[[], torch.Tensor]:
        """Return what runs a step: its captured graph, or where nothing is captured the step itself."""
        key = (rows, own)
        if key not in self._graphs:

            def step() -> torch.Tensor:
                return self._step(rows, own)

            if self._fused is None:
                self._fused = self._may_fuse(step)
            self._graphs[key] = Graph(step, self.device, self._pool) if self.capture else step
        return self._graphs[key]

    def _may_fuse(self, step: Callable[[], torch.Tensor]) -> bool:
        """Return whether launches may be fused: products of one x, and what stands between products."""
        results = []
        for self._fused in (False, True):
            results.append(step().float())
        plain, fused = results
        if float((fused - plain).norm()) <= _FUSED * float(plain.norm()):
            return True
        logger.warning("nothing is fused in this model's steps: it changes what query, key and value get, or the like")
        return False

    @torch.no_grad()
    def _step(self, rows: int, own: Precision | None) -> torch.Tensor:
        """Run the model over the inputs for `rows`; every operator works on memory that stays where it is."""
        inputs = self._inputs[rows]
        positions = self._position + self._offsets[:rows]
        masks = {slots.window: self._mask(slots.begin(positions, self._first)) for slots in self._slots}
        mask: Any = next(iter(masks.values()))
        if len(masks) == 2:
            mask = {"full_attention": masks[None], "sliding_attention": next(m for w, m in masks.items() if w)}
        fused = bool(self._fused)
        with scoped(inputs.codes if own is None else own), products_together(fused), small_kernels(fused):
            return self.model(
                input_ids=inputs.tokens,
                attention_mask=mask,
                position_ids=positions[None] - self._first[:, None],
                past_key_values=self.cache,
                use_cache=True,
            ).logits

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        """Return bool `seen` as the model's attention wants it: eager attention adds its mask to the scores."""
        if self.model.config._attn_implementation != "eager":
            return seen
        dtype = self.cache.layers[0].keys.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def refusal(model: Any) -> str | None:
    """Return why a model's steps are not the same operators on the same memory each time, or None when they are."""
    config = model.config
    implementation = str(config._attn_implementation).removesuffix("_by_rows")
    if implementation not in ATTENTION:
        return f"a static cache needs {' or '.join(sorted(ATTENTION))} attention, not {implementation}"
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if config.is_encoder_decoder or unknown:
        kind = "an encoder" if config.is_encoder_decoder else sorted(unknown)[0]
        return f"a static cache takes decoders of {' and '.join(sorted(LAYER_TYPES))}, not {kind}"
    if any(isinstance(module, PlaneStack) for module in model.modules()):
        return "fused experts choose their matrices on the CPU: generate without a static cache"
    return None


def refuse(model: Any) -> None:
    """Raise AnybitsError for a model with a `refusal`."""
    if reason := refusal(model):
        raise AnybitsError(reason)


def weights_of(model: nn.Module) -> list[Any]:
    """Return what tells the memory that a captured step reads: prepared weights, and where other parameters lie."""
    found: list[Any] = []
    for module in model.modules():
        if isinstance(module, PlaneLinear):
            found.append(module.prepared)
        else:
            found += [parameter.data_ptr() for parameter in module.parameters(recurse=False)]
    return found


def _same(now: list[Any], then: list[Any]) -> bool:
    pairs = zip(now, then, strict=False)
    return len(now) == len(then) and all(a == b if isinstance(a, int) else a is b for a, b in pairs)


class Decoders:
    """The decoder of a model's last generation, kept with its graphs for the next one of like size."""

    def __init__(self, default: ModelPrecision) -> None:
        self._default = default
        self._kept: StaticDecoder | None = None

    def take(
        self, model: Any, prefilled: Any, positions: int, first: torch.Tensor | None = None, capture: bool | None = None
    ) -> StaticDecoder:
        """Return a decoder behind `prefilled` with room for `positions` in all."""
        kept = self._kept
        if kept is not None and kept.model is model and kept.takes(prefilled, positions):
            kept.restart(prefilled, first)
            return kept
        self._kept = None  # its memory goes before more is taken
        step = max(64, 1 << max(0, positions.bit_length() - 3))  # few sizes, and at most a quarter too large
        capacity = -(-positions // step) * step
        self._kept = StaticDecoder(model, self._default, prefilled, capacity, first, capture)
        return self._kept
