"""What each row of the next forward pass runs at: one buffer at a fixed address, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anybits.integrations.vllm.options import EngineOptions


class RowPrecisions:
    """Holds the code of a precision or profile (`EngineOptions.code`) for each row of a worker's batch.

    buffer: int32 `[capacity]` on the layers' device, at one address for good, because captured CUDA graphs read
    it; uniform: the code of all rows when they agree, which kernels take instead outside of such graphs.
    """

    def __init__(self, options: EngineOptions, capacity: int) -> None:
        """Allocate on torch's present default device; until the first `fill`, all rows have the default precision."""
        self.options = options
        self.default = options.code(options.default)
        self.buffer = torch.full((capacity,), self.default, dtype=torch.int32)
        self.uniform: int | None = self.default

    def fill(self, codes: Sequence[int], lengths: Sequence[int]) -> None:
        """Set the next rows: request i has `lengths[i]` rows at `codes[i]`; rows past them get the lowest precision.

        On a GPU the copy comes from a fresh pinned tensor each time: the last one may still be in flight.
        """
        rows = torch.repeat_interleave(
            torch.tensor(codes, dtype=torch.int32, device="cpu"), torch.tensor(lengths, device="cpu")
        )[: self.buffer.numel()]
        self.uniform = codes[0] if len(set(codes)) == 1 else None
        if self.buffer.is_cuda:
            rows = rows.pin_memory()
        self.buffer[: rows.numel()].copy_(rows, non_blocking=True)
        self.buffer[rows.numel() :].fill_(self.options.precisions[0])

    def of(self, x: torch.Tensor) -> int | torch.Tensor:
        """Return the code of all rows of x `[M, K]`, or int32 `[M]` with one for each."""
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.uniform is not None and not captured:
            return self.uniform
        if x.shape[0] > self.buffer.numel():  # rows that are no tokens, such as an image's
            return self.default
        return self.buffer[: x.shape[0]]
