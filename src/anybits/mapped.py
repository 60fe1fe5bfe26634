"""A file mapped into memory: its tensors are views whose pages are read when they are used and can be given back."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import torch


class MappedFile:
    """One file, mapped copy-on-write: what is written into a tensor of it never reaches the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __deepcopy__(self, memo: object) -> MappedFile:
        return self

    def __reduce__(self) -> tuple[type[MappedFile], tuple[Path]]:
        return MappedFile, (self._path,)

    def __len__(self) -> int:
        return len(self._memory)

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor of `shape` whose bytes begin at `start`; a copy where they are not aligned for `dtype`."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:
            raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(shape)

    def give_back(self, start: int, size: int) -> None:
        """Let go of the whole pages within `size` bytes from `start`: the next use reads them from the file again.

        What was written into them is lost, so this is for tensors that nobody writes to.
        """
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass(frozen=True)
class Pages:
    """Some tensors' places in mapped files: (file, start, bytes) each."""

    places: tuple[tuple[MappedFile, int, int], ...]

    def give_back(self) -> None:
        """Let their pages go: they are read from the files again should anybody ask."""
        for file, start, size in self.places:
            file.give_back(start, size)
