"""Linear layers of vLLM over planes: fused, sharded, each row at its own precision."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from anybits.bits import WORD, words
from anybits.checkpoint import level_shapes
from anybits.config import StoredConfig
from anybits.errors import AnybitsError
from anybits.integrations.vllm.rows import RowPrecisions
from anybits.integrations.vllm.shards import check_columns, select_rows
from anybits.kernels import backend as kernels
from anybits.kernels import cpu as _cpu  # noqa: F401  (registers the backend)
from anybits.kernels import reference as _reference  # noqa: F401  (registers the backend)
from anybits.kernels.cuda import backend as _cuda  # noqa: F401  (registers the backend)
from anybits.precision import FIRST_PROFILE
from anybits.weight import PlaneWeight, from_tensors, group_count

UNSET = -128
"""What no scale or offset in 8 bits is: what has not been loaded yet."""


@dataclass(eq=False)
class Served:
    """A weight as its backend holds it, and the precisions of the rows that meet it.

    profiles: the weight's precision under each of the engine's profiles.
    """

    backend: kernels.Backend
    prepared: Any
    rows: RowPrecisions
    profiles: tuple[int, ...]

    def __post_init__(self) -> None:
        """Put the precision of each code, int32 `[FIRST_PROFILE + profiles]`, on the device of the rows."""
        codes = [*range(FIRST_PROFILE), *self.profiles]
        self.table = torch.tensor(codes, dtype=torch.int32, device=self.rows.buffer.device)

    def __call__(self, x: torch.Tensor, codes: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return x `[M, K]` @ W.T as `[M, N]`, each row at the precision of its code (by default the worker's rows)."""
        return self.backend.matmul(x, self.prepared, self._own(self.rows.of(x) if codes is None else codes))

    def _own(self, codes: int | torch.Tensor) -> int | torch.Tensor:
        if not isinstance(codes, int):
            return self.table.index_select(0, codes) if self.profiles else codes
        return codes if codes < FIRST_PROFILE else self.profiles[codes - FIRST_PROFILE]


