"""Row-invariant dense products: in float32 a row's result does not depend on the rows beside it.

A BLAS chooses its kernel, and with it the order of its sums, by the number of rows. One number of rows
for every product leaves one kernel; padding rows cost nothing where the weights are what has to be read.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

TILE_ROWS = 8
"""Rows of every product of a dense layer, and the least of an attention product.

Measured with MKL on one and two threads, K = 16 ... 4096: a row's result is the same in every place of 8 rows. An
attention product of one sequence gives it beside any number of rows from 8 on (M = 8 ... 108); with 4 it did not.
"""


class TiledLinear(nn.Linear):
    """nn.Linear that multiplies float32 rows in tiles of TILE_ROWS, the last one filled up with zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` for x `[..., K]`."""
        if x.dtype != torch.float32:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        missing = -rows.shape[0] % TILE_ROWS
        if missing:
            rows = functional.pad(rows, (0, 0, 0, missing))
        tiles = [functional.linear(tile, self.weight, self.bias) for tile in rows.split(TILE_ROWS)]
        y = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return y[: y.shape[0] - missing].view(*x.shape[:-1], self.out_features)


def tile_linears(model: nn.Module) -> None:
    """Make every nn.Linear of `model` a TiledLinear; its parameters stay where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = TiledLinear
