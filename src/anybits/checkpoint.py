"""A checkpoint on disk: an ordinary Hugging Face folder of safetensors, with a checksum for each plane.

docs/format.md describes the bytes. Shards are written one after another, each complete before it gets
its name; reading at `max_precision` p touches only the bytes of the first p planes and their levels.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from anybits.bits import words
from anybits.config import StoredConfig
from anybits.errors import AnybitsError
from anybits.mapped import MappedFile, Pages
from anybits.weight import LEVEL_DTYPES, PlaneWeight, affine_shapes, from_tensors, group_count

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CHECKSUMS = "anybits.crc32"
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I8": torch.int8,
}


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Return the CRC-32 of each tensor's bytes; of `planes`, one for each plane, so that a prefix can be checked."""
    return {
        name: [_crc32(part) for part in (tensor if _is_planes(name) else tensor[None])]
        for name, tensor in sorted(tensors.items())
    }


def _is_planes(name: str) -> bool:
    return name.rpartition(".")[2] == "planes"


def _crc32(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return zlib.crc32(_buffer(tensor.detach().cpu().contiguous()))


def _buffer(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def metadata(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the safetensors header's metadata for a file that holds `tensors`."""
    return {"format": "pt", CHECKSUMS: json.dumps(checksums(tensors), separators=(",", ":"))}


class CheckpointWriter:
    """Writes a checkpoint shard by shard; a shard has its final name only once all its bytes are on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has_shard(self, name: str) -> bool:
        """Return whether shard `name` was finished, by this run or one before."""
        return self.path(name).exists()

    def path(self, name: str) -> Path:
        """Return the file of shard `name`."""
        return self.folder / _shard_file(name)

    def write_shard(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard of named tensors: the same tensors always give the same bytes.

        Raises OSError when the disk is full, AnybitsError when the tensors cannot be written otherwise.
        """
        plain = {key: t.detach().cpu().contiguous() for key, t in sorted(tensors.items())}
        final = self.folder / _shard_file(name)
        partial = final.with_suffix(".partial")
        try:
            save_file(plain, partial, metadata=metadata(plain))
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from None
            raise AnybitsError(f"{final} cannot be written: {error}; repeat the command to resume") from None
        with partial.open("r+b") as file:
            _order_metadata(file)
            os.fsync(file.fileno())
        partial.rename(final)

    def read_shard(self, name: str) -> dict[str, torch.Tensor]:
        """Return all tensors of a finished shard."""
        return load_file(self.path(name))

    def finish(self, shards: Iterable[str], stored: StoredConfig, model_config: dict[str, Any]) -> None:
        """Write the index of `shards`, then config.json: a folder without it is not a model yet."""
        weight_map: dict[str, str] = {}
        total = 0
        for name in shards:
            path = self.folder / _shard_file(name)
            with safe_open(path, framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), path.name))
            total += path.stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX_FILE, index)
        write_json(self.folder / "config.json", model_config | {"quantization_config": stored.to_dict()})


def _order_metadata(file: BinaryIO) -> None:
    """Rewrite a safetensors header with sorted metadata, which the library leaves in a random order."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= length, "the ordered header must fit in the place of the old one"
    file.seek(8)
    file.write(text.ljust(length))


def _shard_file(name: str) -> str:
    return f"model-{name}.safetensors"


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text`, complete or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def read_stored_config(folder: Path) -> StoredConfig:
    """Return the `quantization_config` of a checkpoint folder; raise AnybitsError when it is not one."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AnybitsError(f"{folder} has no config.json: it is not a model folder") from None
    except (OSError, ValueError) as error:
        raise AnybitsError(f"{path} cannot be read as JSON: {error}") from None
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(stored, dict):
        raise AnybitsError(f"{folder} is not quantized: give a folder that `anybits quantize` wrote")
    return StoredConfig.from_dict(stored)


def update_stored_config(folder: Path, stored: StoredConfig) -> None:
    """Replace the `quantization_config` in a folder's config.json, complete or not at all."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"quantization_config": stored.to_dict()})


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, in the order of the index."""
    index = folder / INDEX_FILE
    if not index.exists():
        single = folder / SINGLE_FILE
        if not single.exists():
            raise AnybitsError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: the checkpoint is incomplete")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise AnybitsError(f"{index} cannot be read: {error}") from None
    return [folder / str(name) for name in names]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, dtype, shape, and the checksums of its bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    crc32: tuple[int, ...]