class ServedParts:
    """The parts of a fused layer whose precisions differ under some profile: outputs side by side."""

    def __init__(self, parts: Sequence[Served]) -> None:
        self.parts = parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[M, N]` for x `[M, K]`."""
        return torch.cat([part(x) for part in self.parts], dim=1)


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def publish(value: Any) -> torch.Tensor:
    """Return a handle of `value` for the operators below: int64 `[]` on the CPU; `value` stays the caller's.

    A tensor and not an int, so that the compiled graphs of all layers are the same and are compiled once.
    """
    number = next(_numbers)
    _layers[number] = value
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def published(handle: torch.Tensor) -> Any:
    """Return what `publish` was given."""
    return _layers[int(handle)]


def _linear(x: torch.Tensor, rows: torch.Tensor, layer: torch.Tensor, out_features: int) -> torch.Tensor:
    """The body of anybits::vllm_linear; `rows` is the layer's buffer, an argument so that graphs see it."""
    return published(layer)(x)


def _fake_linear(x: torch.Tensor, rows: torch.Tensor, layer: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


_operators = torch.library.Library("anybits", "FRAGMENT")
_operators.define("vllm_linear(Tensor x, Tensor rows, Tensor layer, SymInt out_features) -> Tensor")
_operators.impl("vllm_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("anybits::vllm_linear", _fake_linear, lib=_operators)


@register_weight_loader_v2_supported_method
class PlaneLinearMethod(LinearMethodBase):
    """A linear layer whose matrix is planes.

    stored: the config of the precisions that are loaded; prefix: the layer's name in vLLM; modules: the stored
    matrices that are fused into it, in the order of its rows, or it alone.
    """

    def __init__(
        self, stored: StoredConfig, rows: RowPrecisions, prefix: str, modules: Sequence[str], capturing: bool
    ) -> None:
        self.stored, self.rows, self.prefix, self.capturing = stored, rows, prefix, capturing
        self.profiles = [tuple(stored.profiles_of(module).values()) for module in modules]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register empty planes and levels of this rank's shard, of the shapes that docs/format.md gives."""
        k, n = input_size_per_partition, sum(output_partition_sizes)
        check_columns(self.prefix, input_size, k, self.stored.group_size)
        planes = torch.empty(self.stored.precisions[-1], n, words(k), dtype=torch.int32)
        loader = extra["weight_loader"]
        layer.register_parameter(
            "planes",
            PackedvLLMParameter(
                data=planes, input_dim=2, output_dim=1, packed_dim=2, packed_factor=WORD, weight_loader=loader
            ),
        )
        group_size = self.stored.group_size
        for name, (shape, dtypes) in level_shapes(self.stored, n, k, self.stored.precisions).items():
            data = torch.full(shape, UNSET if torch.int8 in dtypes else torch.nan, dtype=dtypes[0])
            a_row = name.startswith(("scale_steps", "offset_steps"))
            if group_size is None or a_row or group_count(group_size, input_size) == 1:
                parameter = ChannelQuantScaleParameter(data=data, output_dim=len(shape) - 2, weight_loader=loader)
            else:
                parameter = GroupQuantScaleParameter(
                    data=data, output_dim=len(shape) - 2, input_dim=len(shape) - 1, weight_loader=loader
                )
            parameter.anybits_level = True
            layer.register_parameter(name, parameter)
        layer.register_buffer("row_precisions", self.rows.buffer, persistent=False)
        layer.anybits_rows, layer.anybits_shape = self.rows, (n, k)
        layer.anybits_parts = output_partition_sizes if len(self.profiles) > 1 else [n]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Hand the weight to its backend and drop the parameters that it was loaded into."""
        if hasattr(layer, "plane_handle"):
            raise AnybitsError("anybits layers cannot be loaded twice: start a new engine for new weights")
        n, k = layer.anybits_shape
        levels = level_shapes(self.stored, n, k, self.stored.precisions)
        tensors = {name: getattr(layer, name).data for name in ("planes", *levels)}
        for name, tensor in tensors.items():
            unset = tensor.isnan() if tensor.is_floating_point() else tensor == UNSET
            if name != "planes" and unset.any():
                raise AnybitsError(f"the checkpoint has no {name} for {self.prefix}, or it is not a number")
            delattr(layer, name)
        weight = from_tensors(tensors, k, self.stored.group_size)
        layer.anybits = self._serve(weight, layer.anybits_parts)
        layer.register_buffer("plane_handle", publish(layer.anybits), persistent=False)

    def _serve(self, weight: PlaneWeight, sizes: list[int]) -> Served | ServedParts:
        """Return `weight`, cut between neighbouring parts of `sizes` rows whose precisions differ under a profile."""
        if len(set(self.profiles)) == 1:
            return serve(weight, self.rows, self.profiles[0], self.capturing)
        parts, start = [], 0
        for profiles, run in itertools.groupby(zip(self.profiles, sizes, strict=True), operator.itemgetter(0)):
            stop = start + sum(size for _, size in run)
            mine = select_rows(weight, torch.arange(start, stop, device=weight.device))
            parts.append(serve(mine, self.rows, profiles, self.capturing))
            start = stop
        return ServedParts(parts)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `[..., N]` in x's dtype for x `[..., K]`."""
        n, k = layer.anybits_shape
        y = torch.ops.anybits.vllm_linear(x.reshape(-1, k), layer.row_precisions, layer.plane_handle, n)
        y = y.view(*x.shape[:-1], n)
        return y if bias is None else y + bias


def serve(weight: PlaneWeight, rows: RowPrecisions, profiles: tuple[int, ...], capturing: bool) -> Served:
    """Return `weight` on the best backend of its device.

    profiles: its precision under each of the engine's profiles; capturing: whether CUDA graphs will be captured,
    which the reference backend cannot be part of.
    """
    backend = kernels.choose(weight, weight.device)
    if capturing and weight.device.type == "cuda" and backend.name == "reference":
        raise AnybitsError("without a CUDA kernel anybits cannot run in CUDA graphs: start vLLM with --enforce-eager")
    return Served(backend, backend.prepare(weight), rows, profiles)
