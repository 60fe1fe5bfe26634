"""Weights folders of other code, read without trusting them: every tensor is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from anybits import checkpoint
from anybits.config import StoredConfig
from anybits.errors import AnybitsError

PICKLE_FILE = "pytorch_model.bin"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return the object in one of a folder's JSON files; raise AnybitsError when there is none."""
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AnybitsError(f"{folder} has no {name}: it is not a model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AnybitsError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise AnybitsError(f"{path} holds no JSON object")
    return config


class ForeignTensors:
    """The tensors of a folder by name: safetensors, or a pickle that is only ever read with weights_only.

    `sha256` is the hash of the weight files, in the order of their names.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder's weights; raise AnybitsError when they are missing, truncated or no plain tensors."""
        self.where = folder
        self._loaded: dict[str, torch.Tensor] = {}
        self._reader: checkpoint.CheckpointReader | None = None
        bin_file = folder / PICKLE_FILE
        files = [bin_file] if _is_pickle_folder(folder) else checkpoint.checkpoint_files(folder)
        if files == [bin_file]:
            self._loaded = _load_pickle(bin_file)
        else:
            _check_inside(folder, files)
            self._reader = checkpoint.CheckpointReader(files, StoredConfig("any-precision", (2,), ()))
        self.sha256 = _sha256(files)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._loaded) if self._reader is None else self._reader.names()

    def has(self, name: str) -> bool:
        """Return whether there is a tensor called `name`."""
        return name in self._loaded if self._reader is None else self._reader.has_tensor(name)

    def get(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        """Return `name`, contiguous; raise AnybitsError unless it has `shape`, one of `dtypes`, and finite values."""
        self.expect(name, shape, dtypes)
        tensor = self._loaded[name].contiguous() if self._reader is None else self._reader.read_tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AnybitsError(f"{name} in {self.where} holds values that are not finite: the file is corrupted")
        return tensor

    def expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        """Raise AnybitsError unless `name` is there with `shape` and one of `dtypes`; reads no data."""
        if not self.has(name):
            raise AnybitsError(f"{self.where} has no tensor {name} of a known dtype: it is incomplete or another model")
        if self._reader is None:
            got, dtype = tuple(self._loaded[name].shape), self._loaded[name].dtype
        else:
            got, dtype = self._reader.shape(name), self._reader.dtype(name)
        if got != shape or dtype not in dtypes:
            wanted = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {list(shape)}"
            raise AnybitsError(
                f"{name} in {self.where} is {str(dtype).removeprefix('torch.')} {list(got)} where {wanted} is needed"
            )


def _is_pickle_folder(folder: Path) -> bool:
    safe = (checkpoint.SINGLE_FILE, checkpoint.INDEX_FILE)
    return (folder / PICKLE_FILE).is_file() and not any((folder / name).exists() for name in safe)


def _check_inside(folder: Path, files: Iterable[Path]) -> None:
    for file in files:
        if file.parent != folder:
            raise AnybitsError(f"the index of {folder} names {file.name} outside of the folder: it cannot be trusted")


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file written by torch.save, after checking its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch itself does not compare them
    except Exception as error:  # zipfile and zlib raise a dozen kinds for damaged archives
        raise AnybitsError(f"{path} is truncated, corrupted or not written by torch.save: {error}") from None
    if broken is not None:
        raise AnybitsError(f"{path} is corrupted: {broken} in it does not match its checksum")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler's opcodes break
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AnybitsError(f"{path} holds more than plain tensors, or is corrupted: {reason}") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu"
        for k, t in loaded.items()
    ):
        raise AnybitsError(f"{path} is not a dictionary of plain tensors")
    return dict(loaded)


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
