"""Fills the rows' codes of precisions before every forward pass, in both of vLLM's model runners."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
from torch import nn

from anybits.integrations.vllm.rows import RowPrecisions


def install(use_v2_model_runner: bool) -> None:
    """Hook the model runner of this worker; idempotent."""
    if use_v2_model_runner:
        _install_v2()
    else:
        _install_v1()


def row_precisions(model: nn.Module) -> list[RowPrecisions]:
    """Return the buffers that the plane layers of a model read: one, or none."""
    found: dict[int, Any] = {id(m.anybits_rows): m.anybits_rows for m in model.modules() if hasattr(m, "anybits_rows")}
    return list(found.values())


def extra_args(sampling_params: Any) -> Any:
    """Return a request's extra_args; a pooling request has no sampling parameters."""
    return getattr(sampling_params, "extra_args", None)


def _install_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._model_forward  # meant to be overridden; sees real batches only
    if hasattr(original, "anybits"):
        return

    @wraps(original)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_anybits_rows"):
            self._anybits_rows = row_precisions(self.get_model())
        for rows in self._anybits_rows:
            count = self.input_batch.num_reqs
            requests = [self.requests[name] for name in self.input_batch.req_ids[:count]]
            codes = [rows.options.in_worker(extra_args(r.sampling_params)) for r in requests]
            rows.fill(codes, np.diff(self.query_start_loc.np[: count + 1]).tolist())
        return original(self, *args, **kwargs)

    hooked: Any = _model_forward
    hooked.anybits = True
    GPUModelRunner._model_forward = hooked


class PrecisionState:
    """Mixed into vLLM's ModelState: remembers the precision of each request slot, and fills the rows from them."""

    max_num_reqs: int

    def __init__(self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        self._anybits = [(rows, [rows.default] * self.max_num_reqs) for rows in row_precisions(model)]

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note the precision of the request that takes slot `req_index`."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        for rows, slots in self._anybits:
            slots[req_index] = rows.options.in_worker(extra_args(new_req_data.sampling_params))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """Fill the rows in the order of the batch."""
        count = input_batch.num_reqs
        lengths = np.diff(input_batch.query_start_loc_np[: count + 1]).tolist()
        for rows, slots in self._anybits:
            rows.fill([slots[i] for i in input_batch.idx_mapping_np[:count]], lengths)
        return super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]


def _install_v2() -> None:
    from vllm.v1.worker.gpu import model_states

    original = model_states.resolve_model_state_cls
    if hasattr(original, "anybits"):
        return

    @wraps(original)
    def resolve_model_state_cls(vllm_config: Any, model: nn.Module) -> type:
        base = original(vllm_config, model)
        return with_precision(base) if row_precisions(model) else base

    hooked: Any = resolve_model_state_cls
    hooked.anybits = True
    model_states.resolve_model_state_cls = hooked


def with_precision(base: type) -> type:
    """Return the ModelState `base` with PrecisionState mixed in."""
    return type(f"Precision{base.__name__}", (PrecisionState, base), {})
