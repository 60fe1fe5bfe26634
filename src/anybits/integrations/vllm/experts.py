"""Fused mixture-of-experts layers of vLLM over planes: expert by expert, each row at its own precision."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from anybits.config import StoredConfig
from anybits.errors import AnybitsError
from anybits.integrations.vllm.linear import Served, publish, published, serve
from anybits.integrations.vllm.rows import RowPrecisions
from anybits.integrations.vllm.shards import check_columns, select_columns, select_rows
from anybits.weight import PlaneWeight, from_tensors

logger = logging.getLogger(__name__)

STACKS = ("gate_up_proj", "down_proj")
"""Stored names of a layer's two stacks: `[E, 2*I, H]`, gates above ups in each expert, and `[E, H, I]`."""


class Experts:
    """The experts of one layer that this rank holds, by their number among all experts."""

    def __init__(self, activation: Any, rows: RowPrecisions) -> None:
        self.activation, self.rows = activation, rows
        self.gate_up: dict[int, Served] = {}
        self.down: dict[int, Served] = {}

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum over each row's experts, `[M, H]` in x's dtype, accumulated in float32.

        x: `[M, H]`; weights: routing weights `[M, k]`; experts: int `[M, k]`.
        """
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        codes = self.rows.of(x)
        for expert in experts.unique().tolist():
            if expert not in self.gate_up:  # another rank's
                continue
            chosen, slot = (experts == expert).nonzero(as_tuple=True)
            here = codes if isinstance(codes, int) else codes[chosen]
            both = self.gate_up[expert](x[chosen], here)
            hidden = both.new_empty(both.shape[0], both.shape[1] // 2)
            apply_moe_activation(self.activation, hidden, both)
            y = self.down[expert](hidden, here)
            out.index_add_(0, chosen, y.float() * weights[chosen, slot, None].float())
        return out.to(x.dtype)


def _experts(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    """The body of anybits::vllm_experts."""
    return published(layer)(x, weights, experts)


def _fake_experts(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x)


_operators = torch.library.Library("anybits", "FRAGMENT")
_operators.define("vllm_experts(Tensor x, Tensor weights, Tensor experts, Tensor rows, Tensor layer) -> Tensor")
_operators.impl("vllm_experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("anybits::vllm_experts", _fake_experts, lib=_operators)


class PlaneExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer, stored as two stacks of planes.

    The stacks come straight from the checkpoint (loading.py), because vLLM's loader of experts cuts tensors along
    an expert dimension that planes do not have.
    """

    def __init__(self, layer: Any, stored: StoredConfig, rows: RowPrecisions) -> None:
        super().__init__(layer.moe_config)
        self.stored, self.rows = stored, rows

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Check the shard; nothing is allocated before the stacks arrive."""
        parallel = self.moe.moe_parallel_config
        shard = intermediate_size_per_partition
        check_columns(f"{layer.layer_name}.down_proj", shard * parallel.tp_size, shard, self.stored.group_size)
        layer.register_buffer("row_precisions", self.rows.buffer, persistent=False)
        layer.anybits_rows, layer.anybits_stacks = self.rows, {name: {} for name in STACKS}
        layer.anybits_shape = (hidden_size, shard)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cut this rank's experts out of the stacks and hand each to its backend."""
        hidden, shard = layer.anybits_shape
        parallel, total = self.moe.moe_parallel_config, layer.global_num_experts
        intermediate, first = shard * parallel.tp_size, shard * parallel.tp_rank
        gate_up = self._stack(layer, "gate_up_proj", total * 2 * intermediate, hidden)
        down = self._stack(layer, "down_proj", total * hidden, intermediate)
        served = Experts(layer.activation, self.rows)
        profiles = {name: tuple(self.stored.profiles_of(f"{layer.layer_name}.{name}").values()) for name in STACKS}
        for expert in range(total):
            if parallel.use_ep and layer._map_global_expert_id_to_local_expert_id(expert) < 0:
                continue
            gates = expert * 2 * intermediate + first + torch.arange(shard, device=gate_up.device)
            mine = select_rows(gate_up, torch.cat([gates, gates + intermediate]))
            served.gate_up[expert] = serve(mine, self.rows, profiles["gate_up_proj"], capturing=False)
            mine = down.rows(expert * hidden, (expert + 1) * hidden)
            mine = select_columns(mine, first, first + shard)
            served.down[expert] = serve(mine, self.rows, profiles["down_proj"], capturing=False)
        self._announce(served)
        del layer.anybits_stacks
        layer.anybits = served
        layer.register_buffer("plane_handle", publish(served), persistent=False)

    def _stack(self, layer: Any, name: str, out_features: int, in_features: int) -> PlaneWeight:
        tensors = layer.anybits_stacks[name]
        if not tensors:
            raise AnybitsError(f"the checkpoint has no {name} for {layer.layer_name}")
        device = layer.row_precisions.device
        weight = from_tensors({n: t.to(device) for n, t in tensors.items()}, in_features, self.stored.group_size)
        if weight.out_features != out_features:
            raise AnybitsError(
                f"{layer.layer_name}.{name} has {weight.out_features} rows where the model needs {out_features}"
            )
        return weight

    def _announce(self, served: Experts) -> None:
        name = next(iter(served.gate_up.values())).backend.name if served.gate_up else "no"
        how = "dequantized at every use" if name == "reference" else f"run by the {name} kernels"
        _announce_once(f"fused experts run one after another, {how}: there is no fused kernel for planes yet")

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """Return a config without anything in it: vLLM's own expert kernels are not used."""
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `[M, H]`; shared experts are the caller's business."""
        return torch.ops.anybits.vllm_experts(x, topk_weights, topk_ids, layer.row_precisions, layer.plane_handle)


_announced: set[str] = set()


def _announce_once(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        logger.warning(message)
