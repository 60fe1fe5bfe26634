"""Checkpoints that the two papers' own code wrote, turned into ours without changing a weight: `anybits import`.

Any-Precision: `X.qweight` int32 `[P, N, K/32]` and `X.lut{p}` `[N, 2**p]`. AnyBCQ: `X.qweight` int32
`[K/32, P, N]`, `X.alpha_{p}` `[K/g, p, N]`, `X.beta_{p}` `[K/g, N]`. docs/interop.md gives both to the bit.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from anybits import bits
from anybits.checkpoint import CheckpointWriter, write_json
from anybits.config import WHOLE_ROW, Single, StoredConfig, check_group_size, check_precisions
from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.integrations.foreign import FLOATS, ForeignTensors, read_config
from anybits.integrations.model_card import model_card
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight

WARP = 32
# Original matrices, unused buffers and rotary tables that the two codes leave in their files.
_IGNORED = re.compile(r"\.(q_bias|inv_freq)$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class Layout(Protocol):
    """One of the two layouts: how a matrix lies in the source."""

    @property
    def method(self) -> str:
        """The method as our config.json names it."""

    @property
    def precisions(self) -> tuple[int, ...]:
        """The stored precisions, ascending."""

    @property
    def group_size(self) -> int | None:
        """Columns that share scales; None for codebooks."""

    def expect(self, source: ForeignTensors, module: str, shape: tuple[int, int]) -> None:
        """Raise AnybitsError unless `module` of `shape` (N, K) is there as config.json promises; reads no data."""

    def is_symmetric(self, source: ForeignTensors, modules: Mapping[str, tuple[int, int]]) -> bool | None:
        """Return whether all offsets are zero; None for codebooks."""

    def read(self, source: ForeignTensors, module: str, shape: tuple[int, int], symmetric: bool | None) -> PlaneWeight:
        """Return the weight of `module`."""

    def names(self, module: str) -> set[str]:
        """Return the names that `module` may have in the source, also those that are not needed."""


def unpermute(words: torch.Tensor) -> torch.Tensor:
    """Turn Any-Precision's int32 words `[N, K/32]` of one plane into ours.

    It deals the bytes of 32 words (a warp) out to its 32 threads in turn, the first byte a thread gets being
    the most significant of its word; words past the last full warp form a smaller one. In a byte the first
    column is the most significant bit.
    """
    rows, count = words.shape
    full = count // WARP * WARP
    octets = words.contiguous().view(torch.uint8).view(rows, count, 4)
    parts = [octets[:, start : start + WARP] for start in range(0, full, WARP)]
    if count > full:
        parts.append(octets[:, full:])
    ordered = torch.cat([part.flip(-1).transpose(1, 2).reshape(rows, -1) for part in parts], dim=1)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return bits.pack(ordered[..., None].bitwise_right_shift(shifts).bitwise_and_(1).flatten(-2))


@dataclass(frozen=True)
class AnyPrecisionLayout:
    """The folder that Any-Precision LLM's packer writes."""

    precisions: tuple[int, ...]
    method: str = "any-precision"
    group_size: int | None = None

    def expect(self, source: ForeignTensors, module: str, shape: tuple[int, int]) -> None:
        """See Layout."""
        rows, columns = shape
        _check_words(module, columns)
        source.expect(f"{module}.qweight", (self.precisions[-1], rows, columns // bits.WORD), (torch.int32,))
        for p in self.precisions:
            source.expect(f"{module}.lut{p}", (rows, 2**p), FLOATS)

    def is_symmetric(self, source: ForeignTensors, modules: Mapping[str, tuple[int, int]]) -> bool | None:
        """See Layout."""
        return None

    def read(self, source: ForeignTensors, module: str, shape: tuple[int, int], symmetric: bool | None) -> PlaneWeight:
        """See Layout."""
        rows, columns = shape
        words = (self.precisions[-1], rows, columns // bits.WORD)
        planes = torch.stack([unpermute(plane) for plane in source.get(f"{module}.qweight", words, (torch.int32,))])
        luts = {p: source.get(f"{module}.lut{p}", (rows, 2**p), FLOATS) for p in self.precisions}
        return PlaneWeight(planes, columns, CodebookLevels(luts))

    def names(self, module: str) -> set[str]:
        """See Layout."""
        return {f"{module}.qweight", f"{module}.weight", *(f"{module}.lut{p}" for p in range(1, 17))}


@dataclass(frozen=True)
class AnyBCQLayout:
    """The folder that AnyBCQ's code saves."""

    precisions: tuple[int, ...]
    group_size: int
    method: str = "anybcq"

    def _groups(self, module: str, columns: int) -> int:
        size = columns if self.group_size == WHOLE_ROW else self.group_size
        if columns % size:
            raise AnybitsError(f"{module} has {columns} input features, which group size {size} does not divide")
        return columns // size

    def expect(self, source: ForeignTensors, module: str, shape: tuple[int, int]) -> None:
        """See Layout."""
        rows, columns = shape
        _check_words(module, columns)
        source.expect(f"{module}.qweight", (columns // bits.WORD, self.precisions[-1], rows), (torch.int32,))
        groups = self._groups(module, columns)
        for p in self.precisions:
            source.expect(f"{module}.alpha_{p}", (groups, p, rows), FLOATS)
            source.expect(f"{module}.beta_{p}", (groups, rows), FLOATS)

    def is_symmetric(self, source: ForeignTensors, modules: Mapping[str, tuple[int, int]]) -> bool | None:
        """See Layout."""
        return not any(
            bool(source.get(f"{module}.beta_{p}", (self._groups(module, columns), rows), FLOATS).any())
            for module, (rows, columns) in modules.items()
            for p in self.precisions
        )

    def read(self, source: ForeignTensors, module: str, shape: tuple[int, int], symmetric: bool | None) -> PlaneWeight:
        """See Layout."""
        rows, columns = shape
        groups = self._groups(module, columns)
        words = source.get(f"{module}.qweight", (columns // bits.WORD, self.precisions[-1], rows), (torch.int32,))
        scales = {
            p: source.get(f"{module}.alpha_{p}", (groups, p, rows), FLOATS).permute(1, 2, 0).contiguous()
            for p in self.precisions
        }
        offsets = None
        if not symmetric:
            offsets = {
                p: source.get(f"{module}.beta_{p}", (groups, rows), FLOATS).T.contiguous() for p in self.precisions
            }
        return PlaneWeight(words.permute(1, 2, 0).contiguous(), columns, AffineLevels(self.group_size, scales, offsets))

    def names(self, module: str) -> set[str]:
        """See Layout."""
        levels = {f"{module}.{kind}_{p}" for kind in ("alpha", "beta") for p in range(1, 17)}
        return levels | {f"{module}.qweight", f"{module}.weight"}


def _check_words(module: str, columns: int) -> None:
    if columns % bits.WORD:
        raise AnybitsError(f"{module} has {columns} input features where the source's layout needs a multiple of 32")


def source_layout(config: Mapping[str, Any], folder: Path) -> Layout:
    """Return the layout that a source's config.json names; raise AnybitsError when it names neither."""
    kinds = [kind for kind in ("anyprec", "anybcq") if isinstance(config.get(kind), dict)]
    if len(kinds) != 1:
        raise AnybitsError(
            f"{folder} was written by neither Any-Precision nor AnyBCQ: its config.json has no one object "
            "'anyprec' or 'anybcq'"
        )
    facts = config[kinds[0]]
    first, last = facts.get("seed_precision"), facts.get("parent_precision")
    if not all(isinstance(p, int) and not isinstance(p, bool) and 0 < p < 100 for p in (first, last)) or first > last:
        raise AnybitsError(f"{folder} has seed_precision {first!r} and parent_precision {last!r} in its config.json")
    precisions = check_precisions(tuple(range(first, last + 1)))
    if kinds[0] == "anyprec":
        if facts.get("group_count", 1) != 1:
            raise AnybitsError(f"{folder} has group_count {facts['group_count']!r} where only 1 has a packed layout")
        return AnyPrecisionLayout(precisions)
    group_size = facts.get("group_size")
    check_group_size(group_size)
    return AnyBCQLayout(precisions, group_size)


def import_checkpoint(
    source: str | Path, out: str | Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> StoredConfig:
    """Convert a folder written by Any-Precision's or AnyBCQ's own code into a checkpoint in folder `out`.

    The dequantized weights stay what the source's formula gives; offsets that are zero everywhere are dropped.
    Nothing is left in `out` unless all of it was right: raises AnybitsError naming the first thing that is not.
    """
    folder, target = Path(source), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AnybitsError(f"{target} is not empty: choose another folder or remove it first")
    config = read_config(folder)
    layout = source_layout(config, folder)
    job = _Import(folder, layout)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        stored = job.write(partial, target.name, progress)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return stored


class _Import:
    """One conversion: everything is compared with the model that config.json describes before anything is written."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self.model = hf.empty_model(folder)
        self.source = ForeignTensors(folder)
        self.shapes = self._find_modules()
        self.targets = tuple(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in self.shapes))
        self._check_targets()
        self.plain = self._find_plain()
        self.symmetric = layout.is_symmetric(self.source, self.shapes)

    def _find_modules(self) -> dict[str, tuple[int, int]]:
        shapes: dict[str, tuple[int, int]] = {}
        linears = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        for name in self.source.names():
            if not name.endswith(".qweight"):
                continue
            module = name.removesuffix(".qweight")
            if module not in linears:
                raise AnybitsError(f"{name} in {self.folder} belongs to no linear layer of the model in config.json")
            shapes[module] = (linears[module].out_features, linears[module].in_features)
            self.layout.expect(self.source, module, shapes[module])
        if not shapes:
            raise AnybitsError(f"{self.folder} holds no quantized matrix: no tensor's name ends in .qweight")
        return {name: shapes[name] for name in linears if name in shapes}

    def _check_targets(self) -> None:
        stored = StoredConfig("any-precision", self.layout.precisions, self.targets)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and stored.is_target(name) and name not in self.shapes:
                raise AnybitsError(f"{self.folder} has no {name}.qweight, but other layers of its kind are quantized")

    def _find_plain(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the float tensors to copy; a tied one may be absent from the source."""
        weights = {f"{module}.weight" for module in self.shapes}
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        wanted = {name: tuple(t.shape) for name, t in self.model.state_dict().items() if name not in weights}
        for name, shape in wanted.items():
            if name not in tied:
                self.source.expect(name, shape, FLOATS)
        known = set(wanted).union(*(self.layout.names(module) for module in self.shapes))
        stray = [name for name in self.source.names() if name not in known and not _IGNORED.search(name)]
        if stray:
            raise AnybitsError(f"{stray[0]} in {self.folder} has no place in the model that config.json describes")
        self._check_tied(tied, wanted)
        return {name: shape for name, shape in wanted.items() if name not in tied}

    def _check_tied(self, tied: set[str], wanted: Mapping[str, tuple[int, ...]]) -> None:
        """A tied tensor that is stored as well must equal the one it is tied to, or one of the two would be lost."""
        for name, original in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if name in tied and self.source.has(name) and original in wanted:
                copy = self.source.get(name, wanted[original], FLOATS)
                if not torch.equal(copy, self.source.get(original, wanted[original], FLOATS)):
                    raise AnybitsError(f"{name} in {self.folder} differs from {original}, to which config.json ties it")

    def write(self, out: Path, name: str, progress: Callable[[int, int], None]) -> StoredConfig:
        """Write the whole checkpoint into `out`, config.json last."""
        from anybits import __version__

        writer, shards = CheckpointWriter(out), self._shards()
        facts: dict[Single, tuple[int, int]] = {}
        for index, (shard, names) in enumerate(shards.items()):
            writer.write_shard(shard, self._tensors(names, facts))
            progress(index + 1, len(shards))
        recipe = {"imported_from": self.layout.method, "sha256": self.source.sha256, "anybits_version": __version__}
        stored = StoredConfig(
            self.layout.method,
            self.layout.precisions,
            self.targets,
            self.layout.group_size,
            self.symmetric,
            recipe=recipe,
        )
        self._copy_companions(out)
        card = model_card(name, self.folder.name, stored, facts)
        (out / "README.md").write_text(card, encoding="utf-8")
        plain = hf.plain_config(self.model)
        for key in ("anyprec", "anybcq", "quantization_config"):
            plain.pop(key, None)
        writer.finish(list(shards), stored, plain)
        return stored

    def _shards(self) -> dict[str, list[str]]:
        """Return shard -> names of its modules and float tensors: one shard a block, and one for the rest."""
        shards: dict[str, list[str]] = {}
        for name in sorted([*self.shapes, *self.plain], key=_block_number):
            number = _block_number(name)
            shards.setdefault("rest" if number < 0 else f"block-{number:05d}", []).append(name)
        return shards

    def _tensors(self, names: list[str], facts: dict[Single, tuple[int, int]]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        dtype = next(self.source.get(name, shape, FLOATS).dtype for name, shape in self.plain.items())
        for name in names:
            if name in self.plain:
                tensors[name] = self.source.get(name, self.plain[name], FLOATS)
                continue
            weight = self.layout.read(self.source, name, self.shapes[name], self.symmetric)
            for p in weight.precisions:
                size, count = facts.get(p, (0, 0))
                facts[p] = (size + weight.weight_bytes(p), count + weight.in_features * weight.out_features)
            tensors[f"{name}.weight"] = torch.empty(0, dtype=dtype)  # see PlaneModule
            tensors.update({f"{name}.{key}": tensor for key, tensor in weight.tensors().items()})
        return tensors

    def _copy_companions(self, out: Path) -> None:
        """Bring tokenizer and generation settings along; one that is there but cannot be read is an error."""
        if any((self.folder / name).exists() for name in _TOKENIZER_FILES):
            hf.load_tokenizer(self.folder).save_pretrained(out)
        settings = self.folder / "generation_config.json"
        if settings.exists():
            write_json(out / settings.name, read_config(settings.parent, settings.name))


def _block_number(name: str) -> int:
    """Return the first number in a dotted name, or -1: blocks are the only numbered modules outside of blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
