"""One decoder block with data-aware codes: layer after layer, each seeing what the ones before it became."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from anybits.config import DataAware
from anybits.quantize.blocks import BlockRunner, HiddenStates
from anybits.quantize.data_aware import improve, join_rows
from anybits.quantize.hessian import collect, stages
from anybits.quantize.targets import Target, matrix
from anybits.weight import PlaneWeight

logger = logging.getLogger(__name__)


@torch.no_grad()
def improve_block(
    runner: BlockRunner,
    targets: list[Target],
    start: Mapping[str, PlaneWeight],
    float_path: HiddenStates,
    paths: Mapping[int, HiddenStates],
    settings: DataAware,
) -> dict[str, PlaneWeight]:
    """Return `start`, the block's data-free weights by module, with codes and levels that fit their inputs.

    float_path, paths: the block's inputs from the float model and from the model quantized at each precision so far.
    Fused experts keep their data-free codes: their inputs cannot be told apart.
    """
    by_module = {t.module: t for t in targets}
    like = dict(runner.block.named_parameters())
    weights = dict(start)
    precisions = next(iter(start.values())).precisions
    replaced: list[dict[str, torch.Tensor]] = [{} for _ in precisions]
    inputs = [paths[p] for p in precisions]
    order = stages(runner, targets, float_path.batches[0])
    for groups in [[group] for group in order] if settings.sequential else [order]:
        found = collect(runner, groups, float_path, inputs, replaced, settings.correction > 0)
        for group, moments in zip(groups, found, strict=True):
            # One pass over the columns serves all layers that see this input: their rows are independent.
            together = torch.cat([matrix(like[by_module[module].parameter]) for module in group])
            better = improve(together, join_rows([start[module] for module in group]), moments, settings, True)
            first = 0
            for module in group:
                target = by_module[module]
                weights[module] = better.rows(first, first + target.out_features)
                first += target.out_features
                for p, dense in zip(precisions, replaced, strict=True):
                    dense[target.parameter] = weights[module].dequantize(p)
    _announce([t.module for t in targets if not any(t.module in group for group in order)])
    return weights


_announced: set[str] = set()


def _announce(left: list[str]) -> None:
    new = sorted(set(left) - _announced)
    if new:
        _announced.update(new)
        logger.warning("%s: codes are chosen without data (fused or never called)", ", ".join(new))
