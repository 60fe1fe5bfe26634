"""Levels that were tuned end to end, on disk until all precisions have theirs and the blocks' shards take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from anybits.checkpoint import CheckpointWriter
from anybits.weight import PlaneWeight


class TunedLevels:
    """One file for each precision: a run that was killed goes on with the precisions that have none.

    folder: for the files, made with the first; prefix: name of the list of blocks.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix

    def has(self, precision: int) -> bool:
        """Return whether the levels of `precision` are on disk."""
        return self._folder.exists() and CheckpointWriter(self._folder).has_shard(str(precision))

    def write(self, precision: int, blocks: Sequence[Mapping[str, PlaneWeight]]) -> None:
        """Keep the levels of `precision` of every block's weights, which are given by module."""
        levels = {
            f"{self._prefix}.{index}.{module}.{name}": tensor
            for index, weights in enumerate(blocks)
            for module, weight in weights.items()
            for name, tensor in weight.levels.tensors(precision).items()
        }
        CheckpointWriter(self._folder).write_shard(str(precision), levels)

    def put_into(self, writer: CheckpointWriter, shards: Sequence[str], precisions: Sequence[int]) -> None:
        """Replace the levels in the shards of all blocks, in the order of these; doing so again changes nothing."""
        files = CheckpointWriter(self._folder)
        tuned = [files.read_shard(str(p)) for p in precisions]
        for index, shard in enumerate(shards):
            own = f"{self._prefix}.{index}."
            found = {name: t for tensors in tuned for name, t in tensors.items() if name.startswith(own)}
            writer.write_shard(shard, writer.read_shard(shard) | found)