def level_shapes(
    stored: StoredConfig, out_features: int, in_features: int, precisions: Sequence[int]
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Return the shape and allowed dtypes of each level tensor of a matrix `[N, K]` by its stored name."""
    if stored.group_size is None:
        return {f"centroids_{p}": ((out_features, 2**p), LEVEL_DTYPES) for p in precisions}
    groups = group_count(stored.group_size, in_features)
    return affine_shapes(precisions, out_features, groups, bool(stored.symmetric), stored.scale_bits)


class CheckpointReader:
    """Reads PlaneWeights from a checkpoint's files; every header is checked before any tensor is read.

    Tensors are views of the mapped files, compared with their checksums once and then left to the page cache.
    `bytes_read` counts the bytes of tensor data read so far. Threads may read at once.
    """

    def __init__(self, files: Iterable[Path], stored: StoredConfig) -> None:
        """Read all headers; raise AnybitsError for a file that is missing, truncated or not safetensors."""
        self.stored = stored
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._maps: dict[Path, MappedFile] = {}
        for file in files:
            self._entries.update(_read_header(Path(file)))

    def has(self, module: str) -> bool:
        """Return whether `module` is stored as planes."""
        return f"{module}.planes" in self._entries

    def modules(self) -> list[str]:
        """Return the names of all modules stored as planes."""
        return [name.removesuffix(".planes") for name in self._entries if _is_planes(name)]

    def names(self) -> list[str]:
        """Return the names of all stored tensors."""
        return list(self._entries)

    def stored_bytes(self, name: str) -> int:
        """Return the bytes of one stored tensor."""
        entry = self._entries[name]
        return entry.dtype.itemsize * _numel(entry.shape)

    def fingerprint(self) -> str:
        """Return a hash of the names, shapes and checksums of all stored tensors."""
        facts = [[name, list(entry.shape), list(entry.crc32)] for name, entry in sorted(self._entries.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one stored tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one stored tensor."""
        return self._entries[name].dtype

    def has_tensor(self, name: str) -> bool:
        """Return whether a tensor called `name` is stored."""
        return name in self._entries

    def read_tensor(self, name: str, first: int | None = None) -> torch.Tensor:
        """Return one stored tensor, or the `first` leading entries of planes, compared with its checksums."""
        return self._read(name, first)

    def verify_unquantized(self) -> None:
        """Compare all tensors outside of plane modules with their checksums: another loader reads those."""
        modules = set(self.modules())
        for name, entry in self._entries.items():
            if entry.crc32 and name.rpartition(".")[0] not in modules:
                self._read(name)

    def check(self, module: str, out_features: int, in_features: int, precisions: tuple[int, ...]) -> None:
        """Raise AnybitsError unless `module` is stored with the shapes that the config promises; reads no data."""
        planes = (self.stored.precisions[-1], out_features, words(in_features))
        self._expect(f"{module}.planes", planes, (torch.int32,))
        for name, (shape, dtypes) in level_shapes(self.stored, out_features, in_features, precisions).items():
            self._expect(f"{module}.{name}", shape, dtypes)

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        entry = self._entries.get(name)
        if entry is None:
            raise AnybitsError(f"the checkpoint has no {name}: it is incomplete or was made for another model")
        if entry.shape != shape or entry.dtype not in dtypes:
            raise AnybitsError(
                f"{name} is {entry.dtype} {list(entry.shape)} in {entry.file.name} where "
                f"{' or '.join(map(str, dtypes))} {list(shape)} is needed"
            )

    def read(self, module: str, in_features: int, precisions: tuple[int, ...]) -> PlaneWeight:
        """Return the weight of `module` with the levels of `precisions`, reading only their bytes."""
        tensors = {"planes": self._read(f"{module}.planes", first=precisions[-1])}
        for name in self._level_names(precisions):
            tensors[name] = self._read(f"{module}.{name}")
        return from_tensors(tensors, in_features, self.stored.group_size)

    def _level_names(self, precisions: tuple[int, ...]) -> list[str]:
        return list(level_shapes(self.stored, 1, 1, precisions))

    def _read(self, name: str, first: int | None = None) -> torch.Tensor:
        """Return a tensor, or its `first` leading entries, checked against the stored checksums."""
        entry = self._entries[name]
        shape = entry.shape if first is None else (first, *entry.shape[1:])
        count = entry.dtype.itemsize * _numel(shape)
        mapped = self._mapped(entry.file)
        if entry.start + count > len(mapped):
            got = max(0, len(mapped) - entry.start)
            raise AnybitsError(f"{entry.file} is truncated: {name} ends after {got} of {count} bytes")
        tensor = mapped.tensor(entry.start, shape, entry.dtype)
        with self._lock:
            self.bytes_read += count
        parts = tensor if _is_planes(name) else tensor[None]
        if entry.crc32 and [_crc32(part) for part in parts] != list(entry.crc32[: len(parts)]):
            raise AnybitsError(f"{entry.file} is corrupted: the bytes of {name} do not match their checksum")
        mapped.give_back(entry.start, count)
        return tensor

    def _mapped(self, file: Path) -> MappedFile:
        with self._lock:
            if file not in self._maps:
                self._maps[file] = MappedFile(file)
            return self._maps[file]

    def pages(self, module: str) -> Pages:
        """Return where the tensors of `module` lie, to let go of them once somebody has a copy."""
        names = [f"{module}.{name}" for name in ("planes", *self._level_names(self.stored.precisions))]
        entries = [(name, self._entries[name]) for name in names if name in self._entries]
        return Pages(tuple((self._mapped(e.file), e.start, self.stored_bytes(name)) for name, e in entries))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _read_header(path: Path) -> dict[str, Entry]:
    """Return the entries of one safetensors file, validated by the safetensors library itself."""
    try:
        with safe_open(path, framework="pt") as file:  # checks offsets, overlaps and the file's length
            stored = file.metadata() or {}
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
        sums = json.loads(stored.get(CHECKSUMS, "{}"))
        if not isinstance(sums, dict):
            raise ValueError(f"its {CHECKSUMS} metadata is not an object")
    except FileNotFoundError:
        raise AnybitsError(f"{path} is missing: the checkpoint is incomplete") from None
    except (SafetensorError, ValueError, struct.error, OSError) as error:
        raise AnybitsError(f"{path} is truncated or corrupted: {error}") from None
    entries = {}
    for name, info in header.items():
        if name != "__metadata__" and info["dtype"] in _DTYPES:
            start = 8 + length + info["data_offsets"][0]
            entries[name] = Entry(path, _DTYPES[info["dtype"]], tuple(info["shape"]), start, tuple(sums.get(name, ())))
    return entries
