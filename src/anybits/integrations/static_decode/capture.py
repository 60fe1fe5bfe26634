"""CUDA graphs: the only file that captures one. Everything that is captured also runs as it is, on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from anybits.errors import AnybitsError

WARM_UPS = 2
"""Runs before a capture: the first compiles kernels and makes libraries' workspaces, which a capture must not."""


class Graph:
    """A step, captured once: calling it replays the kernels on the memory that they had, and returns the same tensor.

    The step may be run several times here, so it must give the same when it is repeated.
    """

    def __init__(self, step: Callable[[], torch.Tensor], device: torch.device, pool: Any) -> None:
        with torch.cuda.device(device):
            before, side = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
            side.wait_stream(before)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step()
            before.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate meanwhile: a server does not stop for a capture.
                with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    self._result = step()
            except RuntimeError as error:
                raise AnybitsError(
                    f"this model's decode step cannot be captured in a CUDA graph ({_first_said(error)}): "
                    "generate without a static cache"
                ) from error

    def __call__(self) -> torch.Tensor:
        """Replay on the current stream; the next replay overwrites what this returns."""
        self._graph.replay()
        return self._result


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """Return the stream on which GPU `index` captures: torch's own belongs to the GPU that captured first.

    Graphs that share memory must be captured on one stream, and what a library keeps for it is made by the runs before.
    """
    return torch.cuda.Stream(index)


def _first_said(error: BaseException) -> str:
    """Return the first line of what went wrong first: ending a capture that broke raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def new_pool(device: torch.device) -> Any:
    """Return memory that several graphs share: none is replayed while another's result is still needed."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


class Reader:
    """Brings a few numbers to the CPU without waiting for what is queued behind them."""

    def __init__(self) -> None:
        self._ready: torch.cuda.Event | None = None
        self._here: torch.Tensor | None = None

    def start(self, values: torch.Tensor) -> None:
        """Begin to copy `values`, as the stream stands now."""
        if values.device.type != "cuda":
            self._here = values
            return
        self._here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._here.copy_(values, non_blocking=True)
        self._ready = torch.cuda.Event()
        self._ready.record(torch.cuda.current_stream(values.device))

    def finish(self) -> torch.Tensor:
        """Wait for that copy alone and return it."""
        assert self._here is not None
        if self._ready is not None:
            self._ready.synchronize()
        return self._here
