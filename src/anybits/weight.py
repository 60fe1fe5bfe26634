"""PlaneWeight: what a quantized matrix is. Every kernel, quantizer and file follows this definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from anybits import bits
from anybits.config import WHOLE_ROW, check_group_size
from anybits.errors import AnybitsError

MAX_PLANES = 8
LEVEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
AFFINE_KINDS = ("scales", "offsets", "scale_steps", "offset_steps")
LEVEL_KINDS = (*AFFINE_KINDS, "centroids")
"""The tensors of levels: each is stored once for every precision, as `kind_p`."""


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
    scale_steps, offset_steps: None, or p -> `[p, N, 1]` and `[N, 1]`, fp16, bf16 or fp32: then scales and offsets are
    int8, in steps of their row's own size.
    """

    group_size: int
    scales: Mapping[int, torch.Tensor]
    offsets: Mapping[int, torch.Tensor] | None = None
    scale_steps: Mapping[int, torch.Tensor] | None = None
    offset_steps: Mapping[int, torch.Tensor] | None = None

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored precisions, ascending."""
        return tuple(sorted(self.scales))

    @property
    def scale_bits(self) -> int:
        """The bits of one scale or offset: 8 when rows have steps, else 16, whatever their dtype."""
        return 16 if self.scale_steps is None else 8

    def _kinds(self) -> dict[str, Mapping[int, torch.Tensor]]:
        """Return what is stored, by the field that holds it and in the order of the fields."""
        found = {kind: getattr(self, kind) for kind in AFFINE_KINDS}
        return {kind: stored for kind, stored in found.items() if stored is not None}

    def tensors(self, precision: int) -> dict[str, torch.Tensor]:
        """Return the tensors that `precision` reads besides planes, by stored name."""
        return {f"{kind}_{precision}": stored[precision] for kind, stored in self._kinds().items()}

    def check(self, out_features: int, in_features: int) -> None:
        """Raise AnybitsError unless every tensor has the shape and dtype that the class states."""
        groups = group_count(self.group_size, in_features)
        shapes = affine_shapes(self.precisions, out_features, groups, self.offsets is None, self.scale_bits)
        for kind, stored in self._kinds().items():
            if set(stored) != set(self.scales):
                raise AnybitsError(
                    f"{kind} are stored for precisions {sorted(stored)} and scales for {sorted(self.scales)}: "
                    "they must be the same"
                )
            for p, tensor in stored.items():
                if f"{kind}_{p}" not in shapes:
                    raise AnybitsError(f"{kind}_{p} is stored without the scale_steps or offsets that it belongs to")
                _check_level(f"{kind}_{p}", tensor, *shapes.pop(f"{kind}_{p}"))
        if shapes:
            raise AnybitsError(f"{next(iter(shapes))} is missing beside scales of {self.scale_bits} bits")

    def values(self, precision: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales `[p, N, G]` and offsets `[N, G]` of `precision` as float32, 8 bits times their step."""
        scales = self.scales[precision].float()
        offsets = None if self.offsets is None else self.offsets[precision].float()
        if self.scale_steps is not None:
            scales = scales * self.scale_steps[precision].float()
        if offsets is not None and self.offset_steps is not None:
            offsets = offsets * self.offset_steps[precision].float()
        return scales, offsets

    def expanded(self) -> AffineLevels:
        """Return the same values without steps: fp16 where it holds all of them, as it does anybits' own, else fp32."""
        if self.scale_steps is None:
            return self
        found = {p: self.values(p) for p in self.precisions}
        every = [t for pair in found.values() for t in pair if t is not None]
        dtype = torch.float16 if all(torch.equal(t.half().float(), t) for t in every) else torch.float32
        offsets = {p: offset.to(dtype) for p, (_, offset) in found.items() if offset is not None}
        return AffineLevels(self.group_size, {p: s.to(dtype) for p, (s, _) in found.items()}, offsets or None)

    def dequantize(self, planes: torch.Tensor, precision: int, in_features: int) -> torch.Tensor:
        """Return float32 `[N, K]`: the offset first, then plane 0, 1, ... added in this order."""
        scales, offsets = self.values(precision)
        _, out_features, groups = scales.shape
        columns = group_columns(self.group_size, in_features)
        padding = groups * columns - in_features
        if offsets is None:
            values = scales.new_zeros(out_features, groups, columns)
        else:
            values = offsets[..., None].repeat(1, 1, columns)
        for plane, scale in zip(planes[:precision], scales, strict=True):
            signs = bits.unpack(plane, in_features).float().mul_(2).sub_(1)
            signs = torch.nn.functional.pad(signs, (0, padding)).view(out_features, groups, columns)
            values.addcmul_(signs, scale[..., None])
        return values.view(out_features, groups * columns)[:, :in_features].contiguous()

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor], keep: Callable[[int], bool]) -> AffineLevels:
        """Return the levels of the precisions that `keep` allows, each tensor passed through `fn`."""
        kept = {kind: {p: fn(t) for p, t in stored.items() if keep(p)} for kind, stored in self._kinds().items()}
        return AffineLevels(self.group_size, **kept)

    def replaced(self, other: AffineLevels) -> AffineLevels:
        """Return the levels with those of `other`, of the same kinds, in the place of its precisions."""
        theirs = other._kinds()
        return AffineLevels(self.group_size, **{kind: {**own, **theirs[kind]} for kind, own in self._kinds().items()})

    def rows(self, start: int, stop: int) -> AffineLevels:
        """Return the levels of output rows start ... stop - 1."""
        return self.map(lambda t: t[..., start:stop, :], keep=lambda p: True)


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
            _check_level(f"centroids_{p}", self.centroids[p], (out_features, 2**p), LEVEL_DTYPES)

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


