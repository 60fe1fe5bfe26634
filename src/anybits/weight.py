"""PlaneWeight: what a quantized matrix is. Every kernel, quantizer and file follows this definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from anybits import bits
from anybits.config import WHOLE_ROW, check_group_size
from anybits.errors import AnybitsError

MAX_PLANES = 8
LEVEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def group_columns(group_size: int, in_features: int) -> int:
    """Return the columns of one group; the last group of a row may hold fewer."""
    check_group_size(group_size)
    return in_features if group_size == WHOLE_ROW else min(group_size, in_features)


def group_count(group_size: int, in_features: int) -> int:
    """Return G, the groups of a row."""
    columns = group_columns(group_size, in_features)
    return (in_features + columns - 1) // columns


@dataclass(frozen=True, eq=False)
class AffineLevels:
    """Levels of AnyBCQ: w = offset + sum_i scale_i * b_i with b_i in {-1, +1}, a set for each precision.

    scales: precision p -> `[p, N, G]`; offsets: p -> `[N, G]`, or None when symmetric; fp16, bf16 or fp32.
    """

    group_size: int
    scales: Mapping[int, torch.Tensor]
    offsets: Mapping[int, torch.Tensor] | None = None

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored precisions, ascending."""
        return tuple(sorted(self.scales))

    def tensors(self, precision: int) -> dict[str, torch.Tensor]:
        """Return the tensors that `precision` reads besides planes, by stored name."""
        named = {f"scales_{precision}": self.scales[precision]}
        if self.offsets is not None:
            named[f"offsets_{precision}"] = self.offsets[precision]
        return named

    def check(self, out_features: int, in_features: int) -> None:
        """Raise AnybitsError unless every tensor has the shape and dtype that the class states."""
        groups = group_count(self.group_size, in_features)
        if self.offsets is not None and set(self.offsets) != set(self.scales):
            raise AnybitsError(
                f"offsets are stored for precisions {sorted(self.offsets)} and scales for {sorted(self.scales)}: "
                "they must be the same"
            )
        for p in self.precisions:
            _check_level(f"scales_{p}", self.scales[p], (p, out_features, groups))
            if self.offsets is not None:
                _check_level(f"offsets_{p}", self.offsets[p], (out_features, groups))

    def dequantize(self, planes: torch.Tensor, precision: int, in_features: int) -> torch.Tensor:
        """Return float32 `[N, K]`: the offset first, then plane 0, 1, ... added in this order."""
        scales = self.scales[precision].float()
        _, out_features, groups = scales.shape
        columns = group_columns(self.group_size, in_features)
        padding = groups * columns - in_features
        if self.offsets is None:
            values = scales.new_zeros(out_features, groups, columns)
        else:
            values = self.offsets[precision].float()[..., None].repeat(1, 1, columns)
        for plane, scale in zip(planes[:precision], scales, strict=True):
            signs = bits.unpack(plane, in_features).float().mul_(2).sub_(1)
            signs = torch.nn.functional.pad(signs, (0, padding)).view(out_features, groups, columns)
            values.addcmul_(signs, scale[..., None])
        return values.view(out_features, groups * columns)[:, :in_features].contiguous()

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor], keep: Callable[[int], bool]) -> AffineLevels:
        """Return the levels of the precisions that `keep` allows, each tensor passed through `fn`."""
        scales = {p: fn(t) for p, t in self.scales.items() if keep(p)}
        offsets = None if self.offsets is None else {p: fn(t) for p, t in self.offsets.items() if keep(p)}
        return AffineLevels(self.group_size, scales, offsets)

    def rows(self, start: int, stop: int) -> AffineLevels:
        """Return the levels of output rows start ... stop - 1."""
        scales = {p: t[:, start:stop] for p, t in self.scales.items()}
        offsets = None if self.offsets is None else {p: t[start:stop] for p, t in self.offsets.items()}
        return AffineLevels(self.group_size, scales, offsets)


