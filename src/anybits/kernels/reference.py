"""The naive reference: dequantize, then multiply in float32. Runs everywhere, and every kernel is held to it."""

from __future__ import annotations

import torch

from anybits.kernels.backend import register
from anybits.weight import PlaneWeight


class ReferenceBackend:
    """Dequantize the whole matrix at each call, in plain torch."""

    name = "reference"
    device_type: str | None = None

    def unsupported(self, weight: PlaneWeight, device: torch.device) -> str | None:
        """Return None: plain torch serves every weight on every device."""
        return None

    def prepare(self, weight: PlaneWeight) -> PlaneWeight:
        """Return the weight as it is."""
        return weight

    def matmul(self, x: torch.Tensor, prepared: PlaneWeight, precision: int | torch.Tensor) -> torch.Tensor:
        """Return x `[M, K]` @ W_p.T as `[M, N]` in x's dtype; one product for each precision among the rows."""
        if isinstance(precision, int):
            return torch.nn.functional.linear(x.float(), prepared.dequantize(precision)).to(x.dtype)
        out = x.new_empty(x.shape[0], prepared.out_features)
        for p in precision.unique().tolist():
            rows = (precision == p).to(x.device).nonzero()[:, 0]
            out[rows] = self.matmul(x[rows], prepared, p)
        return out


register(ReferenceBackend())
