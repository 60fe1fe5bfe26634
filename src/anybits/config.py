"""What a checkpoint says of itself, and what a user may ask of quantization: frozen, validated, JSON both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from anybits.errors import AnybitsError

FORMAT_VERSIONS = (1, 2)
"""What this anybits reads. Version 2 has `scale_bits`, and is written only where they are 8: an older anybits reads all
else."""
QUANT_METHOD = "anybits"
METHODS = ("anybcq", "any-precision")
PRESETS = ("fast", "default", "best")
SCALE_BITS = (8, 16)
MIN_PRECISION, MAX_PRECISION = 2, 8
GROUP_WORD = 32
WHOLE_ROW = -1

Single = int | str
"""One precision: a number of planes, or the name of a profile, which gives every matrix its own number."""

_NUMBER = re.compile(r"\d+(\.\d*)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,31}")


def parse_precision(value: object) -> Single:
    """Return a precision in its one form: 3 for 3, 3.0 and "3"; "2.5" for 2.5, "2.5" and "2.50"; other text as it is.

    Raises AnybitsError for what can be neither a number of planes nor the name of a profile.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, float) and 0 <= value < 1e6:
        return int(value) if value == int(value) else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise AnybitsError(f"precision {value!r} cannot be read: give a number of bits, or the name of a stored profile")


def precision_order(value: Single) -> tuple[float, str]:
    """Return the key that sorts precisions: numbers and numeric names by their value, then other names."""
    text = str(value)
    return (float(text), "") if _NUMBER.fullmatch(text) else (float("inf"), text)


def parse_singles(text: str) -> tuple[Single, ...]:
    """Read "2-4", "2,2.5,3" or "2,small" as precisions in ascending order, names after numbers."""
    found: set[Single] = set()
    for part in text.split(","):
        if re.fullmatch(r"\s*\d+\s*-\s*\d+\s*", part):
            found.update(parse_precisions(part))
        else:
            found.add(parse_precision(part.strip()))
    return tuple(sorted(found, key=precision_order))


def check_profile_name(name: object) -> None:
    """Raise AnybitsError unless `name` can name a profile: a number that is not whole, or a short identifier."""
    kept = isinstance(name, str) and name != "auto" and (_NUMBER.fullmatch(name) or _NAME.fullmatch(name))
    if not kept or parse_precision(name) != name:
        raise AnybitsError(
            f"profile name {name!r} does not fit: give a number such as 2.5 that is not whole, or a letter followed "
            "by up to 31 letters, digits, points, dashes and underscores, but not auto"
        )


def parse_precisions(text: str) -> tuple[int, ...]:
    """Read "2-4", "3" or "2,3,8" as ascending precisions."""
    numbers: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            covered = range(int(first), int(last if dash else first) + 1)
            if not covered:
                raise AnybitsError(f"precisions '{text}' run downwards: write {int(last)}-{int(first)}")
            numbers.update(covered)
    except AnybitsError:
        raise
    except ValueError:
        raise AnybitsError(f"precisions '{text}' cannot be read: write a range 2-4 or a list 2,3,4") from None
    return check_precisions(tuple(sorted(numbers)))


def check_precisions(precisions: tuple[int, ...]) -> tuple[int, ...]:
    """Return ascending `precisions`, or raise AnybitsError when one is not in 2 ... 8 or repeats."""
    ints = all(isinstance(p, int) and not isinstance(p, bool) for p in precisions)
    if not precisions or not ints or list(precisions) != sorted(set(precisions)):
        raise AnybitsError(f"precisions {list(precisions)} must be ascending whole numbers without repeats")
    if precisions[0] < MIN_PRECISION or precisions[-1] > MAX_PRECISION:
        raise AnybitsError(
            f"precisions {list(precisions)} are out of range: {MIN_PRECISION} to {MAX_PRECISION} bits can be stored"
        )
    return precisions


