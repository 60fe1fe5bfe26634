"""Activations of all calibration batches: in memory while they are small, in a file when they are not."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, overload

import torch

IN_MEMORY = 1 << 30
"""Bytes of activations that a run keeps in memory; more go to files, which the page cache holds where it can."""


_TRAILER = 128
"""Bytes at the end of a named file that tell shape and dtype of its batches."""


class Activations(Sequence[torch.Tensor]):
    """Equal tensors, one for each batch, in a file; a tensor is in memory while somebody who asked for it holds it."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, self._shape, self._dtype, self._count = file, shape, dtype, 0
        self._bytes = torch.Size(shape).numel() * dtype.itemsize

    @classmethod
    def in_folder(cls, folder: Path, batches: Iterable[torch.Tensor]) -> Activations:
        """Write `batches` to a nameless file of `folder`; a killed process leaves nothing behind."""
        made: Activations | None = None
        for batch in batches:
            if made is None:
                file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (lives as long as the object)
                made = cls(file, tuple(batch.shape), batch.dtype)
            made.append(batch)
        assert made is not None, "there is at least one batch"
        return made

    @classmethod
    def named(cls, path: Path, batches: Iterable[torch.Tensor]) -> None:
        """Write `batches` to the file `path`, which gets its name once it is whole."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            made: Activations | None = None
            for batch in batches:
                made = made or cls(file, tuple(batch.shape), batch.dtype)
                made.append(batch)
            assert made is not None, "there is at least one batch"
            file.seek(made._count * made._bytes)
            file.write(json.dumps([made._shape, str(made._dtype).removeprefix("torch.")]).encode().rjust(_TRAILER))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    @classmethod
    def opened(cls, path: Path) -> Activations:
        """Return what `named` wrote."""
        file = path.open("rb")
        end = file.seek(-_TRAILER, os.SEEK_END)
        shape, dtype = json.loads(file.read())
        found = cls(file, tuple(shape), getattr(torch, dtype))
        found._count = end // found._bytes
        return found

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        tensor = torch.empty(self._shape, dtype=self._dtype)
        self._file.seek(index * self._bytes)
        got = self._file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        assert got == self._bytes, "the file holds every batch whole"
        return tensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(self._count))

    def append(self, batch: torch.Tensor) -> None:
        """Write one more batch."""
        assert tuple(batch.shape) == self._shape, "batches are equal"
        self._file.seek(self._count * self._bytes)
        self._file.write(batch.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._count += 1


class Keeper:
    """Decides once for a run where its activations live.

    total: bytes of all that will be kept at the same time; folder: where files go.
    """

    def __init__(self, total: int, folder: Path) -> None:
        self._folder = folder if total > IN_MEMORY else None

    def keep(self, batches: Iterable[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the batches, in memory or in a file."""
        return list(batches) if self._folder is None else Activations.in_folder(self._folder, batches)