@dataclass(frozen=True, eq=False)
class CodebookLevels:
    """Levels of Any-Precision: w = centroids[p][row, code], the code being the first p plane bits.

    centroids: precision p -> `[N, 2**p]`, plane 0 the most significant bit of the index; fp16, bf16 or fp32.
    """

    centroids: Mapping[int, torch.Tensor]

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored precisions, ascending."""
        return tuple(sorted(self.centroids))

    def tensors(self, precision: int) -> dict[str, torch.Tensor]:
        """Return the tensors that `precision` reads besides planes, by stored name."""
        return {f"centroids_{precision}": self.centroids[precision]}

    def check(self, out_features: int, in_features: int) -> None:
        """Raise AnybitsError unless every tensor has the shape and dtype that the class states."""
        for p in self.precisions:
            _check_level(f"centroids_{p}", self.centroids[p], (out_features, 2**p))

    def dequantize(self, planes: torch.Tensor, precision: int, in_features: int) -> torch.Tensor:
        """Return float32 `[N, K]`."""
        codes = bits.planes_to_codes(planes, precision, in_features)
        return self.centroids[precision].float().gather(1, codes.long())

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor], keep: Callable[[int], bool]) -> CodebookLevels:
        """Return the levels of the precisions that `keep` allows, each tensor passed through `fn`."""
        return CodebookLevels({p: fn(t) for p, t in self.centroids.items() if keep(p)})

    def rows(self, start: int, stop: int) -> CodebookLevels:
        """Return the levels of output rows start ... stop - 1."""
        return CodebookLevels({p: t[start:stop] for p, t in self.centroids.items()})


Levels = AffineLevels | CodebookLevels


def _check_level(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AnybitsError(f"{name} has shape {list(tensor.shape)} where {list(shape)} is needed")
    if tensor.dtype not in LEVEL_DTYPES:
        raise AnybitsError(f"{name} has dtype {tensor.dtype} where float16, bfloat16 or float32 is needed")


@dataclass(frozen=True, eq=False)
class PlaneWeight:
    """A matrix `[N, K]` in bit-planes with levels for several precisions.

    planes: int32 `[P, N, ceil(K/32)]`, plane 0 the coarsest, bit 1 meaning +1; `in_features`: K.
    Precision p reads the first p planes and the levels stored for p, nothing else.
    """

    planes: torch.Tensor
    in_features: int
    levels: Levels

    def __post_init__(self) -> None:
        """Check every shape and dtype: raise AnybitsError naming the first that is wrong."""
        planes = self.planes
        if planes.dtype != torch.int32 or planes.ndim != 3 or not 1 <= planes.shape[0] <= MAX_PLANES:
            raise AnybitsError(
                f"planes must be int32 [P, N, ceil(K/32)] with 1 to {MAX_PLANES} planes, "
                f"got {planes.dtype} {list(planes.shape)}"
            )
        if self.in_features < 1 or planes.shape[2] != bits.words(self.in_features):
            raise AnybitsError(
                f"planes have {planes.shape[2]} words a row where {self.in_features} input features "
                f"need {bits.words(max(self.in_features, 0))}"
            )
        if not self.precisions or not 1 <= self.precisions[0] <= self.precisions[-1] <= planes.shape[0]:
            raise AnybitsError(
                f"levels are stored for precisions {list(self.precisions)} beside {planes.shape[0]} planes: "
                "there must be at least one, and none above the number of planes"
            )
        self.levels.check(self.out_features, self.in_features)

    @property
    def out_features(self) -> int:
        """N, the output rows."""
        return self.planes.shape[1]

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored precisions, ascending."""
        return self.levels.precisions

    @property
    def max_precision(self) -> int:
        """The highest stored precision."""
        return self.precisions[-1]

    @property
    def device(self) -> torch.device:
        """Where the planes lie."""
        return self.planes.device

    def check_precision(self, precision: int) -> None:
        """Raise AnybitsError unless `precision` is stored."""
        check_precision(precision, self.precisions)

    def dequantize(self, precision: int) -> torch.Tensor:
        """Return the matrix at `precision` as float32 `[N, K]`: the specification of every kernel."""
        self.check_precision(precision)
        return self.levels.dequantize(self.planes, precision, self.in_features)

    def weight_bytes(self, precision: int) -> int:
        """Return the bytes read at `precision`: its planes and its levels."""
        self.check_precision(precision)
        tensors = [self.planes[:precision], *self.levels.tensors(precision).values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every stored tensor by its name in a checkpoint (docs/format.md)."""
        named = {"planes": self.planes}
        for p in self.precisions:
            named.update(self.levels.tensors(p))
        return named

    def up_to(self, max_precision: int) -> PlaneWeight:
        """Return the weight without what only precisions above `max_precision` read; planes are a view."""
        self.check_precision(max_precision)
        levels = self.levels.map(lambda t: t, keep=lambda p: p <= max_precision)
        return PlaneWeight(self.planes[:max_precision], self.in_features, levels)

    def rows(self, start: int, stop: int) -> PlaneWeight:
        """Return output rows start ... stop - 1 as views: one expert of a stack, one shard of a layer."""
        return PlaneWeight(self.planes[:, start:stop], self.in_features, self.levels.rows(start, stop))

    def to(self, device: torch.device | str) -> PlaneWeight:
        """Return the weight on `device`; dtypes stay."""
        levels = self.levels.map(lambda t: t.to(device), keep=lambda p: True)
        return PlaneWeight(self.planes.to(device), self.in_features, levels)


def check_precision(precision: int, stored: tuple[int, ...]) -> None:
    """Raise AnybitsError unless `precision` is one of `stored`."""
    if precision not in stored:
        raise AnybitsError(f"precision {precision} is not stored: choose one of {', '.join(map(str, stored))}")


def from_tensors(tensors: Mapping[str, torch.Tensor], in_features: int, group_size: int | None) -> PlaneWeight:
    """Rebuild a PlaneWeight from `PlaneWeight.tensors()`; `group_size` is None for codebook levels."""
    by_kind: dict[str, dict[int, torch.Tensor]] = {"scales": {}, "offsets": {}, "centroids": {}}
    for name, tensor in tensors.items():
        kind, _, precision = name.rpartition("_")
        if kind in by_kind and precision.isdigit():
            by_kind[kind][int(precision)] = tensor
        elif name != "planes":
            raise AnybitsError(f"{name} names no stored tensor: planes, scales_p, offsets_p and centroids_p do")
    if "planes" not in tensors:
        raise AnybitsError("the stored weight has no planes")
    levels: Levels
    if group_size is None:
        levels = CodebookLevels(by_kind["centroids"])
    else:
        levels = AffineLevels(group_size, by_kind["scales"], by_kind["offsets"] or None)
    return PlaneWeight(tensors["planes"], in_features, levels)