def check_group_size(group_size: int) -> None:
    """Raise AnybitsError unless `group_size` is a positive multiple of 32, or -1 for a whole row."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or (group_size != WHOLE_ROW and (group_size <= 0 or group_size % GROUP_WORD)):
        raise AnybitsError(
            f"group size {group_size} does not fit: it must be a positive multiple of {GROUP_WORD}, "
            f"or {WHOLE_ROW} for a whole row"
        )


def check_scale_bits(scale_bits: object) -> None:
    """Raise AnybitsError unless `scale_bits` is 8 or 16."""
    if isinstance(scale_bits, bool) or scale_bits not in SCALE_BITS:
        raise AnybitsError(f"scale_bits {scale_bits!r} does not fit: scales and offsets have 8 or 16 bits")


def _check_version(version: object) -> None:
    if version not in FORMAT_VERSIONS:
        raise AnybitsError(
            f"the checkpoint has format version {version}, and this anybits reads versions "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}: install the anybits that wrote it, or quantize the model again"
        )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise AnybitsError(f"{name} '{value}' is unknown: choose {' or '.join(allowed)}")


def names(pattern: str, module: str) -> bool:
    """Return whether a pattern of `targets` names `module`: each part of the one stands for a part of the other."""
    parts, wanted = module.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


@dataclass(frozen=True)
class StoredConfig:
    """`quantization_config` of a checkpoint's config.json: all that a reader needs, and how it was made.

    targets: patterns of the quantized modules' names, `*` standing for anything but a dot;
    group_size and symmetric are None for any-precision; scale_bits: 8 when scales and offsets are in steps of their
    row, else 16; format_version: 0 for the lowest that can say all this; recipe: settings and calibration, for people;
    profiles: name -> quantized module -> the precision at which it runs under that name, in `precision_order`.
    """

    method: str
    precisions: tuple[int, ...]
    targets: tuple[str, ...]
    group_size: int | None = None
    symmetric: bool | None = None
    format_version: int = 0
    scale_bits: int = 16
    recipe: Mapping[str, Any] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise AnybitsError naming the first field that cannot be right."""
        check_scale_bits(self.scale_bits)
        lowest = 1 if self.scale_bits == 16 else 2
        if self.format_version == 0:
            object.__setattr__(self, "format_version", lowest)
        _check_version(self.format_version)
        if self.format_version < lowest:
            raise AnybitsError(
                f"the checkpoint has format version {self.format_version} and scale_bits {self.scale_bits}, which only "
                f"version {lowest} has"
            )
        _one_of("method", self.method, METHODS)
        check_precisions(self.precisions)
        if self.method == "anybcq":
            if self.group_size is None:
                raise AnybitsError("method anybcq needs a group_size in the checkpoint's config.json")
            check_group_size(self.group_size)
        elif self.group_size is not None:
            raise AnybitsError(f"method any-precision has one codebook a row and no group size, got {self.group_size}")
        elif self.scale_bits != 16:
            raise AnybitsError(f"method any-precision has no scales, and so no scale_bits {self.scale_bits}")
        self._check_profiles()
        ordered = sorted(self.profiles, key=precision_order)
        object.__setattr__(self, "profiles", {name: dict(self.profiles[name]) for name in ordered})

    def _check_profiles(self) -> None:
        if not isinstance(self.profiles, Mapping):
            raise AnybitsError("profiles in the checkpoint's quantization_config must be an object")
        for name, modules in self.profiles.items():
            check_profile_name(name)
            if not isinstance(modules, Mapping) or not modules:
                raise AnybitsError(f"profile {name} must be an object of module names and precisions, and not empty")
            for module, precision in modules.items():
                if isinstance(precision, bool) or precision not in self.precisions:
                    raise AnybitsError(
                        f"profile {name} gives {module} the precision {precision!r}: choose one of "
                        f"{', '.join(map(str, self.precisions))}"
                    )

    @property
    def singles(self) -> tuple[Single, ...]:
        """All that a request may name: stored precisions and profiles, ascending."""
        return tuple(sorted((*self.precisions, *self.profiles), key=precision_order))

    def check_single(self, value: object) -> Single:
        """Return `value` in its one form, or raise AnybitsError unless it is a stored precision or profile."""
        return check_single(value, self.singles)

    def planes_of(self, value: object) -> int:
        """Return the highest precision of any module at `value`: the planes that must be loaded for it."""
        single = self.check_single(value)
        return single if isinstance(single, int) else max(self.profiles[single].values())

    def profiles_of(self, module: str) -> dict[str, int]:
        """Return profile -> the precision of `module` under it; raise AnybitsError when one does not name it."""
        for name, modules in self.profiles.items():
            if module not in modules:
                raise AnybitsError(f"profile {name} lacks {module}: every quantized module needs a precision")
        return {name: modules[module] for name, modules in self.profiles.items()}

    def check_modules(self, modules: Iterable[str]) -> None:
        """Raise AnybitsError unless every profile names exactly the quantized `modules`."""
        wanted = set(modules)
        for name, found in self.profiles.items():
            wrong = sorted(wanted ^ set(found))
            if wrong:
                what = "lacks" if wrong[0] in wanted else "names"
                why = "every quantized module needs a precision" if what == "lacks" else "it is no quantized module"
                raise AnybitsError(f"profile {name} {what} {wrong[0]}: {why}")

    def is_target(self, name: str) -> bool:
        """Return whether the module called `name` is quantized."""
        return any(names(pattern, name) for pattern in self.targets)

    def up_to(self, max_precision: int) -> StoredConfig:
        """Return the config of the same checkpoint without the precisions above `max_precision`."""
        if max_precision not in self.precisions:
            raise AnybitsError(
                f"precision {max_precision} is not stored: choose one of {', '.join(map(str, self.precisions))}"
            )
        kept = {name: each for name, each in self.profiles.items() if max(each.values()) <= max_precision}
        return replace(self, precisions=tuple(p for p in self.precisions if p <= max_precision), profiles=kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that stands in config.json."""
        plain = asdict(self)
        plain["precisions"], plain["targets"] = list(self.precisions), list(self.targets)
        if not self.profiles:  # so that a checkpoint without any is read by every anybits of this format version
            del plain["profiles"]
        if self.format_version == 1:  # which has no such field
            del plain["scale_bits"]
        return {"quant_method": QUANT_METHOD} | plain

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> StoredConfig:
        """Read what `to_dict` wrote; raise AnybitsError when a field is missing, unknown or of a wrong kind."""
        values = dict(stored)
        if values.pop("quant_method", None) != QUANT_METHOD:
            raise AnybitsError(
                f"quant_method is {stored.get('quant_method')!r} where '{QUANT_METHOD}' is needed: "
                "this is not an anybits checkpoint"
            )
        if "format_version" in values:
            _check_version(values["format_version"])
        known = {f.name for f in fields(cls)}
        missing = sorted({"method", "precisions", "targets", "format_version"} - set(values))
        unknown = sorted(set(values) - known)
        if missing or unknown:
            raise AnybitsError(f"the checkpoint's quantization_config lacks {missing} and has unknown {unknown} fields")
        for name in ("precisions", "targets"):
            if not isinstance(values.get(name), list | tuple):
                raise AnybitsError(f"{name} in the checkpoint's quantization_config must be a list")
            values[name] = tuple(values[name])
        return cls(**values)


def check_single(value: object, allowed: tuple[Single, ...]) -> Single:
    """Return `value` in its one form, or raise AnybitsError unless it is one of `allowed`."""
    single = parse_precision(value)
    if single not in allowed:
        raise AnybitsError(f"precision {single} is not stored: choose one of {', '.join(map(str, allowed))}")
    return single


COLUMN_ORDERS = ("given", "energy")
ENOUGH_TOKENS = 1 << 15
"""Calibration tokens from which more make a precision above the lowest hardly better."""


@dataclass(frozen=True)
class DataAware:
    """How codes and levels follow the data; every piece can be switched off by itself.

    balancing: rounds of fitting the levels of up to 5 shared planes for all precisions at once before codes meet data;
    feedback: choose codes in one pass with error feedback at every precision; descents: times that codes are then
    chosen anew, one at a time; refit_sweeps: sweeps of a refit of scales and offsets under the full Hessian;
    codebook_iterations: conjugate-gradient steps of a centroid refit; correction: share of the shift of
    a layer's target that makes up for the layers before it; damping: added to the Hessian's diagonal, relative
    to its mean; column_order: given or energy; precision_weights: what each precision's relative error counts
    (empty: the lowest 1.5, the highest 1.25, others 1); balance: 1 weighs relative errors, 0 absolute ones;
    sequential: layers see their predecessors in the block quantized; thinning: the lowest precision is fitted to all
    calibration batches and every other one, and what a target makes up for, to each n-th, which is faster: n is at most
    `thinning`, and such that ENOUGH_TOKENS are left; exhaustive, beam: of the search (nested_codes.Search); experts:
    experts follow the tokens that the router sends them; expert_tokens: tokens that an expert needs for each column
    of a matrix, borrowing what it lacks; router_weights: an expert's token counts the square of its router weight.
    """

    balancing: int = 10
    feedback: bool = True
    descents: int = 3
    refit_sweeps: int = 1
    codebook_iterations: int = 8
    correction: float = 0.5
    damping: float = 0.01
    column_order: str = "given"
    precision_weights: tuple[float, ...] = ()
    balance: float = 1.0
    sequential: bool = True
    thinning: int = 2
    exhaustive: int = 32
    beam: int = 6
    experts: bool = True
    expert_tokens: float = 2.0
    router_weights: bool = True

    def __post_init__(self) -> None:
        """Raise AnybitsError naming the first setting that is out of range."""
        _one_of("column_order", self.column_order, COLUMN_ORDERS)
        for name in (
            "balancing",
            "descents",
            "refit_sweeps",
            "codebook_iterations",
            "thinning",
            "exhaustive",
            "beam",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (1 if name in ("thinning", "exhaustive", "beam") else 0):
                raise AnybitsError(f"{name} is {value}: it must be a whole number and not negative")
        if not 0 < self.damping < 10 or not 0 <= self.correction <= 1 or not 0 <= self.balance <= 1:
            raise AnybitsError("damping must lie between 0 and 10, correction and balance between 0 and 1")
        if not 0 <= self.expert_tokens < 1000:
            raise AnybitsError(f"expert_tokens is {self.expert_tokens}: it must not be negative, and below 1000")
        if any(not w > 0 for w in self.precision_weights):
            raise AnybitsError(f"precision weights {list(self.precision_weights)} must be positive")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        return asdict(self) | {"precision_weights": list(self.precision_weights)}


@dataclass(frozen=True)
class Recipe:
    """How to quantize: everything that, with the model and the text, determines the stored bytes.

    Token counts are `samples` sequences of `seq_len`; `rounds` is T of AnyBCQ's alternation; `steps` and
    `learning_rate` belong to block reconstruction, `distillation_steps` and `distillation_rate`, which is in half
    distances of neighbouring levels, to end-to-end tuning, both of preset `best`; `data_aware` None chooses codes
    without the layers' inputs, as both papers do; `quantize_lm_head` adds the output layer to the decoder blocks'
    layers, a tied one getting planes of its own; `scale_bits` 8 stores scales and offsets in steps of their row;
    preset `fast` uses no calibration text.
    """

    method: str = "anybcq"
    precisions: tuple[int, ...] = (2, 3, 4)
    group_size: int = 128
    symmetric: bool = False
    preset: str = "default"
    rounds: int = 20
    steps: int = 200
    learning_rate: float = 1e-4
    distillation_steps: int = 200
    distillation_rate: float = 0.01
    batch: int = 2
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    data_aware: DataAware | None = field(default_factory=DataAware)
    quantize_lm_head: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        """Raise AnybitsError naming the first setting that is out of range."""
        _one_of("method", self.method, METHODS)
        _one_of("preset", self.preset, PRESETS)
        check_precisions(self.precisions)
        check_group_size(self.group_size)
        check_scale_bits(self.scale_bits)
        if self.method == "any-precision" and (self.symmetric or self.scale_bits != 16):
            what = "symmetric" if self.symmetric else "scale_bits"
            raise AnybitsError(f"{what} belongs to method anybcq: any-precision has codebooks, not scales and offsets")
        for name in ("rounds", "steps", "distillation_steps", "batch", "samples", "seq_len"):
            least = 0 if name in ("rounds", "steps", "distillation_steps") else 1
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise AnybitsError(f"{name} is {value}: it must be a whole number of at least {least}")
        for name in ("learning_rate", "distillation_rate"):
            if not 0 < getattr(self, name) < 1:
                raise AnybitsError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.preset != "fast"

    @property
    def uses_hessian(self) -> bool:
        """Whether codes and levels follow the layers' inputs."""
        return self.needs_text and self.data_aware is not None

    def every(self, precision: int | None) -> int:
        """Return n where `precision`, or the float model for None, runs each n-th calibration batch."""
        if self.reconstructs or self.distils or self.data_aware is None or precision == self.precisions[0]:
            return 1
        return min(self.data_aware.thinning, max(1, self.samples * self.seq_len // ENOUGH_TOKENS))

    @property
    def reconstructs(self) -> bool:
        """Whether levels are tuned block by block against the float block's output."""
        return self.preset == "best" and self.steps > 0

    @property
    def distils(self) -> bool:
        """Whether levels are tuned end to end against the float model's next tokens."""
        return self.preset == "best" and self.distillation_steps > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        data_aware = None if self.data_aware is None else self.data_aware.to_dict()
        return asdict(self) | {"precisions": list(self.precisions), "data_aware": data_aware}

    def to_json(self) -> str:
        """Return the settings as one line of JSON with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True)