Dtypes = tuple[torch.dtype, ...]


def affine_shapes(
    precisions: Sequence[int], out_features: int, groups: int, symmetric: bool, scale_bits: int
) -> dict[str, tuple[tuple[int, ...], Dtypes]]:
    """Return the shape and the allowed dtypes of every affine level tensor by its stored name (docs/format.md)."""
    dtypes = LEVEL_DTYPES if scale_bits == 16 else (torch.int8,)
    shapes: dict[str, tuple[tuple[int, ...], Dtypes]] = {}
    for p in precisions:
        shapes[f"scales_{p}"] = (p, out_features, groups), dtypes
        if not symmetric:
            shapes[f"offsets_{p}"] = (out_features, groups), dtypes
        if scale_bits == 8:
            shapes[f"scale_steps_{p}"] = (p, out_features, 1), LEVEL_DTYPES
            if not symmetric:
                shapes[f"offset_steps_{p}"] = (out_features, 1), LEVEL_DTYPES
    return shapes


def dtype_names(dtypes: Dtypes) -> str:
    """Return dtypes as a sentence lists them: float16, bfloat16 or float32."""
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def _check_level(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Dtypes) -> None:
    if tuple(tensor.shape) != shape:
        raise AnybitsError(f"{name} has shape {list(tensor.shape)} where {list(shape)} is needed")
    if tensor.dtype not in dtypes:
        raise AnybitsError(f"{name} has dtype {tensor.dtype} where {dtype_names(dtypes)} is needed")


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
    by_kind: dict[str, dict[int, torch.Tensor]] = {kind: {} for kind in LEVEL_KINDS}
    for name, tensor in tensors.items():
        kind, _, precision = name.rpartition("_")
        if kind in by_kind and precision.isdigit():
            by_kind[kind][int(precision)] = tensor
        elif name != "planes":
            known = ", ".join(f"{kind}_p" for kind in LEVEL_KINDS)
            raise AnybitsError(f"{name} names no stored tensor: planes, {known} do")
    if "planes" not in tensors:
        raise AnybitsError("the stored weight has no planes")
    levels: Levels
    if group_size is None:
        levels = CodebookLevels(by_kind["centroids"])
    else:
        levels = AffineLevels(group_size, by_kind["scales"], *(by_kind[kind] or None for kind in AFFINE_KINDS[1:]))
    return PlaneWeight(tensors["planes"], in_features, levels)
