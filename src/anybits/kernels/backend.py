"""What a backend is, and which one serves a weight."""

from __future__ import annotations

import logging
import os
from typing import Any, Protocol

import torch

from anybits.errors import AnybitsError
from anybits.weight import PlaneWeight

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """A way to multiply by a PlaneWeight."""

    name: str
    device_type: str | None
    """The only type of device it runs on; None for all."""

    def unsupported(self, weight: PlaneWeight, device: torch.device) -> str | None:
        """Return why this backend cannot serve `weight` on `device`, or None when it can."""

    def prepare(self, weight: PlaneWeight) -> Any:
        """Return the weight as `matmul` wants it, repacked once; may share memory with `weight`."""

    def matmul(self, x: torch.Tensor, prepared: Any, precision: int | torch.Tensor) -> torch.Tensor:
        """Return x `[M, K]` @ W_p.T as `[M, N]` in x's dtype, accumulated in float32.

        precision: an int for all rows, or int32 `[M]` with one stored precision per row.
        """


_backends: list[Backend] = []
_announced: set[str] = set()


def register(backend: Backend) -> Backend:
    """Add a backend; later registrations are preferred."""
    _backends.insert(0, backend)
    return backend


def backends() -> tuple[Backend, ...]:
    """Return all registered backends, the preferred first."""
    return tuple(_backends)


def choose(weight: PlaneWeight, device: torch.device) -> Backend:
    """Return the preferred backend that serves `weight` on `device`; ANYBITS_BACKEND forces one by name.

    Each reason for passing over a backend made for this type of device is logged once.
    """
    forced = os.environ.get("ANYBITS_BACKEND")
    if forced:
        return _forced(forced, weight, device)
    for backend in _backends:
        reason = backend.unsupported(weight, device)
        if reason is None:
            return backend
        if backend.device_type in (None, device.type):
            _announce(f"backend {backend.name} not used: {reason}")
    raise AnybitsError(f"no backend can multiply on device {device}")


def _forced(name: str, weight: PlaneWeight, device: torch.device) -> Backend:
    for backend in _backends:
        if backend.name == name:
            reason = backend.unsupported(weight, device)
            if reason is not None:
                raise AnybitsError(f"ANYBITS_BACKEND={name} cannot be used here: {reason}")
            return backend
    names = ", ".join(b.name for b in _backends)
    raise AnybitsError(f"ANYBITS_BACKEND={name} is unknown: choose one of {names}")


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        logger.info(message)
